"""How long the runs of set pages of a bitmap are: fragmented and dense guests told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.pages import bitmap
from uringmig.pages.runs import runs_from_bits

#: Pages looked at in one step: 8 MiB of bools, whatever the size of the block.
_STEP_PAGES: Final = 1 << 23


@dataclass(frozen=True, slots=True)
class RunLengths:
    """Runs of set pages: how many, and their lengths in pages; 0 where there is none."""

    runs: int
    median_pages: int
    longest_pages: int


def run_lengths(
    packed: NDArray[np.uint8], *, page_count: int, step_pages: int = _STEP_PAGES
) -> RunLengths:
    """Summarise a bitmap step by step, so that memory stays small.

    Args:
        packed: uint8, little bit order.
        page_count: pages of the block.
        step_pages: pages looked at in one step, a multiple of 8.
    """
    counts: dict[int, int] = {}
    open_pages = 0  # of a run that reaches up to the present step
    for first in range(0, page_count, step_pages):
        count = min(step_pages, page_count - first)
        part = packed[first // 8 : (first + count + 7) // 8]
        if not part.any():
            _count(counts, open_pages)
            open_pages = 0
            continue
        runs = runs_from_bits(bitmap.unpack(part, first_page=0, page_count=count))
        lengths = runs.page_count.copy()
        if runs.first_page[0] == 0:
            lengths[0] += open_pages
        else:
            _count(counts, open_pages)
        open_pages = 0
        if runs.end_page[-1] == count:
            open_pages = int(lengths[-1])
            lengths = lengths[:-1]
        for length, times in zip(*np.unique(lengths, return_counts=True), strict=True):
            _count(counts, int(length), int(times))
    _count(counts, open_pages)
    return _summary(counts)


def _count(counts: dict[int, int], length: int, times: int = 1) -> None:
    """Add runs of one length; 0 pages are no run."""
    if length:
        counts[length] = counts.get(length, 0) + times


def _summary(counts: dict[int, int]) -> RunLengths:
    """Count, lower median and maximum of a histogram."""
    if not counts:
        return RunLengths(0, 0, 0)
    lengths = np.array(sorted(counts), np.int64)
    below = np.cumsum([counts[int(length)] for length in lengths])
    total = int(below[-1])
    median = lengths[np.searchsorted(below, (total + 1) // 2)]
    return RunLengths(total, int(median), int(lengths[-1]))
