"""Synthetic guest RAM: which pages are not zero, and bytes for these that no one can compress.

The same pattern, size and seed always give the same bytes, in any memory. A page that stays zero is
not touched unless asked for, so it stays a hole where the memory has holes.
"""

from __future__ import annotations

from typing import Final, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.units import is_aligned

PatternName = Literal["dense", "alternate", "mixed", "idle"]

_WORDS_PER_PAGE: Final = PAGE_SIZE // 8
_PAGES_PER_WINDOW: Final = WINDOW_BYTES // PAGE_SIZE
#: 256 MiB of 8 GiB, as a guest that booted and then did nothing.
_IDLE_SHARE: Final = 1 / 32


def nonzero_bits(pattern: PatternName, *, page_count: int, seed: int = 0) -> NDArray[np.bool_]:
    """Say which pages of a guest are not zero.

    Args:
        pattern: ``dense``, every page; ``alternate``, every other page from the first on;
            ``mixed``, runs and gaps of 1 to 1023 pages, short ones as frequent as long ones;
            ``idle``, as ``mixed`` but with gaps so long that of a big guest about a 32nd is left.
        page_count: pages of the guest.
        seed: for the patterns that are random.
    """
    bits = np.zeros(page_count, np.bool_)
    match pattern:
        case "dense":
            bits[:] = True
        case "alternate":
            bits[0::2] = True
        case "mixed":
            bits[:] = _random_runs(page_count, gap_factor=1.0, seed=seed)
        case "idle":
            bits[:] = _random_runs(page_count, gap_factor=1 / _IDLE_SHARE - 1, seed=seed)
        case _:
            assert_never(pattern)
    return bits


def fill_pages(
    memory: NDArray[np.uint8],
    nonzero: NDArray[np.bool_],
    *,
    seed: int = 0,
    write_zeros: bool = False,
) -> None:
    """Write pages that are all different and incompressible; every word of them is random.

    Args:
        memory: 1-D uint8, writable, 8-byte aligned, one page for each of ``nonzero``.
        nonzero: the pages to write, one bool a page.
        seed: other seeds give other bytes.
        write_zeros: write zeros to the other pages, which allocates them; else leave them alone.
    """
    assert is_aligned(len(memory), PAGE_SIZE), len(memory)
    assert len(nonzero) * PAGE_SIZE == len(memory), (len(nonzero), len(memory))
    pages = memory.view(np.uint64).reshape(-1, _WORDS_PER_PAGE)
    random = np.random.Generator(np.random.SFC64(seed))
    # One random window, told apart by a random word a page: as fast as memory, unlike a generator.
    block = random.integers(1 << 64, size=(_PAGES_PER_WINDOW, _WORDS_PER_PAGE), dtype=np.uint64)
    key = random.integers(1 << 64, size=(len(pages), 1), dtype=np.uint64)
    for start in range(0, len(pages), _PAGES_PER_WINDOW):
        window = pages[start : start + _PAGES_PER_WINDOW]
        chosen = np.flatnonzero(nonzero[start : start + _PAGES_PER_WINDOW])
        if len(chosen) == len(window):
            np.bitwise_xor(block[: len(window)], key[start : start + len(window)], out=window)
        else:
            if write_zeros:
                window[:] = 0
            window[chosen] = block[chosen] ^ key[start + chosen]


def fill_guest(
    memory: NDArray[np.uint8],
    pattern: PatternName,
    *,
    seed: int = 0,
    write_zeros: bool = False,
) -> NDArray[np.bool_]:
    """Fill a guest's memory after a pattern, and return its `nonzero_bits`; see `fill_pages`."""
    nonzero = nonzero_bits(pattern, page_count=len(memory) // PAGE_SIZE, seed=seed)
    fill_pages(memory, nonzero, seed=seed, write_zeros=write_zeros)
    return nonzero


def _random_runs(page_count: int, *, gap_factor: float, seed: int) -> NDArray[np.bool_]:
    """Alternate random runs and gaps; a gap is on average gap_factor times as long as a run."""
    random = np.random.Generator(np.random.SFC64(seed))
    # Even if each were one page long there are enough of them.
    runs = np.floor(2 ** random.uniform(0, 10, size=page_count // 2 + 1)).astype(np.int64)
    gaps = np.floor(2 ** random.uniform(0, 10, size=len(runs)) * gap_factor).astype(np.int64)
    lengths = np.column_stack([runs, np.maximum(gaps, 1)]).ravel()
    needed = int(np.searchsorted(np.cumsum(lengths), page_count)) + 1
    return np.repeat(np.arange(needed) % 2 == 0, lengths[:needed])[:page_count]
