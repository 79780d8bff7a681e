"""How fast are the digests of a manifest, from the cache as in a save, and from memory?"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from perf.micro import Micro, TimeFunction
from uringmig.image import digest
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.storage.buffers import aligned_buffer
from uringmig.testing.guests import fill_guest
from uringmig.units import KiB, MiB, format_size

#: Larger than a last-level cache.
MEMORY_BYTES = 256 * MiB
#: Extents of a window with holes: a page, every other one.
STARTS = list(range(0, WINDOW_BYTES, 2 * PAGE_SIZE))
LENGTHS = [PAGE_SIZE] * len(STARTS)
#: Pieces of the main stream: headers, bitmaps, device sections.
PIECE_BYTES = 64 * KiB

Array = NDArray[np.uint8]


@functools.cache
def make_windows() -> list[Array]:
    """Fill a memory; only in the process that digests it."""
    memory = aligned_buffer(MEMORY_BYTES)
    fill_guest(memory, "dense")
    return [memory[at : at + WINDOW_BYTES] for at in range(0, MEMORY_BYTES, WINDOW_BYTES)]


def over(function: Callable[[Array], object], *, cached: bool = False) -> TimeFunction:
    """Time a function over all windows, or over one again and again: that one is in the cache."""

    def run(loops: int) -> float:
        windows = make_windows()
        if cached:
            windows = windows[:1] * len(windows)
        started = time.perf_counter()
        for _ in range(loops):
            for window in windows:
                function(window)
        return time.perf_counter() - started

    return run


def sparse(window: Array) -> bytes:
    """Digest a window of which every other page is a hole."""
    return digest.sparse_digest(window, STARTS, LENGTHS)


def pieces(window: Array) -> bytes:
    """Digest a window and each 64 KiB of it, as a save does."""
    return digest.piecewise_digest(window, [0], [len(window)])[0]


def stream(window: Array) -> str:
    """Digest a window as pieces of a main stream."""
    state = digest.StreamDigest()
    for at in range(0, len(window), PIECE_BYTES):
        state.update(at, window[at : at + PIECE_BYTES].data)
    return state.hexdigest()


def main() -> None:
    micro = Micro(
        "perf.bench_digest",
        __doc__ or "",
        algorithm=digest.ALGORITHM,
        memory=format_size(MEMORY_BYTES),
        window=format_size(WINDOW_BYTES),
    )
    cases = {
        "window, from memory": over(digest.window_digest),
        "window, from the cache": over(digest.window_digest, cached=True),
        "window and its pieces, from memory": over(pieces),
        "window with every other page a hole": over(sparse),
        "main stream in pieces": over(stream),
    }
    for name, function in cases.items():
        micro.rate(f"digest: {name}", function, loop_bytes=MEMORY_BYTES)


if __name__ == "__main__":
    main()
