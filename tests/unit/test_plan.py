"""Plan: dealing, bridging and splitting, against a loop over pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import page_bits

from uringmig.options import WriteOptions
from uringmig.pages.runs import PageRuns, runs_from_bits
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window, bridge_gaps, gap_pages, plan_runs, span_pages, windows_of
from uringmig.units import KiB, MiB

PAGE = 4096

BLOCK_SIZES = st.sampled_from([PAGE, 2 * PAGE, 3 * PAGE, 16 * PAGE, 256 * PAGE])


def bits_of(text: str) -> NDArray[np.bool_]:
    """``#`` is True."""
    return np.array([letter == "#" for letter in text], np.bool_)


def text_of(bits: NDArray[np.bool_]) -> str:
    return "".join("#" if bit else "." for bit in bits.tolist())


def requests_of(plan: IoPlan) -> list[tuple[int, int, int]]:
    return list(
        zip(plan.address.tolist(), plan.file_offset.tolist(), plan.length.tolist(), strict=True)
    )


def bridged_by_hand(wanted: list[bool], bridgeable: list[bool], gap: int) -> list[bool]:
    """Page by page: a gap between two wanted pages is filled if it is short and wholly allowed."""
    result = list(wanted)
    last = None
    for page, is_wanted in enumerate(wanted):
        if not is_wanted:
            continue
        if last is not None:
            between = range(last + 1, page)
            if len(between) < gap and all(bridgeable[one] for one in between):
                for one in between:
                    result[one] = True
        last = page
    return result


def planned_by_hand(
    wanted: list[bool], *, address: int, file_offset: int, block_size: int
) -> list[tuple[int, int, int]]:
    """Page by page: a page joins the request before it if that ends there and has room."""
    requests: list[tuple[int, int, int]] = []
    for page, is_wanted in enumerate(wanted):
        if not is_wanted:
            continue
        at = page * PAGE
        if requests:
            first, offset, length = requests[-1]
            if first + length == address + at and length + PAGE <= block_size:
                requests[-1] = (first, offset, length + PAGE)
                continue
        requests.append((address + at, file_offset + at, PAGE))
    return requests


@pytest.mark.parametrize(
    ("wanted", "gap", "result"),
    [
        ("#.#", 0, "#.#"),
        ("#.#", 1, "#.#"),
        ("#.#", 2, "###"),
        ("#..#", 2, "#..#"),
        ("#..#", 3, "####"),
        (".#.#.", 9, ".###."),
        ("#.#..#...#", 3, "######...#"),
        ("....", 9, "...."),
        ("####", 9, "####"),
        ("", 9, ""),
    ],
)
def test_gap_shorter_than_the_bound_is_bridged(wanted: str, gap: int, result: str) -> None:
    bits = bits_of(wanted)
    everything = np.ones_like(bits)
    assert text_of(bridge_gaps(bits, bridgeable=everything, gap_pages=gap)) == result


@pytest.mark.parametrize(
    ("wanted", "bridgeable", "result"),
    [
        ("#.#", "#.#", "#.#"),
        ("#..#", ".#..", "#..#"),
        ("#..#", "..#.", "#..#"),
        ("#..#.#", ".##...", "####.#"),
        ("#.#.#", ".....", "#.#.#"),
    ],
)
def test_gap_with_a_page_that_must_not_be_read_stays(
    wanted: str, bridgeable: str, result: str
) -> None:
    """A hole of the guest's memory is never read to save a request."""
    bits = bridge_gaps(bits_of(wanted), bridgeable=bits_of(bridgeable), gap_pages=4)
    assert text_of(bits) == result


@given(page_bits(), st.data(), st.integers(0, 40))
def test_bridging_is_that_of_a_loop_over_pages(
    wanted: NDArray[np.bool_], data: st.DataObject, gap: int
) -> None:
    allowed = data.draw(
        st.lists(
            st.sampled_from([True, True, True, False]), min_size=len(wanted), max_size=len(wanted)
        )
    )
    before = wanted.copy()
    result = bridge_gaps(wanted, bridgeable=np.array(allowed, np.bool_), gap_pages=gap)
    assert result.tolist() == bridged_by_hand(wanted.tolist(), allowed, gap)
    assert np.array_equal(wanted, before)


