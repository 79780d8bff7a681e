"""Page-aligned buffers, for data that must be bounced or has no home of its own."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def aligned_buffer(length_bytes: int) -> NDArray[np.uint8]:
    """Make a zeroed, page-aligned, writable buffer; 1-D uint8 of ``length_bytes``.

    An anonymous mapping: aligned by nature, and given back to the system when the last view dies.
    """
    return np.frombuffer(mmap.mmap(-1, length_bytes), np.uint8)
