"""Hypothesis strategies shared by the tests; built without the code under test."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

PAGE = 4096

#: A set of pages as the slow and obvious version has it: (first page, pages) a run.
Pairs = list[tuple[int, int]]


@st.composite
def page_bits(draw: st.DrawFn, *, pages_max: int = 400) -> NDArray[np.bool_]:
    """One bool a page: either page by page at random, or in runs, where bytes and words fill up."""
    if draw(st.booleans()):
        return np.array(draw(st.lists(st.booleans(), max_size=min(pages_max, 80))), np.bool_)
    lengths = draw(st.lists(st.integers(1, 70), max_size=20))
    first = draw(st.booleans())
    bits = [first ^ (position % 2 == 1) for position in range(len(lengths))]
    return np.repeat(np.array(bits, np.bool_), lengths)[:pages_max]


@st.composite
def run_pairs(draw: st.DrawFn, *, runs_max: int = 20) -> Pairs:
    """Sorted runs with at least one page between them."""
    pairs: Pairs = []
    page = draw(st.integers(0, 40))
    for count, gap in draw(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), max_size=runs_max)
    ):
        pairs.append((page, count))
        page += count + gap
    return pairs


def ramblocks(
    *, blocks_max: int = 6, pages_max: int = 3000
) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Blocks of a guest: distinct idstr, and used_length in bytes."""
    idstr = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
    used_length = st.integers(1, pages_max).map(lambda pages: pages * PAGE)
    return st.lists(
        st.tuples(idstr, used_length), min_size=1, max_size=blocks_max, unique_by=lambda b: b[0]
    )
