"""Layout, memory and wanted pages to I/O requests: split, bridged, dealt.  Pure.

Nothing here has a default value: `options` has them all, so that each is said once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from uringmig.options import PAGE_SIZE, SPAN_BYTES, WINDOW_BYTES, TransferOptions
from uringmig.pages.runs import PageRuns, bits_from_runs, runs_from_bits
from uringmig.storage.requests import IoPlan
from uringmig.units import align_down, div_ceil

#: Turns a channel should have at least.
_SPANS_PER_CHANNEL: Final = 4


class Window(Struct, frozen=True):
    """A piece of one block that a channel handles at a time."""

    block_index: int
    first_page: int
    page_count: int

    @property
    def start_bytes(self) -> int:
        """Offset of the window in its block."""
        return self.first_page * PAGE_SIZE

    @property
    def length_bytes(self) -> int:
        """Length of the window."""
        return self.page_count * PAGE_SIZE


def windows_of(page_counts: Sequence[int], *, window_pages: int) -> list[Window]:
    """Deal blocks of ``page_counts`` pages into windows, in block and page order."""
    return [
        Window(block_index, first, min(window_pages, page_count - first))
        for block_index, page_count in enumerate(page_counts)
        for first in range(0, page_count, window_pages)
    ]


def span_pages(page_count: int, options: TransferOptions) -> int:
    """Say how many pages a channel is to take at a time, of a guest of ``page_count`` pages.

    Normally `SPAN_BYTES`. Fewer in three cases: where it is more than may be in flight, the device
    would run dry while a channel looks at the next span; with fewer than `_SPANS_PER_CHANNEL` turns
    each, channels would not end together; under a rate limit one span would take long. Always whole
    windows.
    """
    window_pages = WINDOW_BYTES // PAGE_SIZE
    if options.rate:
        return window_pages
    in_flight = options.channels * options.depth * options.block_size
    fair = page_count // (options.channels * _SPANS_PER_CHANNEL)
    span = min(SPAN_BYTES // PAGE_SIZE, in_flight // PAGE_SIZE, fair)
    return max(align_down(span, window_pages), window_pages)


def spans_of(
    page_counts: Sequence[int], options: TransferOptions, *, copied: Collection[int] = ()
) -> list[Window]:
    """Deal blocks of ``page_counts`` pages into what a channel takes at a time, in their order.

    Args:
        page_counts: of each block.
        options: those of the transfer.
        copied: numbers of the blocks that go through buffers of one window.
    """
    span = span_pages(sum(page_counts), options)
    return [
        Window(block_index, first, min(size, page_count - first))
        for block_index, page_count in enumerate(page_counts)
        for size in [WINDOW_BYTES // PAGE_SIZE if block_index in copied else span]
        for first in range(0, page_count, size)
    ]


def bridge_gaps(
    wanted: NDArray[np.bool_], *, bridgeable: NDArray[np.bool_], gap_pages: int
) -> NDArray[np.bool_]:
    """Add the pages of short gaps, so that one request goes through instead of two.

    Args:
        wanted: pages to move, one bool each.
        bridgeable: pages that may be moved along; a gap with another page in it stays a gap.
        gap_pages: gaps of fewer pages are bridged.

    Returns:
        ``wanted`` and the bridged pages; the same array if there is nothing to bridge.
    """
    if gap_pages <= 1 or wanted.all():
        return wanted
    gaps = runs_from_bits(bridgeable & ~wanted)
    first, end = gaps.first_page, gaps.first_page + gaps.page_count
    # A gap at an edge has nothing to bridge to; one beside an unbridgeable page is longer than it
    # looks.
    inner = (first > 0) & (end < len(wanted)) & (gaps.page_count < gap_pages)
    first, end = first[inner], end[inner]
    joins = wanted[first - 1] & wanted[end]
    if not joins.any():
        return wanted
    bridged = PageRuns(first_page=first[joins], page_count=(end - first)[joins])
    return wanted | bits_from_runs(bridged, page_count=len(wanted))


def plan_runs(runs: PageRuns, *, address: int, file_offset: int, block_size: int) -> IoPlan:
    """Turn runs of pages into requests of at most ``block_size`` bytes.

    Args:
        runs: pages to move.
        address: where page 0 of the runs lies in memory.
        file_offset: where page 0 of the runs lies in the file.
        block_size: in bytes, a multiple of the page size.
    """
    start, length = runs.first_page * PAGE_SIZE, runs.page_count * PAGE_SIZE
    if length.size and int(length.max()) > block_size:
        pieces = -(-length // block_size)
        run = np.repeat(np.arange(len(length)), pieces)
        piece = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = start[run] + piece * block_size
        length = np.minimum(block_size, length[run] - piece * block_size)
    return IoPlan(address=start + address, length=length, file_offset=start + file_offset)


def gap_pages(bridge_bytes: int) -> int:
    """Pages of the shortest gap that is not bridged, for a bound in bytes."""
    return div_ceil(bridge_bytes, PAGE_SIZE)
