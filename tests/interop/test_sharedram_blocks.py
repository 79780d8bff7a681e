"""Machines with more than one shared block, saved and loaded again by stock QEMU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from imagereader import read_image
from realguest import StartMachine, shared_path

from uringmig.memory.mapping import FileMemory
from uringmig.qemu.restore import load_into
from uringmig.qemu.sharedram import save_shared
from uringmig.units import MiB

OFFSET = 16 * MiB


def arguments_of(device: str, second: Path) -> list[str]:
    """Command line for a second block of 128 MiB that begins at an offset of its file."""
    backend = f"memory-backend-file,id=more,size=128M,mem-path={second},share=on,offset={OFFSET}"
    return [
        *["-m", "64M,slots=2,maxmem=1G", "-vga", "std"],
        *["-object", backend, "-device", device],
    ]


@pytest.mark.parametrize(
    "device", ["pc-dimm,memdev=more", "virtio-mem-pci,memdev=more,requested-size=128M"]
)
def test_two_blocks_saved_and_loaded(
    start_machine: StartMachine, tmp_path: Path, device: str
) -> None:
    """Memory at both ends is the same, byte for byte, ahead of the offset too."""
    sources = shared_path(), shared_path()
    targets = shared_path(), shared_path()
    try:
        for path in (sources[1], targets[1]):
            with path.open("xb") as file:
                file.truncate(OFFSET + 128 * MiB)
        source = start_machine(
            memory_bytes=64 * MiB,
            shared=sources[0],
            paused=True,
            arguments=arguments_of(device, sources[1]),
        )
        for seed, path in enumerate(sources):
            memory = FileMemory(path, offset=OFFSET, writable=True)
            memory.view[: 2 * MiB] = np.random.default_rng(seed).integers(0, 256, 2 * MiB, np.uint8)
            memory.view[-1] = 1
            memory.close()
        out = tmp_path / "vm.mig"
        assert len(save_shared(source.monitor, out).blocks_mapped) == 2
        read_image(out)
        waiting = start_machine(
            memory_bytes=64 * MiB,
            shared=targets[0],
            incoming=True,
            arguments=arguments_of(device, targets[1]),
        )
        load_into(waiting.monitor, out, channels=2, direct="preferred")
        if "virtio-mem" in device:
            # Nothing is plugged before a driver asks for it, so there is nothing to keep.
            pairs = [(sources[0], targets[0])]
        else:
            pairs = list(zip(sources, targets, strict=True))
        for one, other in pairs:
            assert np.array_equal(np.fromfile(one, np.uint8), np.fromfile(other, np.uint8))
    finally:
        for path in (sources[1], targets[1]):
            path.unlink(missing_ok=True)
