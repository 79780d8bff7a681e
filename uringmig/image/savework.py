"""What a save does with one window: find its zero pages, plan its writes, digest it.

Holes of the memory are zero without a read, and are never bridged: looking at one would make the
host allocate it. Memory that is mapped here is written from where it lies; that of another process
is copied to a buffer first, and zero pages, requests and digest are those of the very copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from uringmig.format.layout import BlockLayout
from uringmig.image import digest, pieces
from uringmig.image.window import Rewritten, settle_window
from uringmig.memory.source import CopiedMemory, Extents, MemorySource
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.pages import bitmap
from uringmig.pages.zero import nonzero_pages
from uringmig.progress import ChannelCounters
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window, plan_runs
from uringmig.units import div_ceil


@dataclass(slots=True)
class SavedBlock:
    """One block of an image being written.

    Attributes:
        layout: where it lies in the file.
        memory: where its bytes come from.
        dense: every page is written and every bit set, zero or not.
        bitmap: packed, as on disk; a bit is set when the page's write has been planned.
        digests: uint8, (rows, 16), of each `WINDOW_BYTES` of the memory as last scanned.
        pieces: as `pieces.no_digests`, of each piece of the memory as last scanned.
        selected: pages of this round, packed; None is all of them.
    """

    layout: BlockLayout
    memory: MemorySource | CopiedMemory
    dense: bool
    bitmap: NDArray[np.uint8] = field(init=False)
    digests: NDArray[np.uint8] = field(init=False)
    pieces: NDArray[np.uint8] = field(init=False)
    selected: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        self.bitmap = np.zeros(self.layout.bitmap_bytes, np.uint8)
        rows = div_ceil(self.layout.used_length, WINDOW_BYTES)
        self.digests = np.zeros((rows, digest.DIGEST_BYTES), np.uint8)
        self.pieces = pieces.no_digests(self.layout.used_length)

    def put_digest(self, start: int, value: bytes) -> None:
        """Keep the digest of the memory from ``start`` on, a multiple of `WINDOW_BYTES`."""
        self.digests[start // WINDOW_BYTES] = np.frombuffer(value, np.uint8)

    def put_digests(self, start: int, memory: NDArray[np.uint8], data: Extents) -> None:
        """Digest the memory from ``start`` on, a multiple of `WINDOW_BYTES`, and its pieces.

        Args:
            start: in bytes of the block.
            memory: as it was written; at most a window.
            data: what of the block may be read there.
        """
        whole, found = digest.piecewise_digest(
            memory, (data.start - start).tolist(), data.length.tolist()
        )
        self.put_digest(start, whole)
        first = start // digest.PIECE_BYTES
        self.pieces[first : first + len(found)] = found


class SaveWork:
    """One channel's side of a save; windows of different channels never share a bitmap byte."""

    def __init__(
        self, blocks: list[SavedBlock], options: WriteOptions, counters: ChannelCounters
    ) -> None:
        self._blocks = blocks
        self._options = options
        self._counters = counters
        self._data: Extents | None = None
        self._view: NDArray[np.uint8] | None = None
        # Asked once: what a protocol has takes as long to find out as a window to plan.
        memories = [block.memory for block in blocks]
        self._mapped = [memory if isinstance(memory, MemorySource) else None for memory in memories]
        self._copied = [memory if isinstance(memory, CopiedMemory) else None for memory in memories]
        # Should the engine fail with requests in flight, this keeps their memory mapped.
        self._views = [memory.view for memory in self._mapped if memory is not None]
        self._copies = len(self._views) < len(blocks)
        # The buffer given back last is taken first: it is still in the cache. (Of huge pages they
        # were no faster: a request's pages are looked up one by one all the same.)
        count = options.windows_held if self._copies else 0
        self._free = [aligned_buffer(WINDOW_BYTES) for _ in range(count)]
        self._used: dict[Window, NDArray[np.uint8]] = {}

    @property
    def windows_max(self) -> int:
        """No limit while there is a buffer; without copies requests and bytes are bound enough."""
        return 1 << 30 if self._free or not self._copies else 0

    def plan(self, window: Window) -> IoPlan:
        """Scan the window, store its bits, and plan the writes of its data."""
        block = self._blocks[window.block_index]
        data = self._data = block.memory.data_extents(
            start=window.start_bytes, length=window.length_bytes
        )
        view = self._view = self._seen(block, window, data)
        nonzero = np.zeros(window.page_count, np.bool_)
        readable = np.zeros(window.page_count, np.bool_)
        starts = (data.start - window.start_bytes).tolist()
        for start, length in zip(starts, data.length.tolist(), strict=True):
            piece = slice(start // PAGE_SIZE, (start + length) // PAGE_SIZE)
            nonzero[piece] = nonzero_pages(view[start : start + length])
            readable[piece] = True
        later = self._later(block, window)
        pages = settle_window(
            nonzero, readable, dense=block.dense, fresh=later is None, later=later
        )
        bitmap.store(block.bitmap, first_page=window.first_page, bits=pages.bits)
        considered = window.page_count
        if later is not None:
            considered = int(np.count_nonzero(later.selected))
        self._counters.zero_bytes += PAGE_SIZE * (considered - int(np.count_nonzero(pages.stored)))
        return plan_runs(
            pages.runs(self._options.bridge),
            address=view.ctypes.data,
            file_offset=block.layout.pages_offset + window.start_bytes,
            block_size=self._options.block_size,
        )

    def submitted(self, window: Window) -> None:
        """Digest the window while the device has work."""
        if not self._options.manifest:
            return
        block, data, view = self._blocks[window.block_index], self._data, self._view
        assert data is not None, "submitted() follows plan()"
        assert view is not None, "submitted() follows plan()"
        for start, length in _rows(window):
            part = data.clip(start=start, length=length)
            at = start - window.start_bytes
            block.put_digests(start, view[at : at + length], part)

    def finished(self, window: Window) -> None:
        """Let go of the window's memory: its pages are where they belong."""
        if (buffer := self._used.pop(window, None)) is not None:
            self._free.append(buffer)
        memory = self._mapped[window.block_index]
        if memory is not None:
            # Now, while the device works for other windows, and not at the end of the save.
            memory.map_out(start=window.start_bytes, length=window.length_bytes)

    def _seen(self, block: SavedBlock, window: Window, data: Extents) -> NDArray[np.uint8]:
        """The window's bytes: where they lie, or as they were copied; only ``data`` of them."""
        start, memory = window.start_bytes, self._mapped[window.block_index]
        if memory is not None:
            for first, length in zip(data.start.tolist(), data.length.tolist(), strict=True):
                memory.prefault(start=first, length=length)
            return memory.view[start : start + window.length_bytes]
        self._used[window] = buffer = self._free.pop()
        view = buffer[: window.length_bytes]
        if block.dense:
            view[:] = 0  # its holes are written too, and hold what the window before left
        copied = self._copied[window.block_index]
        assert copied is not None, "memory is either mapped or copied"
        copied.read(data, view, start=start)
        return view

    def _later(self, block: SavedBlock, window: Window) -> Rewritten | None:
        """The pages of a later round; None in the first."""
        if block.selected is None:
            return None
        first, count = window.first_page, window.page_count
        return Rewritten(
            selected=bitmap.unpack(block.selected, first_page=first, page_count=count),
            bits=bitmap.unpack(block.bitmap, first_page=first, page_count=count),
        )


def skip_holes(
    blocks: Sequence[SavedBlock], windows: Sequence[Window], counters: ChannelCounters
) -> list[Window]:
    """Settle the windows of a first round that are nothing but hole; give back the others.

    One question for each hole instead of a window's whole way through a channel: an idle guest is
    mostly holes. Dense blocks keep all their windows, since their bits are to be set.
    """
    kept = []
    data_from = (-1, 0)  # block, and the offset up to which it is known to be a hole
    for window in windows:
        block = blocks[window.block_index]
        start, end = window.start_bytes, window.start_bytes + window.length_bytes
        if block.dense:
            kept.append(window)
            continue
        if data_from[0] != window.block_index or data_from[1] < start:
            data_from = (window.block_index, block.memory.next_data(start))
        if data_from[1] < end:
            kept.append(window)
            continue
        counters.scanned_bytes += window.length_bytes
        counters.zero_bytes += window.length_bytes
        counters.finished_bytes += window.length_bytes
        for row, length in _rows(window):
            block.put_digest(row, digest.zero_digest(length))
    return kept


def _rows(window: Window) -> Iterator[tuple[int, int]]:
    """Start, in its block, and length of each piece of a window that has a digest of its own."""
    end = window.start_bytes + window.length_bytes
    for start in range(window.start_bytes, end, WINDOW_BYTES):
        yield start, min(WINDOW_BYTES, end - start)
