"""Runs of adjacent pages: what a bitmap says, in the form that requests are made of.

Rules: a `PageRuns` is sorted, and between two runs lies at least one page, so it is the one and
only way to write down a set of pages. Every function here keeps that and returns a new value. No
loop over pages or runs; the cost is that of a few numpy calls over the runs of a window.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


class PageRuns(Struct, frozen=True, eq=False):
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

    The temporaries are of the size of the result.
    """
    assert not len(runs) or runs.end_page[-1] <= page_count, (runs.end_page[-1], page_count)
    step = np.zeros(page_count + 1, np.int8)
    # Runs never touch, so no page is both a beginning and an end and nothing is overwritten.
    step[runs.first_page] = 1
    step[runs.end_page] = -1
    return np.cumsum(step[:-1], dtype=np.int8).view(np.bool_)
