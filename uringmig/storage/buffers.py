"""Page-aligned buffers, for data that must be bounced or has no home of its own."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import LimitError


def aligned_buffer(length_bytes: int) -> NDArray[np.uint8]:
    """Make a zeroed, page-aligned, writable buffer; 1-D uint8 of ``length_bytes``.

    An anonymous mapping: aligned by nature, and given back to the system when the last view dies.

    Raises:
        LimitError: this machine has no room for it, or too many of them have been made.
    """
    try:
        return np.frombuffer(mmap.mmap(-1, length_bytes), np.uint8)
    except OSError as error:
        raise LimitError(
            f"no buffer of {length_bytes} bytes to be had ({error.strerror}); "
            "fewer channels, a smaller depth or block size need less"
        ) from None
