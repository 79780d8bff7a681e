"""Run lengths against the slow, obvious count."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from uringmig.cli.runlengths import RunLengths, run_lengths


@given(
    bits=st.lists(st.booleans(), min_size=1, max_size=200),
    step_bytes=st.integers(min_value=1, max_value=30),
)
def test_runs_across_steps(bits: list[bool], step_bytes: int) -> None:
    packed = np.packbits(np.array(bits), bitorder="little")
    lengths = [len(list(group)) for present, group in itertools.groupby(bits) if present]
    expected = RunLengths(0, 0, 0)
    if lengths:
        expected = RunLengths(len(lengths), statistics.median_low(lengths), max(lengths))
    assert run_lengths(packed, page_count=len(bits), step_pages=8 * step_bytes) == expected
