"""Mapped files as guest memory: holes are found, and never allocated by looking."""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Pairs, run_pairs

from uringmig.errors import StateError, StorageError
from uringmig.memory.mapping import FileMemory, create_memfd
from uringmig.memory.source import Extents, MemorySink, MemorySource
from uringmig.pages.zero import nonzero_pages

PAGE = 4096
WINDOW = 4 << 20


@pytest.fixture
def memfd() -> Iterator[int]:
    """16 MiB of holes."""
    fd = create_memfd("guest-ram", 16 << 20)
    yield fd
    os.close(fd)


@pytest.fixture(params=["tmpfs", "ordinary"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file of 16 MiB of holes, in /dev/shm and on a disk."""
    folder = Path("/dev/shm") if request.param == "tmpfs" else tmp_path
    path = folder / f"uringmig-test-{os.getpid()}"
    path.touch()
    os.truncate(path, 16 << 20)
    yield path
    path.unlink()


def write_pages(fd: int, pages: list[int]) -> None:
    for page in pages:
        os.pwrite(fd, bytes([1 + page % 255]) * PAGE, page * PAGE)


def pages_of(extents: Extents) -> list[int]:
    return [
        page
        for start, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True)
        for page in range(start // PAGE, (start + length) // PAGE)
    ]


def asked_page_by_page(fd: int, *, first: int, count: int) -> list[int]:
    """Pages, from ``first`` on, of which the kernel says that they are data; the slow version."""
    found = []
    for page in range(first, first + count):
        try:
            if os.lseek(fd, page * PAGE, os.SEEK_DATA) == page * PAGE:
                found.append(page - first)
        except OSError:  # ENXIO: no data from here to the end.
            break
    return found


def allocated_bytes(file: int | Path) -> int:
    status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_blocks * 512


def scan(memory: MemorySource) -> list[int]:
    """Do as a save does: window by window, holes first, then look at data only."""
    found = []
    for start in range(0, memory.length_bytes, WINDOW):
        length = min(WINDOW, memory.length_bytes - start)
        extents = memory.data_extents(start=start, length=length)
        for first, count in zip(extents.start.tolist(), extents.length.tolist(), strict=True):
            bits = nonzero_pages(memory.view[first : first + count])
            found += (first // PAGE + np.flatnonzero(bits)).tolist()
    return found


def test_a_scan_of_holes_allocates_nothing(path: Path) -> None:
    """Scanning a sparse file changes its allocation by nothing, and finds each page."""
    pages = [0, 1, 700, 1023, 1024, 2500, 4095]
    with path.open("r+b") as file:
        write_pages(file.fileno(), pages)
        os.fsync(file.fileno())
    before = allocated_bytes(path)
    memory = FileMemory(path)
    assert scan(memory) == pages
    assert allocated_bytes(path) == before
    memory.close()


def test_looking_at_a_hole_would_allocate_it(memfd: int) -> None:
    """Why holes are asked for: this is what the test above would see if they were read."""
    memory = FileMemory(memfd)
    assert scan(memory) == []
    assert allocated_bytes(memfd) == 0
    assert not memory.view[:WINDOW].any()
    assert allocated_bytes(memfd) >= WINDOW


@settings(max_examples=50, deadline=None)
@given(
    run_pairs(),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=6),
)
def test_extents_are_what_the_kernel_says_page_by_page(
    runs: Pairs, first_page: int, ranges: Pairs
) -> None:
    """Any ranges in any order, one memory asked for all, beginning anywhere in the file."""
    page_count = 1100
    fd = create_memfd("guest-ram", (first_page + page_count) * PAGE)
    try:
        write_pages(fd, [page for first, count in runs for page in range(first, first + count)])
        memory = FileMemory(fd, offset=first_page * PAGE)
        assert memory.length_bytes == page_count * PAGE
        data = asked_page_by_page(fd, first=first_page, count=page_count)
        for first, count in ranges:
            extents = memory.data_extents(start=first * PAGE, length=count * PAGE)
            assert pages_of(extents) == [page for page in data if first <= page < first + count]
            assert (extents.start[1:] > (extents.start + extents.length)[:-1]).all()
            following = [page for page in data if page >= first]
            assert memory.next_data(first * PAGE) == PAGE * min([*following, page_count])
        memory.close()
    finally:
        os.close(fd)


def test_extents_asked_by_two_threads(memfd: int) -> None:
    """Channels share a memory: every answer must be as if asked alone."""
    write_pages(memfd, [page for page in range(4096) if page % 7 < 3 or page % 500 > 300])
    memory = FileMemory(memfd)
    data = asked_page_by_page(memfd, first=0, count=4096)
    starts = [first for _ in range(20) for first in range(0, 4096, 64)]

    def ask(first: int) -> list[int]:
        return pages_of(memory.data_extents(start=first * PAGE, length=64 * PAGE))

    with ThreadPoolExecutor(2) as threads:
        for first, found in zip(starts, threads.map(ask, starts), strict=True):
            assert found == [page for page in data if first <= page < first + 64]


def test_a_dense_file_is_asked_once(monkeypatch: pytest.MonkeyPatch, memfd: int) -> None:
    """SEEK_HOLE walks to the end of the data: asked for each window it would be quadratic.

    Nor does one channel more ask once more.
    """
    os.pwrite(memfd, b"\x01" * (16 << 20), 0)
    memory = FileMemory(memfd)
    calls = []
    real_lseek = os.lseek

    def counting_lseek(fd: int, position: int, how: int) -> int:
        calls.append(how)
        time.sleep(0.05)  # long enough for the other to come
        return real_lseek(fd, position, how)

    def ask(start: int) -> tuple[list[int], list[int]]:
        extents = memory.data_extents(start=start, length=1 << 20)
        return extents.start.tolist(), extents.length.tolist()

    monkeypatch.setattr(os, "lseek", counting_lseek)
    starts = range(0, 16 << 20, 1 << 20)
    with ThreadPoolExecutor(2) as channels:
        assert list(channels.map(ask, starts)) == [([start], [1 << 20]) for start in starts]
    assert calls == [os.SEEK_DATA, os.SEEK_HOLE]


def test_a_hole_does_not_ask_where_the_data_behind_it_ends(
    monkeypatch: pytest.MonkeyPatch, memfd: int
) -> None:
    """Asked for each window of the hole, that would be quadratic, too."""
    os.pwrite(memfd, b"\x01" * (4 << 20), 12 << 20)
    memory = FileMemory(memfd)
    calls = []
    real_lseek = os.lseek

    def counting_lseek(fd: int, position: int, how: int) -> int:
        calls.append(how)
        return real_lseek(fd, position, how)

    monkeypatch.setattr(os, "lseek", counting_lseek)
    for start in range(0, 12 << 20, 1 << 20):
        assert len(memory.data_extents(start=start, length=1 << 20)) == 0
    assert calls == [os.SEEK_DATA] * 12
    assert memory.data_extents(start=8 << 20, length=8 << 20).start.tolist() == [12 << 20]


def test_pages_set_aside_and_never_written_are_a_hole(memfd: int) -> None:
    """fallocate(2) counts them in st_blocks, and reading them would clear each."""
    os.posix_fallocate(memfd, 0, 16 << 20)
    assert os.fstat(memfd).st_blocks * 512 == 16 << 20
    write_pages(memfd, [7])
    with closing(FileMemory(memfd)) as memory:
        assert pages_of(memory.data_extents(start=0, length=16 << 20)) == [7]


def test_prefault_maps_data_in_and_allocates_nothing(memfd: int) -> None:
    length = 8 << 20
    os.pwrite(memfd, (bytes(range(1, 256)) * (length // 255 + 1))[:length], 0)
    with closing(FileMemory(memfd)) as memory:
        blocks = os.fstat(memfd).st_blocks
        memory.prefault(start=0, length=length)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert memory.view[:length:PAGE].all()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 16
        assert os.fstat(memfd).st_blocks == blocks
        assert bytes(memory.view[length - PAGE : length]) == os.pread(memfd, PAGE, length - PAGE)


def test_a_page_written_later_is_seen(memfd: int) -> None:
    """Between rounds of a live save holes become data; only data may be remembered."""
    memory = FileMemory(memfd)
    assert pages_of(memory.data_extents(start=0, length=16 << 20)) == []
    write_pages(memfd, [5])
    assert pages_of(memory.data_extents(start=0, length=16 << 20)) == [5]
    write_pages(memfd, [6, 4])
    assert pages_of(memory.data_extents(start=0, length=16 << 20)) == [4, 5, 6]


def test_view_and_address_are_those_of_the_file(path: Path) -> None:
    with path.open("r+b") as file:
        write_pages(file.fileno(), [3, 4])
    memory: MemorySource = FileMemory(path, offset=2 * PAGE, length=4 * PAGE)
    assert memory.length_bytes == 4 * PAGE
    assert memory.view.shape == (4 * PAGE,)
    assert memory.address == memory.view.ctypes.data
    assert memory.address % PAGE == 0
    assert not memory.view.flags.writeable
    assert memory.view.tobytes() == path.read_bytes()[2 * PAGE : 6 * PAGE]
    memory.close()


def test_a_sink_writes_to_the_file(path: Path) -> None:
    sink: MemorySink = FileMemory(path, offset=PAGE, length=2 * PAGE, writable=True)
    sink.view[PAGE] = 0x77
    sink.close()
    content = path.read_bytes()
    assert content[2 * PAGE] == 0x77
    assert len(content) == 16 << 20


def test_close_keeps_views_alive_and_the_callers_descriptor_open(memfd: int) -> None:
    write_pages(memfd, [0])
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    memory = FileMemory(memfd)
    view = memory.view
    memory.close()
    memory.close()
    with pytest.raises(StateError, match="closed"):
        memory.data_extents(start=0, length=PAGE)
    with pytest.raises(StateError, match="closed"):
        _ = memory.view
    assert view[0] == 1
    assert "guest-ram" in Path("/proc/self/maps").read_text()
    del view
    assert "guest-ram" not in Path("/proc/self/maps").read_text()
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    assert os.fstat(memfd).st_size == 16 << 20


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-PAGE, None),
        (17 << 20, None),
        (16 << 20, None),
        (0, (16 << 20) + PAGE),
        (PAGE, 16 << 20),
        (100, PAGE),
        (0, 100),
        (0, 0),
        (0, -PAGE),
    ],
)
def test_ranges_not_in_the_file_are_refused(memfd: int, offset: int, length: int | None) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StateError):
        FileMemory(memfd, offset=offset, length=length)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_file_of_odd_size_is_refused_unless_a_length_is_given(tmp_path: Path) -> None:
    file = tmp_path / "odd"
    file.write_bytes(b"x" * (2 * PAGE + 10))
    with pytest.raises(StateError, match="not whole pages"):
        FileMemory(file)
    memory = FileMemory(file, length=2 * PAGE)
    assert pages_of(memory.data_extents(start=0, length=2 * PAGE)) == [0, 1]


@pytest.mark.parametrize("start", [-PAGE, 16 << 20, 12])
def test_extents_outside_are_refused(memfd: int, start: int) -> None:
    with pytest.raises(StateError):
        FileMemory(memfd).data_extents(start=start, length=PAGE)


def test_what_cannot_be_guest_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="regular"):
        FileMemory("/dev/zero", length=PAGE)
    with pytest.raises(StateError, match="regular"):
        FileMemory(tmp_path)
    with pytest.raises(StorageError, match="ENOENT"):
        FileMemory(tmp_path / "absent")
    with pytest.raises(StorageError, match="EBADF"):
        FileMemory(1 << 20)


def test_a_read_only_descriptor_makes_no_sink(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.write_bytes(bytes(PAGE))
    fd = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match="EACCES"):
            FileMemory(fd, writable=True)
    finally:
        os.close(fd)


def test_a_memfd_is_all_holes_and_not_inherited(memfd: int) -> None:
    assert os.fstat(memfd).st_size == 16 << 20
    assert allocated_bytes(memfd) == 0
    assert not os.get_inheritable(memfd)


def test_a_memfd_that_cannot_be_is_refused() -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StorageError, match="no memory file"):
        create_memfd("guest-ram", -1)
    with pytest.raises(StorageError, match="no memory file"):
        create_memfd("n" * 4096, PAGE)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_mappings_see_each_other(memfd: int) -> None:
    """MAP_SHARED: what a VMM stores in its mapping is what is saved from ours."""
    memory = FileMemory(memfd)
    with mmap.mmap(memfd, PAGE) as vmm:
        vmm[10] = 0x42
    assert memory.view[10] == 0x42
