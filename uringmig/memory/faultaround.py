"""Pages of a file mapped into this process, sixteen for each one that is asked for.

A fault on a page that is in the page cache maps its neighbours in as well, within an aligned 64 KiB
(mm/memory.c, do_fault_around), and only those that are there: a hole is never allocated. To ask for
each page (MADV_POPULATE_READ over a range) costs the kernel a walk for each; so one page of each
64 KiB is asked for, all of a window in one system call.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

import numpy as np

from uringmig.options import PAGE_SIZE
from uringmig.units import KiB, align_up

#: madvise(2), Linux 5.14: fault in, for reading.
MADV_POPULATE_READ: Final = 22
#: process_madvise(2); since Linux 6.13 with any advice for the caller's own memory.
_SYS_PROCESS_MADVISE: Final = 440
#: Default of fault_around_bytes, which is a debugging knob; with less, `FaultAround` gives up.
_AROUND_BYTES: Final = 64 * KiB
#: UIO_MAXIOV, include/uapi/linux/uio.h: most ranges in one call.
_RANGES_MAX: Final = 1024
#: proc(5), pagemap: one 64-bit word a page; the top bit says that it is mapped.
_WORD_BYTES: Final = 8
_PRESENT: Final = 1 << 63

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


class FaultAround:
    """Maps ranges of this process's own shared mappings in; may be used from several threads.

    It gives up for good where it does not help: an older kernel, no /proc, or pages that
    fault-around passes over (those of tmpfs that a drop of the page cache has marked).
    """

    def __init__(self) -> None:
        self._gave_up = False
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(os.pidfd_open(os.getpid()))
            self._descriptors.append(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._gave_up = True

    def map_in(self, address: int, length: int) -> bool:
        """Map whole pages in; return whether that worked, judged by the last page alone.

        Single pages may be left out, such as one that is locked; reading it maps it in.
        """
        if self._gave_up:
            return False
        steps = np.arange(align_up(address + 1, _AROUND_BYTES), address + length, _AROUND_BYTES)
        # Where a mapping begins unaligned, the first fault maps 64 KiB from there on, so the next
        # step may find its page mapped already and its neighbours not: hence the second of these.
        first = [address, address + min(_AROUND_BYTES, length - PAGE_SIZE)]
        if len(first) + len(steps) > _RANGES_MAX:
            return False
        ranges = np.full((len(first) + len(steps), 2), PAGE_SIZE, np.uint64)
        ranges[:, 0] = np.concatenate([first, steps])
        advised = _LIBC.syscall(
            ctypes.c_long(_SYS_PROCESS_MADVISE),
            ctypes.c_int(self._descriptors[0]),
            ctypes.c_void_p(ranges.ctypes.data),
            ctypes.c_size_t(len(ranges)),
            ctypes.c_int(MADV_POPULATE_READ),
            ctypes.c_uint(0),
        )
        self._gave_up = advised != PAGE_SIZE * len(ranges) or not self._is_mapped(
            address + length - PAGE_SIZE
        )
        return not self._gave_up

    def close(self) -> None:
        """Close its descriptors; from now on it maps nothing in."""
        self._gave_up = True
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _is_mapped(self, address: int) -> bool:
        """Ask the kernel's page tables."""
        word = os.pread(self._descriptors[1], _WORD_BYTES, address // PAGE_SIZE * _WORD_BYTES)
        return bool(int.from_bytes(word, "little") & _PRESENT)