@pytest.mark.parametrize(
    ("bridge", "pages"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (4 * PAGE, 4)]
)
def test_bound_in_bytes_is_the_first_gap_not_bridged(bridge: int, pages: int) -> None:
    """A gap of ``pages`` pages is not shorter than ``bridge`` bytes; one page less is."""
    assert gap_pages(bridge) == pages


@given(page_bits(pages_max=2000), BLOCK_SIZES, st.integers(0, 1 << 30), st.integers(0, 1 << 40))
def test_requests_are_those_of_a_loop_over_pages(
    wanted: NDArray[np.bool_], block_size: int, address: int, file_page: int
) -> None:
    file_offset = file_page * PAGE
    plan = plan_runs(
        runs_from_bits(wanted), address=address, file_offset=file_offset, block_size=block_size
    )
    assert requests_of(plan) == planned_by_hand(
        wanted.tolist(), address=address, file_offset=file_offset, block_size=block_size
    )
    assert plan.total_bytes == int(np.count_nonzero(wanted)) * PAGE


def test_run_longer_than_a_block_is_cut_at_blocks_from_its_start() -> None:
    runs = PageRuns(np.array([3]), np.array([9]))
    plan = plan_runs(runs, address=1 << 20, file_offset=1 << 30, block_size=4 * PAGE)
    assert requests_of(plan) == [
        ((1 << 20) + page * PAGE, (1 << 30) + page * PAGE, count * PAGE)
        for page, count in ((3, 4), (7, 4), (11, 1))
    ]


def test_no_pages_are_no_requests() -> None:
    empty = np.empty(0, np.int64)
    assert len(plan_runs(PageRuns(empty, empty), address=0, file_offset=0, block_size=PAGE)) == 0


@given(st.lists(st.integers(1, 5000), max_size=6), st.integers(1, 1500))
def test_windows_cover_every_page_once_in_order(page_counts: list[int], window_pages: int) -> None:
    windows = windows_of(page_counts, window_pages=window_pages)
    covered = [
        (window.block_index, page)
        for window in windows
        for page in range(window.first_page, window.first_page + window.page_count)
    ]
    assert covered == [
        (block, page) for block, count in enumerate(page_counts) for page in range(count)
    ]
    assert all(0 < window.page_count <= window_pages for window in windows)
    assert all(window.first_page % window_pages == 0 for window in windows)


@pytest.mark.parametrize(
    ("guest", "channels", "depth", "span"),
    [
        (4 * KiB, 1, 16, 4 * MiB),
        (16 * MiB, 2, 8, 4 * MiB),
        (64 * MiB, 1, 16, 16 * MiB),
        (64 * MiB, 2, 8, 8 * MiB),
        (60 * MiB, 2, 8, 4 * MiB),
        (64 * MiB, 255, 8, 4 * MiB),
        (1 << 40, 2, 8, 16 * MiB),
        (1 << 40, 1, 8, 8 * MiB),
        (1 << 40, 1, 1, 4 * MiB),
        (1 << 40, 8, 64, 16 * MiB),
    ],
)
def test_span_is_whole_windows_and_leaves_device_and_channels_enough(
    guest: int, channels: int, depth: int, span: int
) -> None:
    options = WriteOptions(channels=channels, depth=depth)
    assert span_pages(guest // PAGE, options) * PAGE == span


def test_under_a_rate_limit_progress_comes_by_the_window() -> None:
    assert span_pages((1 << 40) // PAGE, WriteOptions(rate=MiB)) * PAGE == 4 * MiB


def test_window_in_bytes() -> None:
    window = Window(block_index=1, first_page=3, page_count=2)
    assert (window.start_bytes, window.length_bytes) == (3 * PAGE, 2 * PAGE)
