"""Guests that are partly swapped out, saved from outside: read right, and only what is there."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostmemory import RAM_LEAST, fill, taken
from machinestates import assert_saved_as_by_qemu
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on

from uringmig.qemu.outside import save_outside
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB
from uringmig.verify import verify

_LIBC = ctypes.CDLL(None, use_errno=True)
#: Linux: include/uapi/asm-generic/unistd.h, and mman-common.h.
_PROCESS_MADVISE = 440
_MADV_PAGEOUT = 21


@pytest.fixture(scope="module", autouse=True)
def swap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A swap file on a loop device of its own, so that any file system below will do."""
    if os.geteuid() != 0:
        pytest.skip("only root may swap")
    file = tmp_path_factory.mktemp("swap") / "file"
    file.write_bytes(bytes(256 * MiB))
    device = subprocess.run(
        ["losetup", "--find", "--show", file], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["swapon", device], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", device], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def page_out(machine: Machine) -> None:
    """Have the kernel swap the guest's RAM out, as it does under pressure."""
    fd = os.pidfd_open(machine.process.pid)
    try:
        for block in machine.monitor.ram_blocks():
            if block.used_length >= RAM_LEAST:
                assert block.host_address is not None
                place = (ctypes.c_size_t * 2)(block.host_address, block.used_length)
                one, advice = ctypes.c_size_t(1), ctypes.c_int(_MADV_PAGEOUT)
                done = _LIBC.syscall(_PROCESS_MADVISE, fd, ctypes.byref(place), one, advice, 0)
                assert done == block.used_length, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "backend",
    ["", "memory-backend-memfd,share=off", "memory-backend-memfd,share=on",
     "memory-backend-shm,share=on"],
)  # fmt: skip
def test_as_qemu_saves_it(backend: str, start_machine: StartMachine, tmp_path: Path) -> None:
    """QEMU's bytes; what was swapped out comes in, and not a page beside it."""
    machine = start_machine(memory_bytes=64 * MiB, backend=backend, paused=True)
    fill(machine)
    page_out(machine)
    before = taken(machine)
    assert before.swapped > 0 or backend.endswith("share=on")
    assert_saved_as_by_qemu(
        machine, tmp_path, mapped=("pc.ram",) if backend.endswith("share=on") else ()
    )


def test_a_guest_remembers(guest: GuestImage, start_machine: StartMachine, tmp_path: Path) -> None:
    """It is swapped out while it runs; its memory is whole, here and in the image."""
    machine = start_machine(
        memory_bytes=GUEST_BYTES, backend="", guest=guest, fill_bytes=FILL_BYTES
    )
    digest = machine.console.wait_until_ready()
    page_out(machine)
    before = taken(machine)
    assert before.swapped > FILL_BYTES // 2
    result = save_outside(machine.monitor, tmp_path / "vm.mig")
    after = taken(machine)
    # It runs, so it touches some itself.
    assert (after.pages + after.swapped) - (before.pages + before.swapped) < 8 * MiB
    assert (result.notes, verify(tmp_path / "vm.mig").mismatches) == ((), ())
    assert_goes_on(machine)
    assert machine.console.digest() == digest
