"""Page-aligned buffers, for data that must be bounced or has no home of its own."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import LimitError


def aligned_buffer(length_bytes: int, *, huge: bool = False) -> NDArray[np.uint8]:
    """Make a zeroed, page-aligned, writable buffer; 1-D uint8 of ``length_bytes``.

    An anonymous mapping: aligned by nature, and given back to the system when the last view dies.

    Args:
        length_bytes: how long it is.
        huge: of huge pages, where the system gives any: for what is used whole again and again.

    Raises:
        LimitError: this machine has no room for it, or too many of them have been made.
    """
    try:
        mapping = mmap.mmap(-1, length_bytes)
        if huge:
            with contextlib.suppress(OSError):  # a kernel without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(mapping, np.uint8)
    except OSError as error:
        raise LimitError(
            f"no buffer of {length_bytes} bytes to be had ({error.strerror}); "
            "fewer channels, a smaller depth or block size need less"
        ) from None
