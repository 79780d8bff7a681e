"""What do runs and requests of a million pages cost, by how fragmented they are?"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from perf.micro import Micro, TimeFunction
from uringmig.options import PAGE_SIZE, SPAN_BYTES, WriteOptions
from uringmig.pages.runs import PageRuns, runs_from_bits
from uringmig.testing.guests import PatternName, nonzero_bits
from uringmig.transfer.plan import bridge_gaps, gap_pages, plan_runs
from uringmig.units import format_size

PAGES = 1 << 20
SPAN_PAGES = SPAN_BYTES // PAGE_SIZE
OPTIONS = WriteOptions()

Bits = NDArray[np.bool_]


@functools.cache
def windows_of(pattern: PatternName) -> list[Bits]:
    """The nonzero pages of a guest, span by span; made only in the process that plans them."""
    return list(nonzero_bits(pattern, page_count=PAGES, seed=1).reshape(-1, SPAN_PAGES))


def timed(pattern: PatternName, step: Callable[[list[Bits]], object]) -> TimeFunction:
    """Time one step over a guest."""

    def run(loops: int) -> float:
        windows = windows_of(pattern)
        started = time.perf_counter()
        for _ in range(loops):
            step(windows)
        return time.perf_counter() - started

    return run


def find_runs(windows: list[Bits]) -> list[PageRuns]:
    """Turn the bits of every span into runs."""
    return [runs_from_bits(bits) for bits in windows]


def plan(windows: list[Bits]) -> int:
    """Do all that a channel does between a span's bits and its requests; return their number."""
    bridgeable, pages = np.ones(SPAN_PAGES, np.bool_), gap_pages(OPTIONS.bridge)
    count = 0
    for bits in windows:
        wanted = bridge_gaps(bits, bridgeable=bridgeable, gap_pages=pages)
        count += len(
            plan_runs(
                runs_from_bits(wanted), address=0, file_offset=0, block_size=OPTIONS.block_size
            )
        )
    return count


def main() -> None:
    micro = Micro(
        "perf.bench_plan",
        __doc__ or "",
        pages=PAGES,
        span=format_size(SPAN_BYTES),
        block_size=format_size(OPTIONS.block_size),
        bridge=format_size(OPTIONS.bridge),
    )
    for pattern in get_args(PatternName):
        micro.cost(f"runs: {pattern}", timed(pattern, find_runs), operations=PAGES, of="page")
        micro.cost(f"plan: {pattern}", timed(pattern, plan), operations=PAGES, of="page")


if __name__ == "__main__":
    main()
