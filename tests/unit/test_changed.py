"""The second look of a copy in two passes: every piece that differs is found, and no other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from uringmig.image import digest
from uringmig.image.changed import look_again, rows_with_data
from uringmig.image.digest import PIECE_BYTES
from uringmig.options import PAGE_SIZE

PIECE_PAGES = PIECE_BYTES // PAGE_SIZE
STALE = 0xEE

#: Of each page: None is a hole, 0 is zeros that may be read, anything else is its content.
Pages = list[int | None]
page = st.sampled_from([None, 0, 1, 2])


@st.composite
def two_moments(draw: st.DrawFn) -> tuple[Pages, Pages]:
    """A window at two moments; most pieces are the same in both."""
    count = draw(st.sampled_from([1, 3, 16, 17, 40, 64, 65, 96]))
    before = draw(st.lists(page, min_size=count, max_size=count))
    after = list(before)
    for at in draw(st.sets(st.integers(0, count - 1), max_size=6)):
        after[at] = draw(page)
    return before, after


def memory_of(pages: Pages) -> tuple[NDArray[np.uint8], list[int], list[int]]:
    """The bytes, other ones in its holes; and what may be read."""
    memory = np.repeat(
        np.array([STALE if each is None else each for each in pages], np.uint8), 4096
    )
    start = [number * PAGE_SIZE for number, each in enumerate(pages) if each is not None]
    return memory, start, [PAGE_SIZE] * len(start)


@given(two_moments())
def test_what_differs_is_found_and_nothing_else(moments: tuple[Pages, Pages]) -> None:
    """Pieces are compared as the bytes they stand for: a hole is zeros, however it came to be."""
    before, after = moments
    _, written = digest.piecewise_digest(*memory_of(before))
    look = look_again(written, *memory_of(after))
    bytes_of = [[each or 0 for each in pages] for pages in moments]
    expected = [
        number
        for number, at in enumerate(range(0, len(before), PIECE_PAGES))
        if bytes_of[0][at : at + PIECE_PAGES] != bytes_of[1][at : at + PIECE_PAGES]
    ]
    assert look.changed.tolist() == expected
    pages = look.pages(len(after)).tolist()
    assert pages == [number // PIECE_PAGES in expected for number in range(len(after))]
    again = look_again(look.pieces, *memory_of(after))
    assert again.changed.tolist() == []


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_windows_that_were_a_hole(held: list[bool]) -> None:
    """A window of 4 MiB has 64 pieces; the last one of a block may have fewer."""
    written = np.array([[each] * 12 for each in held], np.uint8)
    expected = [any(held[at : at + 64]) for at in range(0, len(held), 64)]
    assert rows_with_data(written).tolist() == expected
