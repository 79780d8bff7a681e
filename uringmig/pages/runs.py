"""Runs of adjacent pages: what a bitmap says, in the form that requests are made of.

Rules: a `PageRuns` is sorted, and between two runs lies at least one page, so it is the one and
only way to write down a set of pages. Every function here keeps that and returns a new value. No
loop over pages or runs; the cost is that of a few numpy calls over the runs of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PageRuns:
    """A set of pages as maximal runs; the arrays are 1-D int64, made read-only.

    Attributes:
        first_page: first page index of each run, >= 0, ascending.
        page_count: pages in each run, > 0; a run ends before the page at which the next begins.
    """

    first_page: Int64Array
    page_count: Int64Array

    def __post_init__(self) -> None:
        """Assert the invariants and freeze the arrays."""
        first_page, page_count = self.first_page, self.page_count
        assert first_page.ndim == 1, first_page.shape
        assert first_page.shape == page_count.shape, (first_page.shape, page_count.shape)
        assert first_page.dtype == np.int64, first_page.dtype
        assert page_count.dtype == np.int64, page_count.dtype
        if len(first_page):
            assert first_page[0] >= 0, first_page[0]
            assert page_count.min() > 0, page_count.min()
            end_page = first_page + page_count
            assert (first_page[1:] > end_page[:-1]).all(), "runs overlap, touch or are unsorted"
        first_page.flags.writeable = False
        page_count.flags.writeable = False

    def __len__(self) -> int:
        return len(self.first_page)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageRuns):
            return NotImplemented
        return np.array_equal(self.first_page, other.first_page) and np.array_equal(
            self.page_count, other.page_count
        )

    __hash__ = None  # type: ignore[assignment]  # equal by the contents of arrays

    @property
    def end_page(self) -> Int64Array:
        """The page after the last one of each run, a new array."""
        return self.first_page + self.page_count

    @property
    def total_pages(self) -> int:
        """Pages in all runs together."""
        return int(self.page_count.sum())


def runs_from_bits(bits: NDArray[np.bool_]) -> PageRuns:
    """Turn one bool a page into runs of the True ones; page 0 is ``bits[0]``."""
    assert bits.ndim == 1, bits.shape
    assert bits.dtype == np.bool_, bits.dtype
    padded = np.zeros(len(bits) + 2, np.bool_)
    padded[1:-1] = bits
    edges = np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int64, copy=False)
    first_page, end_page = edges[0::2], edges[1::2]
    return PageRuns(first_page, end_page - first_page)


def bits_from_runs(runs: PageRuns, *, page_count: int) -> NDArray[np.bool_]:
    """Turn runs into one bool a page, for pages ``0 .. page_count - 1``; a new array.

    The temporaries are of the size of the result: clip and shift to a window first.
    """
    assert not len(runs) or runs.end_page[-1] <= page_count, (runs.end_page[-1], page_count)
    step = np.zeros(page_count + 1, np.int8)
    # Runs never touch, so no page is both a beginning and an end and nothing is overwritten.
    step[runs.first_page] = 1
    step[runs.end_page] = -1
    return np.cumsum(step[:-1], dtype=np.int8).view(np.bool_)


def runs_from_index(page_index: NDArray[np.integer]) -> PageRuns:
    """Turn page numbers, in any order and with duplicates, into runs."""
    assert page_index.ndim == 1, page_index.shape
    pages = np.unique(page_index).astype(np.int64, copy=False)
    return _merge(pages, pages + 1, gap_pages=1)


def bridge(runs: PageRuns, *, gap_pages: int) -> PageRuns:
    """Merge neighbours whose gap is shorter than ``gap_pages``; with 0 or 1 nothing changes."""
    if gap_pages <= 1 or len(runs) <= 1:
        return runs
    return _merge(runs.first_page, runs.end_page, gap_pages=gap_pages)


def clip(runs: PageRuns, *, first_page: int, page_count: int) -> PageRuns:
    """Keep what lies in ``page_count`` pages from ``first_page`` on; page numbers stay the same."""
    assert page_count >= 0, page_count
    if page_count == 0:
        # A run around an empty range would be cut down to no pages, and there is no such run.
        return runs_from_bits(np.zeros(0, np.bool_))
    limit_page = first_page + page_count
    end_page = runs.end_page
    low = int(np.searchsorted(end_page, first_page, side="right"))
    high = int(np.searchsorted(runs.first_page, limit_page, side="left"))
    clipped_first = np.maximum(runs.first_page[low:high], first_page)
    clipped_end = np.minimum(end_page[low:high], limit_page)
    return PageRuns(clipped_first, clipped_end - clipped_first)


def shift(runs: PageRuns, *, by: int) -> PageRuns:
    """Add ``by`` (may be negative) to every page number; no page may fall below 0."""
    return PageRuns(runs.first_page + by, runs.page_count)


def union(one: PageRuns, other: PageRuns) -> PageRuns:
    """Join two sets of pages."""
    first_page = np.concatenate([one.first_page, other.first_page])
    end_page = np.concatenate([one.end_page, other.end_page])
    order = np.argsort(first_page, kind="stable")
    # A run may reach past the end of one that begins after it: what counts is the furthest end.
    return _merge(first_page[order], np.maximum.accumulate(end_page[order]), gap_pages=1)


def complement(runs: PageRuns, *, first_page: int, page_count: int) -> PageRuns:
    """Give the pages that are not in ``runs``, of ``page_count`` pages from ``first_page`` on."""
    inside = clip(runs, first_page=first_page, page_count=page_count)
    starts = np.concatenate([np.array([first_page], np.int64), inside.end_page])
    ends = np.concatenate([inside.first_page, np.array([first_page + page_count], np.int64)])
    kept = starts < ends
    return PageRuns(starts[kept], (ends - starts)[kept])


def _merge(first_page: Int64Array, end_page: Int64Array, *, gap_pages: int) -> PageRuns:
    """Join neighbours less than gap_pages apart; both arrays ascend, and may overlap."""
    if not len(first_page):
        return PageRuns(first_page, end_page)
    splits = np.flatnonzero(first_page[1:] - end_page[:-1] >= gap_pages)
    starts = np.empty(len(splits) + 1, np.int64)
    starts[0] = first_page[0]
    starts[1:] = first_page[splits + 1]
    ends = np.empty(len(splits) + 1, np.int64)
    ends[:-1] = end_page[splits]
    ends[-1] = end_page[-1]
    return PageRuns(starts, ends - starts)
