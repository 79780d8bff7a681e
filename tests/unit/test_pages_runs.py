"""Runs of pages against sets of page numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import Pairs, page_bits, run_pairs

from uringmig.pages.runs import PageRuns, bits_from_runs, runs_from_bits


def make_runs(pairs: Pairs) -> PageRuns:
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return PageRuns(table[:, 0].copy(), table[:, 1].copy())


def pages_of(runs: PageRuns) -> set[int]:
    return {
        page
        for first, count in zip(runs.first_page.tolist(), runs.page_count.tolist(), strict=True)
        for page in range(first, first + count)
    }


def pairs_of(runs: PageRuns) -> Pairs:
    return list(zip(runs.first_page.tolist(), runs.page_count.tolist(), strict=True))


def slow_runs(pages: set[int]) -> Pairs:
    """Walk the pages in order; begin a new run wherever one is missing."""
    pairs: Pairs = []
    for page in sorted(pages):
        if pairs and sum(pairs[-1]) == page:
            pairs[-1] = (pairs[-1][0], pairs[-1][1] + 1)
        else:
            pairs.append((page, 1))
    return pairs


@given(page_bits())
def test_from_bits(bits: NDArray[np.bool_]) -> None:
    runs = runs_from_bits(bits)
    assert pairs_of(runs) == slow_runs({page for page, bit in enumerate(bits.tolist()) if bit})
    assert len(runs) == len(runs.first_page)


@given(page_bits())
def test_bits_round_trip(bits: NDArray[np.bool_]) -> None:
    back = bits_from_runs(runs_from_bits(bits), page_count=len(bits))
    assert back.dtype == np.bool_
    assert back.tolist() == bits.tolist()
    # A bool with another byte than 0 or 1 behind it compares well and packs badly.
    assert set(back.view(np.uint8).tolist()) <= {0, 1}


@given(run_pairs(), st.integers(0, 300))
def test_to_bits(pairs: Pairs, spare: int) -> None:
    runs = make_runs(pairs)
    page_count = max(pages_of(runs), default=-1) + 1 + spare
    bits = bits_from_runs(runs, page_count=page_count)
    assert len(bits) == page_count
    assert set(np.flatnonzero(bits).tolist()) == pages_of(runs)


def test_to_bits_refuses_a_run_past_the_end() -> None:
    with pytest.raises(AssertionError):
        bits_from_runs(make_runs([(6, 4)]), page_count=9)


@pytest.mark.parametrize(
    ("first_page", "page_count"),
    [
        ([0, 1], [1, 1]),
        ([0, 3], [5, 1]),
        ([4, 0], [1, 1]),
        ([0], [0]),
        ([0], [-1]),
        ([-1], [1]),
        ([0, 5], [1]),
    ],
    ids=["touching", "overlapping", "unsorted", "empty run", "negative", "below 0", "lengths"],
)
def test_broken_invariants_are_refused(first_page: list[int], page_count: list[int]) -> None:
    with pytest.raises(AssertionError):
        PageRuns(np.array(first_page, np.int64), np.array(page_count, np.int64))


def test_other_integer_types_are_refused() -> None:
    with pytest.raises(AssertionError):
        PageRuns(np.array([0], np.int64), np.array([1], np.int32))


def test_runs_cannot_be_changed() -> None:
    runs = make_runs([(1, 2)])
    with pytest.raises(ValueError, match="read-only"):
        runs.first_page[0] = 5
    assert runs != make_runs([(1, 3)])
    assert runs == make_runs([(1, 2)])
