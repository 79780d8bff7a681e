"""What of a file is in the page cache, as mincore(2) has it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def resident_bytes(path: str | Path) -> int:
    """Bytes of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = Path(path).stat().st_size
    with (
        Path(path).open("rb") as file,
        mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        view = np.frombuffer(mapped, np.uint8)
        pages = (ctypes.c_ubyte * -(-size // 4096))()
        done = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages)
        del view
    assert done == 0, os.strerror(ctypes.get_errno())
    return 4096 * sum(page & 1 for page in pages)


def drop(path: str | Path) -> None:
    """Take a file out of the page cache."""
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert resident_bytes(path) == 0
