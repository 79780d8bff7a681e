"""Which pages of a window hold anything but zeros.

Rules: every byte of a page decides, not a sample. Nothing is written, so a read-only mapping
serves. Temporaries are bounded by `_GATHER_PAGES`, whatever the window's size. The memory must not
be a hole of a shared mapping: reading one allocates it (see `uringmig.memory.source`).

How it is fast: one word settles most pages that are not zero, and such a page is never read. The
rest is reduced where it lies if adjacent, else gathered a few pages at a time into a buffer that
stays in the L2 cache. numpy releases the GIL in all three steps.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.options import PAGE_SIZE
from uringmig.units import is_aligned

_WORDS_PER_PAGE: Final = PAGE_SIZE // 8
#: 64 pages are 256 KiB: a buffer of 1024 pages falls out of L2 and halved the rate on zero memory.
_GATHER_PAGES: Final = 64


def nonzero_pages(window: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find the pages that hold a nonzero byte; QEMU: buffer_is_zero() over a page.

    Args:
        window: 1-D uint8, C-contiguous, a whole number of pages; fastest when 8-byte aligned.

    Returns:
        One bool a page, 1-D, owned by the caller: True where any byte is nonzero.
    """
    assert window.ndim == 1, window.shape
    assert is_aligned(len(window), PAGE_SIZE), len(window)
    words = window.view(np.uint64).reshape(-1, _WORDS_PER_PAGE)
    nonzero: NDArray[np.bool_] = words[:, 0] != 0
    undecided = np.flatnonzero(~nonzero)
    if len(undecided):
        _settle(words, undecided, nonzero)
    return nonzero


def _settle(
    words: NDArray[np.uint64], undecided: NDArray[np.int64], nonzero: NDArray[np.bool_]
) -> None:
    """Read the undecided pages (sorted page indices) whole, and set their entries of nonzero."""
    gathered = np.empty((min(len(undecided), _GATHER_PAGES), _WORDS_PER_PAGE), np.uint64)
    for position in range(0, len(undecided), _GATHER_PAGES):
        page_index = undecided[position : position + _GATHER_PAGES]
        first, last = page_index[0], page_index[-1]
        if last - first + 1 == len(page_index):
            pages = words[first : last + 1]
        else:
            pages = gathered[: len(page_index)]
            # With "raise", the default, numpy would copy by way of one more buffer.
            np.take(words, page_index, axis=0, out=pages, mode="clip")
        nonzero[page_index] = np.bitwise_or.reduce(pages, axis=1) != 0
