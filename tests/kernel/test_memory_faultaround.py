"""Mapping in by fault-around: all of a range, no hole, and a way back where it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from uringmig.memory import faultaround
from uringmig.memory.faultaround import FaultAround
from uringmig.memory.mapping import FileMemory
from uringmig.writer import MappedRamWriter, RamBlock

PAGE = 4096
LENGTH = 8 << 20


@pytest.fixture
def data() -> Iterator[int]:
    """A memfd: its first half data, the rest a hole but for the last page."""
    fd = os.memfd_create("guest")
    try:
        os.truncate(fd, LENGTH)
        os.pwrite(fd, b"x" * (LENGTH // 2), 0)
        os.pwrite(fd, b"y" * PAGE, LENGTH - PAGE)
        yield fd
    finally:
        os.close(fd)


def mapped_pages(memory: FileMemory) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which pages of the memory are in the page tables, by the kernel's own word."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(memory.address // PAGE * 8)
        words = np.frombuffer(pagemap.read(memory.length_bytes // PAGE * 8), np.uint64)
    present: np.ndarray[tuple[int], np.dtype[np.bool_]] = words >> np.uint64(63) != 0
    return present


@pytest.mark.parametrize(("start", "pages"), [(0, 1024), (3, 1000), (17, 1), (15, 2), (100, 16)])
def test_a_range_is_mapped_in(data: int, start: int, pages: int) -> None:
    with closing(FileMemory(data)) as memory:
        assert not mapped_pages(memory).any()
        memory.prefault(start=start * PAGE, length=pages * PAGE)
        found = mapped_pages(memory)
        # The kernel passes over a page that happens to be locked: one in a million here.
        left_out = np.flatnonzero(~found[start : start + pages])
        assert len(left_out) <= (1 if pages > 1 else 0), left_out
        # What lies around is mapped in too, but nothing beyond 64 KiB.
        assert not found[start + pages + 16 :].any()


def test_a_range_is_mapped_out_and_keeps_its_pages(data: int) -> None:
    """It can be read as before, and no other range is touched."""
    with closing(FileMemory(data)) as memory:
        memory.prefault(start=0, length=512 * PAGE)
        bytes_of = memory.view[: 512 * PAGE].tobytes()
        blocks = os.fstat(data).st_blocks
        memory.map_out(start=0, length=256 * PAGE)
        found = mapped_pages(memory)
        assert not found[:256].any()
        assert np.count_nonzero(~found[256:512]) <= 1
        assert os.fstat(data).st_blocks == blocks
        assert memory.view[: 512 * PAGE].tobytes() == bytes_of


def test_a_save_leaves_no_page_mapped(data: int, tmp_path: Path) -> None:
    """To unmap them at its end takes as long, and then the disk has nothing to do."""
    with (
        closing(FileMemory(data)) as memory,
        MappedRamWriter(tmp_path / "vm.mig", [RamBlock("ram", memory)]) as writer,
    ):
        writer.write_all()
        assert not mapped_pages(memory).any()
        writer.finish()


def test_no_hole_is_allocated(data: int) -> None:
    blocks = os.fstat(data).st_blocks
    with closing(FileMemory(data)) as memory:
        memory.prefault(start=LENGTH - PAGE, length=PAGE)
        assert mapped_pages(memory)[-1]
        assert not mapped_pages(memory)[LENGTH // 2 // PAGE : -1].any()
    assert os.fstat(data).st_blocks == blocks


@pytest.mark.parametrize(
    ("name", "value"),
    [("_SYS_PROCESS_MADVISE", 100_000), ("_AROUND_BYTES", 1 << 20), ("_RANGES_MAX", 4)],
)
def test_where_it_does_not_help_each_page_is_asked_for(
    data: int, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    """An older kernel; a kernel that maps fewer pages around; a range too long for one call."""
    monkeypatch.setattr(faultaround, name, value)
    with closing(FaultAround()) as around, closing(FileMemory(data)) as memory:
        assert not around.map_in(memory.address, LENGTH // 2)
        memory.prefault(start=0, length=LENGTH // 2)
        assert mapped_pages(memory)[: LENGTH // 2 // PAGE].all()  # asked for one by one


def test_without_proc_it_gives_up(data: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if path == "/proc/self/pagemap":
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(FileMemory(data)) as memory:
        memory.prefault(start=0, length=LENGTH // 2)
        assert bytes(memory.view[:PAGE]) == b"x" * PAGE
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_it_is_used_here(data: int) -> None:
    with closing(FaultAround()) as around, closing(FileMemory(data)) as memory:
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        if release < (6, 13):
            pytest.skip("process_madvise(2) takes no populate here (Linux 6.13)")
        assert around.map_in(memory.address, LENGTH // 2)
        around.close()
        assert not around.map_in(memory.address, LENGTH // 2)
