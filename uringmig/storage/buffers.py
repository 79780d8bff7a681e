"""Page-aligned buffers, for data that must be bounced or has no home of its own."""

from __future__ import annotations

import contextlib
import mmap
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import LimitError
from uringmig.units import MiB

#: Transparent huge pages of x86-64, and of arm64 where its pages are of 4 KiB.
_HUGE_PAGE_BYTES: Final = 2 * MiB


def aligned_buffer(length_bytes: int) -> NDArray[np.uint8]:
    """Make a zeroed, page-aligned, writable buffer; 1-D uint8 of ``length_bytes``.

    An anonymous mapping: aligned by nature, and given back to the system when the last view dies.
    Of 2 MiB and more it is of huge pages where the system has them: a disk takes a request in as
    many pieces as it has in physical memory, and few pieces cost it and the processor less.

    Raises:
        LimitError: this machine has no room for it, or too many of them have been made.
    """
    huge = length_bytes >= _HUGE_PAGE_BYTES
    slack = _HUGE_PAGE_BYTES if huge else 0  # never touched, and so no memory
    try:
        # Not mmap's own default, which is shared: such memory has no huge pages.
        mapping = mmap.mmap(-1, length_bytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise LimitError(
            f"no buffer of {length_bytes} bytes to be had ({error.strerror}); "
            "fewer channels, a smaller depth or block size need less"
        ) from None
    # A child that were forked while a device writes here could take the page from us.
    mapping.madvise(mmap.MADV_DONTFORK)
    whole = np.frombuffer(mapping, np.uint8)
    start = 0
    if huge:
        start = -whole.ctypes.data % _HUGE_PAGE_BYTES
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return whole[start : start + length_bytes]
