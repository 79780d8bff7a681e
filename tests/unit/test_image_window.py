"""Bits and writes of one window, against a model of its slots: one value a page."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from uringmig.image.window import Rewritten, settle_window
from uringmig.options import PAGE_SIZE
from uringmig.pages.runs import bits_from_runs

#: A page: its value, whether the memory has a hole there (then it is zero), what its slot holds,
#: whether a later round is asked for it.
pages_of_window = st.lists(
    st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=40,
)


def written(
    runs_bits: NDArray[np.bool_], memory: NDArray[np.int64], slots: NDArray[np.int64]
) -> NDArray[np.int64]:
    return np.where(runs_bits, memory, slots)


@given(
    pages=pages_of_window,
    dense=st.booleans(),
    fresh=st.booleans(),
    bridge=st.integers(0, 6),
)
def test_set_bit_stands_over_the_page_and_clear_bit_over_zero(
    pages: list[tuple[int, bool, int, bool]], dense: bool, fresh: bool, bridge: int
) -> None:
    """Whatever the slots hold, and with no hole read unless its bytes are needed in a slot."""
    hole = np.array([page[1] for page in pages])
    memory = np.array([page[0] for page in pages]) * ~hole
    slots = np.array([page[2] for page in pages]) * (not fresh)
    settled = settle_window(memory != 0, ~hole, dense=dense, fresh=fresh)
    runs = bits_from_runs(settled.runs(bridge * PAGE_SIZE), page_count=len(pages))
    slots = written(runs, memory, slots)
    assert (slots[settled.bits] == memory[settled.bits]).all()
    assert not memory[~settled.bits].any()
    if dense:
        assert settled.bits.all()
    if fresh or not dense:
        assert not (runs & hole).any(), "a hole of the memory was read, and so allocated"


@given(pages=pages_of_window, dense=st.booleans(), bridge=st.integers(0, 6))
def test_later_round_touches_only_what_it_is_asked_for(
    pages: list[tuple[int, bool, int, bool]], dense: bool, bridge: int
) -> None:
    """The other pages keep bit and bytes: they are right by an earlier round, and not looked at."""
    hole = np.array([page[1] for page in pages])
    memory = np.array([page[0] for page in pages]) * ~hole
    before = np.array([page[2] for page in pages])
    selected = np.array([page[3] for page in pages])
    bits = np.ones(len(pages), np.bool_) if dense else before != 0
    settled = settle_window(
        memory != 0, ~hole, dense=dense, fresh=False, later=Rewritten(selected, bits)
    )
    runs = bits_from_runs(settled.runs(bridge * PAGE_SIZE), page_count=len(pages))
    assert not (runs & ~selected).any()
    assert (settled.bits[~selected] == bits[~selected]).all()
    after = written(runs, memory, before)
    now = np.where(selected, memory, before)
    assert (after[settled.bits] == now[settled.bits]).all()
    assert not now[~settled.bits].any()
