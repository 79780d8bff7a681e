"""Buffers as guest memory: any contiguous one, where it lies, without a copy."""

from __future__ import annotations

import array
import mmap
import weakref

import numpy as np
import pytest

from uringmig.errors import StateError
from uringmig.memory.array import BufferMemory
from uringmig.memory.source import MemorySink, MemorySource

PAGE = 4096
SIZE = 8 * PAGE


def buffers() -> list[object]:
    return [
        np.zeros(SIZE, np.uint8),
        np.zeros((2, SIZE // 16), np.uint64),
        bytearray(SIZE),
        memoryview(bytearray(SIZE)),
        array.array("d", bytes(SIZE)),
        mmap.mmap(-1, SIZE),
        bytes(SIZE),
    ]


@pytest.mark.parametrize("buffer", buffers(), ids=lambda buffer: type(buffer).__name__)
def test_any_buffer_is_seen_where_it_lies(buffer: object) -> None:
    memory = BufferMemory(buffer)
    original = np.frombuffer(buffer, np.uint8)  # type: ignore[call-overload]
    assert memory.length_bytes == SIZE
    assert memory.view.shape == (SIZE,)
    assert memory.view.dtype == np.uint8
    assert memory.address == memory.view.ctypes.data == original.ctypes.data
    assert memory.view.flags.writeable == (not isinstance(buffer, bytes))


def test_a_buffer_is_a_source_and_a_sink() -> None:
    buffer = bytearray(SIZE)
    source: MemorySource = BufferMemory(buffer)
    sink: MemorySink = BufferMemory(buffer)
    sink.view[5 * PAGE] = 9
    assert source.view[5 * PAGE] == 9
    assert buffer[5 * PAGE] == 9


def test_all_of_a_buffer_is_data() -> None:
    extents = BufferMemory(bytearray(SIZE)).data_extents(start=2 * PAGE, length=3 * PAGE)
    assert (extents.start.tolist(), extents.length.tolist()) == ([2 * PAGE], [3 * PAGE])
    assert extents.total_bytes == 3 * PAGE
    assert len(BufferMemory(bytearray(SIZE)).data_extents(start=PAGE, length=0)) == 0
    assert BufferMemory(bytearray(SIZE)).next_data(2 * PAGE) == 2 * PAGE


def test_mapping_a_buffer_in_or_out_changes_nothing() -> None:
    buffer = bytearray(range(256)) * (SIZE // 256)
    memory = BufferMemory(buffer)
    memory.prefault(start=0, length=SIZE)
    memory.map_out(start=0, length=SIZE)
    assert memory.view.tobytes() == bytes(buffer) == bytes(range(256)) * (SIZE // 256)


@pytest.mark.parametrize(
    ("start", "length"),
    [(-PAGE, PAGE), (0, SIZE + PAGE), (SIZE, PAGE), (1, PAGE), (0, 100), (PAGE, -PAGE)],
)
def test_ranges_outside_are_refused(start: int, length: int) -> None:
    with pytest.raises(StateError):
        BufferMemory(bytearray(SIZE)).data_extents(start=start, length=length)


@pytest.mark.parametrize(
    "buffer",
    [
        b"",
        bytearray(100),
        bytearray(PAGE + 1),
        np.zeros((PAGE, 4), np.uint8)[:, ::2],
        np.asfortranarray(np.zeros((PAGE, 2), np.uint8)),
        np.array([object()] * (PAGE // 8)),
        "text",
        7,
    ],
    ids=["empty", "short", "odd", "strided", "fortran", "objects", "text", "number"],
)
def test_what_is_no_guest_memory_is_refused(buffer: object) -> None:
    with pytest.raises(StateError):
        BufferMemory(buffer)


def test_close_lets_go_and_may_be_called_again() -> None:
    owner = np.zeros(SIZE, np.uint8)
    alive = weakref.ref(owner)
    memory = BufferMemory(owner)
    del owner
    assert alive() is not None
    memory.close()
    memory.close()
    assert alive() is None
    with pytest.raises(StateError, match="closed"):
        memory.data_extents(start=0, length=PAGE)
    with pytest.raises(StateError, match="closed"):
        _ = memory.address
