"""How a channel that saves looks at memory: where it lies, or in a buffer of its own.

Holes of the memory are zero without a read, and looking at one would make the host allocate it.
Memory that is mapped here is written from where it lies. That of another process, and any that
goes on changing, is copied to a buffer first: zero pages, requests and digests are those of the
very copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from uringmig.memory.source import CopiedMemory, Extents, MemorySource
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.pages.zero import nonzero_pages
from uringmig.storage.buffers import aligned_buffer
from uringmig.transfer.plan import Window


class WindowView(Struct, frozen=True):
    """A window's bytes.

    Attributes:
        memory: uint8, as long as the window; only what ``data`` says may be read.
        data: in bytes from the window's start.
    """

    memory: NDArray[np.uint8]
    data: Extents

    def page_bits(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which pages hold anything but zeros, and which may be read; one bool each."""
        count = len(self.memory) // PAGE_SIZE
        nonzero, readable = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        for start, length in zip(self.data.start.tolist(), self.data.length.tolist(), strict=True):
            pages = slice(start // PAGE_SIZE, (start + length) // PAGE_SIZE)
            nonzero[pages] = nonzero_pages(self.memory[start : start + length])
            readable[pages] = True
        return nonzero, readable

    def part(self, start: int, length: int) -> tuple[NDArray[np.uint8], list[int], list[int]]:
        """A part of the window, and start and length of what may be read in it."""
        data = self.data.clip(start=start, length=length)
        return (
            self.memory[start : start + length],
            (data.start - start).tolist(),
            data.length.tolist(),
        )


class WindowViews:
    """One channel's looks at the memory of some blocks.

    Args:
        memories: of each block.
        options: how many buffers it may have.
        buffers: the channel's, all free, from an earlier round; more are made if it takes more.
    """

    def __init__(
        self,
        memories: Sequence[MemorySource | CopiedMemory],
        options: WriteOptions,
        buffers: list[NDArray[np.uint8]],
    ) -> None:
        # Asked once: what a protocol has takes as long to find out as a window to plan.
        self._mapped = [memory if isinstance(memory, MemorySource) else None for memory in memories]
        self._copied = [memory if isinstance(memory, CopiedMemory) else None for memory in memories]
        # Should the engine fail with requests in flight, this keeps their memory mapped.
        self._views = [memory.view for memory in self._mapped if memory is not None]
        self._copies = len(self._views) < len(memories)
        # The buffer given back last is taken first: it is still in the cache.
        self._free = buffers
        while self._copies and len(buffers) < options.windows_held:
            buffers.append(aligned_buffer(WINDOW_BYTES))
        self._used: dict[Window, NDArray[np.uint8]] = {}

    @property
    def windows_max(self) -> int:
        """No limit while there is a buffer; without copies requests and bytes are bound enough."""
        return 1 << 30 if self._free or not self._copies else 0

    def look(self, window: Window, *, filled: bool) -> WindowView:
        """See the window; with ``filled`` a copy has zeros in its holes, and all may be read."""
        start, length = window.start_bytes, window.length_bytes
        memory = self._mapped[window.block_index]
        if memory is not None:
            data = memory.data_extents(start=start, length=length)
            for first, count in zip(data.start.tolist(), data.length.tolist(), strict=True):
                memory.prefault(start=first, length=count)
            return _view(memory.view[start : start + length], data, start)
        copied = self._copied[window.block_index]
        assert copied is not None, "memory is either mapped or copied"
        data = copied.data_extents(start=start, length=length)
        self._used[window] = buffer = self._free.pop()
        view = buffer[:length]
        if filled:
            view[:] = 0  # what the window before left
        copied.read(data, view, start=start)
        return _view(view, data, start)

    def let_go(self, window: Window, *, unmap: bool) -> None:
        """Let go of the window's memory: nobody looks at it any more, soon at least."""
        if (buffer := self._used.pop(window, None)) is not None:
            self._free.append(buffer)
        memory = self._mapped[window.block_index]
        if memory is not None and unmap:
            memory.map_out(start=window.start_bytes, length=window.length_bytes)


class Holes:
    """Which windows are nothing but hole, asked in their order: one question for each hole."""

    def __init__(self, memories: Sequence[MemorySource | CopiedMemory]) -> None:
        self._memories = memories
        self._block_index = -1
        self._data_from = 0  # up to here the block is known to be a hole

    def cover(self, window: Window) -> bool:
        """Whether the window lies in one."""
        start, end = window.start_bytes, window.start_bytes + window.length_bytes
        if self._block_index != window.block_index or self._data_from < start:
            self._block_index = window.block_index
            self._data_from = self._memories[window.block_index].next_data(start)
        return self._data_from >= end


def _view(memory: NDArray[np.uint8], data: Extents, start: int) -> WindowView:
    """Name the extents from the window's start on."""
    return WindowView(memory, Extents(data.start - start, data.length))
