"""What a save does with one window: find its zero pages, plan its writes, digest it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import StateError
from uringmig.format.layout import BlockLayout, ImageLayout
from uringmig.image import digest, pieces
from uringmig.image.window import Rewritten, WindowPages, settle_window
from uringmig.image.windowview import Holes, WindowView, WindowViews
from uringmig.memory.source import CopiedMemory, MemorySource
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.pages import bitmap
from uringmig.progress import ChannelCounters
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window, plan_runs
from uringmig.units import div_ceil

_WINDOW_PAGES: Final = WINDOW_BYTES // PAGE_SIZE


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

    def select(self, page_index: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Have the next round write these pages only.

        Returns:
            First page and number of pages of each window that they lie in.

        Raises:
            StateError: these are no pages of the block.
        """
        index, count = np.asarray(page_index), self.layout.page_count
        if index.size and (index.ndim != 1 or index.dtype.kind not in "iu"):
            raise StateError(f"page_index is {index.ndim}-D {index.dtype}, not 1-D integers")
        pages = np.unique(index.astype(np.int64))
        if pages.size and not 0 <= int(pages[0]) <= int(pages[-1]) < count:
            raise StateError(f"ramblock {self.layout.idstr!r} has {count} pages, from 0")
        bits = np.zeros(count, np.bool_)
        bits[pages] = True
        self.selected = np.zeros_like(self.bitmap)
        bitmap.store(self.selected, first_page=0, bits=bits)
        firsts = np.unique(pages // _WINDOW_PAGES) * _WINDOW_PAGES
        return [(first, min(_WINDOW_PAGES, count - first)) for first in firsts.tolist()]

    def plan_pages(
        self, window: Window, pages: WindowPages, memory: NDArray[np.uint8], options: WriteOptions
    ) -> IoPlan:
        """Store a window's bits, and plan the writes of its pages.

        Args:
            window: of this block.
            pages: what is to become of it.
            memory: the window's, where it is written from.
            options: how to write.
        """
        bitmap.store(self.bitmap, first_page=window.first_page, bits=pages.bits)
        return plan_runs(
            pages.runs(options.bridge),
            address=memory.ctypes.data,
            file_offset=self.layout.pages_offset + window.start_bytes,
            block_size=options.block_size,
        )

    def put_digest(self, start: int, value: bytes) -> None:
        """Keep the digest of the memory from ``start`` on, a multiple of `WINDOW_BYTES`."""
        self.digests[start // WINDOW_BYTES] = np.frombuffer(value, np.uint8)

    def put_pieces(self, start: int, found: NDArray[np.uint8]) -> None:
        """Keep the digests of the pieces of the memory from ``start`` on, likewise."""
        self.pieces_of(start)[:] = found

    def put_digests(self, start: int, whole: bytes, found: NDArray[np.uint8]) -> None:
        """Keep both."""
        self.put_digest(start, whole)
        self.put_pieces(start, found)

    def pieces_of(self, start: int) -> NDArray[np.uint8]:
        """The digests of the pieces of the window that begins at ``start``; a view."""
        first = start // digest.PIECE_BYTES
        return self.pieces[first : first + pieces.ROW_PIECES]


def lay_out(
    blocks: Sequence[tuple[str, MemorySource | CopiedMemory, bool | None]],
    dense_up_to: int,
    plan: Callable[[list[tuple[str, int]]], ImageLayout],
) -> tuple[list[SavedBlock], ImageLayout]:
    """Place blocks in an image.

    Args:
        blocks: idstr, memory, and whether it is dense; None decides by its size.
        dense_up_to: so many bytes at most are written whole.
        plan: given idstr and length of each, says where they lie.

    Raises:
        StateError: there is none.
    """
    if not blocks:
        raise StateError("an image needs at least one ramblock")
    layout = plan([(idstr, memory.length_bytes) for idstr, memory, _ in blocks])
    saved = [
        SavedBlock(place, memory, place.used_length <= dense_up_to if dense is None else dense)
        for (_, memory, dense), place in zip(blocks, layout.blocks, strict=True)
    ]
    return saved, layout


class SaveWork:
    """One channel's side of a save; windows of different channels never share a bitmap byte.

    Args:
        blocks: of the image.
        options: how to write.
        counters: the channel's.
        views: how this channel looks at memory.
        live: there will be a second look, which asks for the digests of pieces.
    """

    def __init__(
        self,
        blocks: list[SavedBlock],
        options: WriteOptions,
        counters: ChannelCounters,
        views: WindowViews,
        *,
        live: bool = False,
    ) -> None:
        self._blocks = blocks
        self._options = options
        self._counters = counters
        self._views = views
        self._live = live
        self._look: WindowView | None = None

    @property
    def windows_max(self) -> int:
        """As many as there are buffers."""
        return self._views.windows_max

    def plan(self, window: Window) -> IoPlan:
        """Scan the window, store its bits, and plan the writes of its data."""
        block = self._blocks[window.block_index]
        look = self._look = self._views.look(window, filled=block.dense)
        nonzero, readable = look.page_bits()
        later = self._later(block, window)
        pages = settle_window(
            nonzero, readable, dense=block.dense, fresh=later is None, later=later
        )
        considered = window.page_count
        if later is not None:
            considered = int(np.count_nonzero(later.selected))
        self._counters.zero_bytes += PAGE_SIZE * (considered - int(np.count_nonzero(pages.stored)))
        return block.plan_pages(window, pages, look.memory, self._options)

    def submitted(self, window: Window) -> None:
        """Digest the window while the device has work."""
        if not (self._options.manifest or self._live):
            return
        block, look = self._blocks[window.block_index], self._look
        assert look is not None, "submitted() follows plan()"
        for start, length in _rows(window):
            memory, first, count = look.part(start - window.start_bytes, length)
            if self._options.manifest:
                block.put_digests(start, *digest.piecewise_digest(memory, first, count))
            else:
                block.put_pieces(start, digest.piece_digests(memory, first, count))

    def finished(self, window: Window) -> None:
        """Its pages are where they belong."""
        # Unmapped now, while the device works for other windows, and not at the end of the save.
        self._views.let_go(window, unmap=True)

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
    holes = Holes([block.memory for block in blocks])
    for window in windows:
        block = blocks[window.block_index]
        if block.dense or not holes.cover(window):
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
