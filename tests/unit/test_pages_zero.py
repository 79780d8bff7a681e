"""Zero pages: every byte decides, wherever it is and whatever the pages around it hold."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from uringmig.pages.zero import nonzero_pages

PAGE = 4096
WINDOW_PAGES = 1024

#: What a page holds: nothing, something in every byte, or one byte at one place.
Content = None | int
contents = st.one_of(st.none(), st.just(-1), st.integers(0, PAGE - 1))


def make_window(pages: list[Content]) -> NDArray[np.uint8]:
    window = np.zeros((len(pages), PAGE), np.uint8)
    for page, content in zip(window, pages, strict=True):
        if content == -1:
            page[:] = 0xA5
        elif content is not None:
            page[content] = 1 << (content % 8)
    return window.reshape(-1)


def slow_nonzero_pages(window: NDArray[np.uint8]) -> list[bool]:
    raw = window.tobytes()
    return [raw.count(0, at, at + PAGE) != PAGE for at in range(0, len(raw), PAGE)]


@given(st.lists(st.tuples(contents, st.integers(1, 80)), max_size=6))
def test_agrees_with_counting_bytes(stretches: list[tuple[Content, int]]) -> None:
    """Stretches of like pages, so that both the adjacent and the gathered path are taken."""
    window = make_window([content for content, count in stretches for _ in range(count)])
    assert nonzero_pages(window).tolist() == slow_nonzero_pages(window)


@given(st.lists(contents, max_size=200))
def test_agrees_with_counting_bytes_page_by_page(pages: list[Content]) -> None:
    window = make_window(pages)
    assert nonzero_pages(window).tolist() == slow_nonzero_pages(window)


@pytest.mark.parametrize("zeros_between", [0, 1])
@pytest.mark.parametrize("dense_between", [0, 1])
def test_one_byte_at_each_place(zeros_between: int, dense_between: int) -> None:
    """Page i of 4096 has nothing but its byte i; among zero pages, dense pages, both or none."""
    group = 1 + zeros_between + dense_between
    pages = np.zeros((PAGE, group, PAGE), np.uint8)
    pages[np.arange(PAGE), 0, np.arange(PAGE)] = 1
    if dense_between:
        pages[:, group - 1] = 7
    expected = [True] + [False] * zeros_between + [True] * dense_between
    assert nonzero_pages(pages.reshape(-1)).tolist() == expected * PAGE


@pytest.mark.parametrize("step", [1, 2, 3, 64])
def test_all_zero_but_some(step: int) -> None:
    window = np.zeros((WINDOW_PAGES, PAGE), np.uint8)
    window[::step, -1] = 1
    found = nonzero_pages(window.reshape(-1))
    assert np.flatnonzero(found).tolist() == list(range(0, WINDOW_PAGES, step))


def test_empty_window() -> None:
    assert nonzero_pages(np.zeros(0, np.uint8)).tolist() == []


def test_half_a_page_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError):
        nonzero_pages(np.zeros(PAGE + 2048, np.uint8))


def test_read_only_memory_serves_and_the_result_is_the_callers() -> None:
    window = np.frombuffer(bytes(2 * PAGE), np.uint8)
    assert not window.flags.writeable
    found = nonzero_pages(window)
    assert not np.may_share_memory(found, window)
    found[:] = True
    assert not window.any()


@pytest.mark.parametrize("skew", [1, 4, 7])
def test_memory_off_the_word_boundary(skew: int) -> None:
    window = np.zeros(8 * PAGE + 8, np.uint8)[skew:][: 8 * PAGE]
    window[3 * PAGE - 1] = 1
    window[5 * PAGE] = 1
    assert np.flatnonzero(nonzero_pages(window)).tolist() == [2, 5]


@pytest.mark.parametrize("kind", ["zero", "alternate", "late byte"])
def test_temporaries_are_small_beside_the_window(kind: str) -> None:
    """Less than 512 KiB for a window of 4 MiB, whatever it holds."""
    window = np.zeros((WINDOW_PAGES, PAGE), np.uint8)
    if kind == "alternate":
        window[::2] = 3
    elif kind == "late byte":
        window[:, -1] = 1
    flat = window.reshape(-1)
    tracemalloc.start()
    try:
        nonzero_pages(flat)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 512 << 10
