"""How much of a guest's memory is no hole, counted for plans: in bounded memory, exactly."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from uringmig import Configuration
from uringmig.contents.devicestream import DeviceStream
from uringmig.contents.memoryfiles import MemoryContents
from uringmig.memory.array import BufferMemory
from uringmig.memory.mapping import FileMemory, create_memfd

PAGE = 4096
EXTENTS = 120_000
SIZE = 2 * EXTENTS * PAGE
#: What asking for all these extents at once takes, and more: Python's pairs alone take 15 MiB.
MEMORY_BYTES_MAX = 1 << 20


@pytest.fixture(scope="module")
def fragmented() -> Iterator[int]:
    """A memory file in which every other page is a hole: more than 100,000 extents."""
    fd = create_memfd("fragmented", SIZE)
    for page in range(0, 2 * EXTENTS, 2):
        os.pwrite(fd, b"x", page * PAGE)
    yield fd
    os.close(fd)


def contents_of(fd: int) -> MemoryContents:
    stream = DeviceStream()
    stream.configuration = Configuration("pc-q35-10.0", ("x-ignore-shared",))
    stream.section_id = 2
    stream.blocks = [("pc.ram", SIZE)]
    return MemoryContents("memory", stream, {"pc.ram": FileMemory(fd)})


def test_looking_at_a_guest_does_not_grow_with_its_fragments(fragmented: int) -> None:
    """Neither in memory nor in questions: one for the whole file, as it lies in memory."""
    asked: list[int] = []

    class Asked(FileMemory):
        def data_extents(self, *, start: int, length: int):  # type: ignore[no-untyped-def]
            asked.append(length)
            return super().data_extents(start=start, length=length)

    with closing(Asked(fragmented)) as memory, contents_of(fragmented) as contents:
        tracemalloc.start()
        try:
            counted = memory.data_bytes(), contents.stored_bytes()
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert counted == (EXTENTS * PAGE, EXTENTS * PAGE)
    assert peak_bytes < MEMORY_BYTES_MAX
    assert not asked


def test_a_part_of_a_file_is_counted_window_by_window(fragmented: int) -> None:
    """The file's own count is of more than the part; memory stays bounded all the same."""
    with closing(FileMemory(fragmented, offset=PAGE, length=SIZE - PAGE)) as memory:
        tracemalloc.start()
        try:
            counted = memory.data_bytes()
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert counted == (EXTENTS - 1) * PAGE
    assert peak_bytes < MEMORY_BYTES_MAX


@pytest.mark.parametrize("offset", [0, 64 * PAGE])
@pytest.mark.parametrize("folder", ["tmp", "/dev/shm"])
def test_counts_what_the_extents_add_up_to(tmp_path: Path, folder: str, offset: int) -> None:
    """In files of any file system, and in parts of them."""
    path = (tmp_path if folder == "tmp" else Path(folder)) / f"count-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.truncate(9 << 20)
            for page in np.random.default_rng(3).integers(0, 9 << 8, 200).tolist():
                os.pwrite(file.fileno(), b"x" * PAGE, page * PAGE)
        with closing(FileMemory(path, offset=offset)) as memory:
            whole = memory.data_extents(start=0, length=memory.length_bytes)
            assert memory.data_bytes() == whole.total_bytes > 0
    finally:
        path.unlink()


def test_a_buffer_may_be_nonzero_anywhere() -> None:
    assert BufferMemory(bytearray(3 * PAGE)).data_bytes() == 3 * PAGE
