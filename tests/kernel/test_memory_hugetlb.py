"""hugetlbfs: no SEEK_HOLE, a small pool, and SIGBUS for who reads a hole with the pool empty."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hugepool import pool_count
from imagereader import read_image

from uringmig import MappedRamWriter, RamBlock
from uringmig.errors import StateError, StorageError
from uringmig.memory.mapping import FileMemory, create_memfd
from uringmig.pages.zero import nonzero_pages

PAGE = 4096


@pytest.fixture
def big(huge_page: int) -> Iterator[int]:
    """A memfd of twice as many huge pages as there are free ones, all holes."""
    fd = create_memfd("huge-ram", 2 * pool_count("Free") * huge_page, hugetlb=True)
    yield fd
    os.close(fd)


def put(fd: int, *, offset: int, byte: int, huge_page: int) -> None:
    """Store one byte by way of a mapping of its huge page alone: hugetlbfs has no write()."""
    with mmap.mmap(fd, huge_page, offset=offset // huge_page * huge_page) as mapping:
        mapping[offset % huge_page] = byte


def extents_of(memory: FileMemory, *, start: int = 0, length: int | None = None) -> object:
    found = memory.data_extents(start=start, length=length or memory.length_bytes)
    return list(zip(found.start.tolist(), found.length.tolist(), strict=True))


def test_an_unpopulated_file_beyond_the_pool_is_all_holes(big: int, huge_page: int) -> None:
    """Neither mapping nor asking sets a huge page aside, or dies of SIGBUS."""
    free, reserved = pool_count("Free"), pool_count("Rsvd")
    memory = FileMemory(big)
    assert memory.length_bytes > free * huge_page
    assert extents_of(memory) == []
    assert memory.next_data(PAGE) == PAGE
    assert (pool_count("Free"), pool_count("Rsvd")) == (free, reserved)
    assert os.fstat(big).st_blocks == 0
    memory.close()


def test_only_touched_huge_pages_are_data(big: int, huge_page: int) -> None:
    """A byte anywhere counts, the last one too; the scan of data allocates nothing."""
    put(big, offset=huge_page, byte=1, huge_page=huge_page)
    put(big, offset=5 * huge_page - 1, byte=1, huge_page=huge_page)
    free = pool_count("Free")
    memory = FileMemory(big)
    assert extents_of(memory) == [(huge_page, huge_page), (4 * huge_page, huge_page)]
    nonzero = [
        start + PAGE * np.flatnonzero(nonzero_pages(memory.view[start : start + huge_page]))
        for start in (huge_page, 4 * huge_page)
    ]
    assert np.concatenate(nonzero).tolist() == [huge_page, 5 * huge_page - PAGE]
    assert pool_count("Free") == free
    memory.close()


def test_neighbours_are_one_extent_and_a_zeroed_page_is_none(big: int, huge_page: int) -> None:
    for index in (2, 3):
        put(big, offset=index * huge_page + 9 * PAGE, byte=1, huge_page=huge_page)
    put(big, offset=6 * huge_page, byte=0, huge_page=huge_page)
    assert os.fstat(big).st_blocks * 512 == 3 * huge_page
    memory = FileMemory(big)
    assert extents_of(memory) == [(2 * huge_page, 2 * huge_page)]
    memory.close()


def test_ranges_that_cut_huge_pages(big: int, huge_page: int) -> None:
    """A window smaller than a huge page gets an answer of its own."""
    put(big, offset=huge_page + 7 * PAGE, byte=1, huge_page=huge_page)
    memory = FileMemory(big)
    cut = huge_page + 7 * PAGE
    assert extents_of(memory, start=cut, length=PAGE) == [(cut, PAGE)]
    assert extents_of(memory, start=cut + PAGE, length=2 * huge_page) == []
    start = 8 * PAGE
    expected = [(huge_page, start)]
    assert extents_of(memory, start=start, length=huge_page) == expected
    memory.close()


def test_memory_that_begins_inside_a_huge_page(big: int, huge_page: int) -> None:
    put(big, offset=huge_page + 7 * PAGE, byte=0x5A, huge_page=huge_page)
    memory = FileMemory(big, offset=huge_page + 3 * PAGE, length=10 * PAGE)
    assert extents_of(memory) == [(0, 10 * PAGE)]
    assert memory.view[4 * PAGE] == 0x5A
    assert memory.address % PAGE == 0
    memory.close()


def test_a_populated_file_is_data_without_a_read(
    huge_page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preallocated guests are the rule; copying them through pread would halve the scan."""
    fd = create_memfd("huge-ram", 2 * huge_page, hugetlb=True)
    sink = FileMemory(fd, writable=True)
    sink.view[:] = 0

    def no_preadv(*_: object) -> int:
        raise AssertionError("read a populated file")

    monkeypatch.setattr(os, "preadv", no_preadv)
    assert extents_of(sink) == [(0, 2 * huge_page)]
    sink.close()
    os.close(fd)


def test_a_sink_beyond_the_pool_is_refused_when_made(big: int) -> None:
    """Not by SIGBUS in the middle of a restore; and the cure is named."""
    with pytest.raises(StorageError, match="nr_hugepages"):
        FileMemory(big, writable=True)


def test_a_length_of_half_a_huge_page_is_refused(huge_page: int) -> None:
    with pytest.raises(StorageError, match="multiple of the huge page size"):
        create_memfd("huge-ram", huge_page + huge_page // 2, hugetlb=True)


def test_a_file_of_a_hugetlbfs_mount(tmp_path: Path, huge_page: int) -> None:
    """As QEMU's memory-backend-file has it: by path, with close of all it took."""
    mounted = subprocess.run(
        ["mount", "-t", "hugetlbfs", "none", tmp_path], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no right to mount hugetlbfs: {mounted.stderr.strip()}")
    try:
        path = tmp_path / "ram"
        path.touch()
        os.truncate(path, 3 * huge_page)
        sink = FileMemory(path, writable=True)
        sink.view[huge_page + 1] = 3
        sink.close()
        memory = FileMemory(path)
        assert extents_of(memory) == [(huge_page, huge_page)]
        with pytest.raises(StateError):
            memory.data_extents(start=3 * huge_page, length=PAGE)
        memory.close()
    finally:
        # It would be busy if a mapping or descriptor were left.
        subprocess.run(["umount", tmp_path], check=True)


def test_a_live_save_takes_no_huge_page(big: int, huge_page: int, tmp_path: Path) -> None:
    """Holes are looked for in both passes, and stay what they are; data that comes is found."""
    put(big, offset=0, byte=1, huge_page=huge_page)
    memory = FileMemory(big)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("pc.ram", memory)], live=True) as writer:
        writer.write_all()
        put(big, offset=5000, byte=2, huge_page=huge_page)
        put(big, offset=huge_page + 1, byte=3, huge_page=huge_page)
        free = pool_count("Free")
        writer.write_changed()
        writer.finish()
    assert pool_count("Free") == free
    expected = bytearray(memory.length_bytes)
    expected[0], expected[5000], expected[huge_page + 1] = 1, 2, 3
    memory.close()
    assert read_image(tmp_path / "vm").contents["pc.ram"] == expected
