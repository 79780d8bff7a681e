"""Runs of pages against sets of page numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import Pairs, page_bits, run_pairs

from uringmig.pages.runs import (
    PageRuns,
    bits_from_runs,
    bridge,
    clip,
    complement,
    runs_from_bits,
    runs_from_index,
    shift,
    union,
)


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
    assert runs.total_pages == int(bits.sum())
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


@given(st.lists(st.integers(0, 300), max_size=80))
def test_from_index(pages: list[int]) -> None:
    """Any order, any number of times."""
    assert pairs_of(runs_from_index(np.array(pages, np.int64))) == slow_runs(set(pages))


def test_from_index_of_other_integer_types() -> None:
    assert pairs_of(runs_from_index(np.array([5, 4, 9], np.uint32))) == [(4, 2), (9, 1)]


@given(run_pairs(), st.integers(0, 15))
def test_bridge(pairs: Pairs, gap_pages: int) -> None:
    expected: Pairs = []
    for first, count in pairs:
        if expected and first - sum(expected[-1]) < gap_pages:
            expected[-1] = (expected[-1][0], first + count - expected[-1][0])
        else:
            expected.append((first, count))
    assert pairs_of(bridge(make_runs(pairs), gap_pages=gap_pages)) == expected


@pytest.mark.parametrize(
    ("gap_pages", "expected"),
    [
        (0, [(0, 1), (2, 1), (6, 2), (12, 1)]),
        (1, [(0, 1), (2, 1), (6, 2), (12, 1)]),
        (2, [(0, 3), (6, 2), (12, 1)]),
        (3, [(0, 3), (6, 2), (12, 1)]),
        (4, [(0, 8), (12, 1)]),
        (5, [(0, 13)]),
    ],
)
def test_bridge_by_hand(gap_pages: int, expected: Pairs) -> None:
    """A gap equal to the limit still splits; one page less does not."""
    runs = make_runs([(0, 1), (2, 1), (6, 2), (12, 1)])
    assert pairs_of(bridge(runs, gap_pages=gap_pages)) == expected


@given(run_pairs(), st.integers(0, 300), st.integers(0, 300))
def test_clip(pairs: Pairs, first_page: int, page_count: int) -> None:
    runs = make_runs(pairs)
    clipped = clip(runs, first_page=first_page, page_count=page_count)
    wanted = set(range(first_page, first_page + page_count))
    assert pairs_of(clipped) == slow_runs(pages_of(runs) & wanted)


@pytest.mark.parametrize(
    ("first_page", "page_count", "expected"),
    [
        (0, 4, []),
        (0, 5, [(4, 1)]),
        (3, 2, [(4, 1)]),
        (5, 1, [(5, 1)]),
        (7, 2, [(7, 1)]),
        (8, 1, []),
        (8, 3, [(10, 1)]),
        (11, 9, []),
    ],
)
def test_clip_at_the_edges(first_page: int, page_count: int, expected: Pairs) -> None:
    runs = make_runs([(4, 4), (10, 1)])
    assert pairs_of(clip(runs, first_page=first_page, page_count=page_count)) == expected


def test_nothing_of_a_run_is_no_run() -> None:
    runs = make_runs([(0, 10)])
    assert pairs_of(clip(runs, first_page=5, page_count=0)) == []
    assert pairs_of(complement(runs, first_page=5, page_count=0)) == []
    assert pairs_of(complement(make_runs([]), first_page=5, page_count=0)) == []


@given(run_pairs(), st.integers(0, 1 << 40))
def test_shift_there_and_back(pairs: Pairs, by: int) -> None:
    runs = make_runs(pairs)
    moved = shift(runs, by=by)
    assert pairs_of(moved) == [(first + by, count) for first, count in pairs]
    assert shift(moved, by=-by) == runs


def test_shift_below_page_0_is_refused() -> None:
    with pytest.raises(AssertionError):
        shift(make_runs([(3, 1)]), by=-4)


@given(run_pairs(), run_pairs())
def test_union(one: Pairs, other: Pairs) -> None:
    both = union(make_runs(one), make_runs(other))
    assert pairs_of(both) == slow_runs(pages_of(make_runs(one)) | pages_of(make_runs(other)))


def test_union_of_a_long_run_that_covers_later_ones() -> None:
    both = union(make_runs([(0, 100)]), make_runs([(2, 1), (50, 10), (100, 1), (102, 1)]))
    assert pairs_of(both) == [(0, 101), (102, 1)]


@given(run_pairs(), st.integers(0, 300), st.integers(0, 300))
def test_complement(pairs: Pairs, first_page: int, page_count: int) -> None:
    runs = make_runs(pairs)
    rest = complement(runs, first_page=first_page, page_count=page_count)
    wanted = set(range(first_page, first_page + page_count))
    assert pairs_of(rest) == slow_runs(wanted - pages_of(runs))


def test_numbers_beyond_32_bits() -> None:
    """A guest of 16 TiB has 2**32 pages; nothing may wrap on the way."""
    far = 1 << 33
    runs = runs_from_index(np.array([far + 1, far, far + 3], np.int64))
    assert pairs_of(bridge(runs, gap_pages=2)) == [(far, 4)]
    assert pairs_of(clip(runs, first_page=far + 1, page_count=3)) == [(far + 1, 1), (far + 3, 1)]


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
