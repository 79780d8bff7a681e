"""How near does the search for zero pages come to the bandwidth of this machine's memory?"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from perf.micro import Micro, TimeFunction
from uringmig.options import SPAN_BYTES
from uringmig.pages.zero import nonzero_pages
from uringmig.storage.buffers import aligned_buffer
from uringmig.testing.guests import PatternName, fill_guest
from uringmig.units import MiB, format_size

#: Larger than a last-level cache, so that memory is what is measured.
MEMORY_BYTES = 256 * MiB

Array = NDArray[np.uint8]


@functools.cache
def windows_of(pattern: PatternName | None) -> list[Array]:
    """Fill a memory, with zeros if there is no pattern; only in the process that looks at it."""
    memory = aligned_buffer(MEMORY_BYTES)
    if pattern is None:
        memory[:] = 0  # else all of it is the one page of zeros that the kernel maps for a read
    else:
        fill_guest(memory, pattern, write_zeros=True)
    return [memory[at : at + SPAN_BYTES] for at in range(0, len(memory), SPAN_BYTES)]


def going_through(pattern: PatternName | None, look: Callable[[Array], object]) -> TimeFunction:
    """Time going through a memory span by span, as a save does."""

    def run(loops: int) -> float:
        windows = windows_of(pattern)
        started = time.perf_counter()
        for _ in range(loops):
            for window in windows:
                look(window)
        return time.perf_counter() - started

    return run


def read(window: Array) -> object:
    """Read every word, and do as little as numpy can with it."""
    return np.bitwise_or.reduce(window.view(np.uint64))


def main() -> None:
    micro = Micro(
        "perf.bench_scan",
        __doc__ or "",
        memory=format_size(MEMORY_BYTES),
        span=format_size(SPAN_BYTES),
    )
    copy = aligned_buffer(SPAN_BYTES)
    cases: tuple[tuple[str, PatternName | None, Callable[[Array], object]], ...] = (
        ("bandwidth: copy", "dense", lambda window: np.copyto(copy, window)),
        ("bandwidth: read", "dense", read),
        ("scan: zero", None, nonzero_pages),
        ("scan: every other page zero", "alternate", nonzero_pages),
        ("scan: dense", "dense", nonzero_pages),
    )
    for name, pattern, look in cases:
        micro.rate(name, going_through(pattern, look), loop_bytes=MEMORY_BYTES)


if __name__ == "__main__":
    main()
