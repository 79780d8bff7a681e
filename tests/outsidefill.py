"""Memory of a QEMU filled from outside, as a guest would: no guest need boot for it."""

from __future__ import annotations

import os

import numpy as np

from uringmig.testing.machine import Machine
from uringmig.units import MiB


def fill_ram(machine: Machine, *, first: int, length: int, seed: int = 1) -> None:
    """Write noise to ``length`` bytes of pc.ram from ``first`` on; whole MiB."""
    [block] = [each for each in machine.monitor.ram_blocks() if each.idstr == "pc.ram"]
    assert block.host_address is not None
    noise = np.random.default_rng(seed)
    fd = os.open(f"/proc/{machine.process.pid}/mem", os.O_RDWR)
    try:
        for at in range(first, first + length, MiB):
            data = noise.integers(1, 256, MiB, np.uint8).tobytes()
            assert os.pwrite(fd, data, block.host_address + at) == MiB
    finally:
        os.close(fd)
