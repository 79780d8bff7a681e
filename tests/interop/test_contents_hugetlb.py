"""A real QEMU whose RAM is on hugetlbfs, archived from its files: no huge page taken by looking."""

from __future__ import annotations

import mmap
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from contentsreading import collect
from qemuprocess import BINARY, QemuProcess

from uringmig.contents.memoryfiles import MemoryFileBlock, open_memory
from uringmig.units import KiB, MiB

POOL = Path("/proc/sys/vm/nr_hugepages")
RAM_BYTES = 64 * MiB
PAGE = 4096

pytestmark = pytest.mark.skipif(BINARY is None, reason="qemu-system-x86_64 is not installed")


def meminfo(name: str) -> int:
    """A line of /proc/meminfo: huge pages, or KiB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1])


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A mounted hugetlbfs with a pool large enough for the guest."""
    wanted = RAM_BYTES // (meminfo("Hugepagesize") * KiB) + 2
    before = POOL.read_text()
    folder = tmp_path / "huge"
    folder.mkdir()
    try:
        POOL.write_text(str(meminfo("HugePages_Total") + wanted - meminfo("HugePages_Free")))
        subprocess.run(["mount", "-t", "hugetlbfs", "none", folder], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to make huge pages or to mount: {error}")
    try:
        if meminfo("HugePages_Free") < wanted:
            pytest.skip(f"not enough contiguous memory for {wanted} huge pages")
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        POOL.write_text(before)


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
    free = meminfo("HugePages_Free")
    with open_memory([MemoryFileBlock("pc.ram", ram)], tmp_path / "state") as source:
        memory = collect(source)["pc.ram"]
        held = source.stored_bytes()
    assert meminfo("HugePages_Free") == free
    expected = bytearray(RAM_BYTES)
    for at, byte in touched.items():
        expected[at : at + 1] = byte
    assert memory == expected
    # Whole huge pages count as data, and the ROMs and video memory that came with the state.
    assert held < RAM_BYTES // 2
