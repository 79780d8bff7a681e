"""A real QEMU whose RAM is on hugetlbfs, archived from its files: no huge page taken by looking."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from contentsreading import collect
from hugepool import huge_page_bytes, mounted_hugetlbfs, pool_count, pool_of
from qemuprocess import BINARY, QemuProcess

from uringmig.contents.memoryfiles import MemoryFileBlock, open_memory
from uringmig.units import MiB

RAM_BYTES = 64 * MiB
PAGE = 4096

pytestmark = pytest.mark.skipif(BINARY is None, reason="qemu-system-x86_64 is not installed")


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A mounted hugetlbfs with a pool large enough for the guest."""
    with (
        pool_of(RAM_BYTES // huge_page_bytes() + 2),
        mounted_hugetlbfs(tmp_path / "huge") as folder,
    ):
        yield folder


def test_memory_on_hugetlbfs(hugetlbfs: Path, tmp_path: Path) -> None:
    ram = hugetlbfs / "ram"
    # A new machine's firmware is not in its RAM, so what is there is what is put here.
    touched = {5 * PAGE: b"\x11", 9 * MiB + 3: b"\x22", RAM_BYTES - 1: b"\x33"}
    with ram.open("w+b") as file:
        file.truncate(RAM_BYTES)
        with mmap.mmap(file.fileno(), RAM_BYTES) as mapping:
            for at, byte in touched.items():
                mapping[at : at + 1] = byte
    with QemuProcess(tmp_path, ram=ram) as qemu:
        qemu.save(f"file:{tmp_path}/state", capabilities=["x-ignore-shared"], max_bandwidth=0)
    free = pool_count("Free")
    with open_memory([MemoryFileBlock("pc.ram", ram)], tmp_path / "state") as source:
        memory = collect(source)["pc.ram"]
        held = source.stored_bytes()
    assert pool_count("Free") == free
    expected = bytearray(RAM_BYTES)
    for at, byte in touched.items():
        expected[at : at + 1] = byte
    assert memory == expected
    # Whole huge pages count as data, and the ROMs and video memory that came with the state.
    assert held < RAM_BYTES // 2
