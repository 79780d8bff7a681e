"""Which pages of another process are there, asked so that none is made by asking.

A page that its process has never touched is zero, and is not in its page tables. Reading it all the
same would cost the host: page tables for anonymous memory, a page of memory each for files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.options import PAGE_SIZE
from uringmig.units import KiB

#: Linux 6.7, include/uapi/linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), twelve 64-bit words:
#: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
#: category_anyof_mask, return_mask.
_PAGEMAP_SCAN: Final = 0xC0606610
_ARGUMENT: Final = struct.Struct("=12Q")
_WALK_END_AT: Final = 4 * 8
_IS_PRESENT: Final = 1 << 3
_IS_SWAPPED: Final = 1 << 4
_IS_PFNZERO: Final = 1 << 5
#: A struct page_region, start, end and categories; so many are asked for in one call.
_REGIONS: Final = 1024
#: What a kernel says that does not know the ioctl.
_UNKNOWN: Final = frozenset({errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP})
#: proc(5), pagemap: a 64-bit word a page; bit 63 present, bit 62 swapped.
_WORD_BYTES: Final = 8
_THERE: Final = np.uint64(3 << 62)
#: Pages asked for at a time without the ioctl: 512 KiB of words, 256 MiB of memory.
_CHUNK_PAGES: Final = 64 * KiB
#: The same where the first page that is there will do: mostly it is among these.
_FIRST_PAGES: Final = KiB

Pairs = list[tuple[int, int]]


class Pagemap:
    """The page tables of a process, by address; may be asked from several threads.

    Args:
        pid: the process.
        scan: ask by PAGEMAP_SCAN where the kernel has it; it leaves out the zero page, too.

    Raises:
        OSError: there is no such process, or we may not look.
    """

    def __init__(self, pid: int, *, scan: bool = True) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.scans = False
        try:
            self.scans = scan and self._can_scan()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Close its descriptor."""
        os.close(self._fd)

    def ranges(self, start: int, end: int) -> Pairs:
        """Find the pages that are there, swapped out or not, between two page aligned addresses.

        Returns:
            (start, end) addresses, sorted; those that touch need not be joined.

        Raises:
            OSError: the kernel refused.
        """
        found: Pairs = []
        at = start
        while at < end:
            ranges, at = self._look(at, end)
            found += ranges
        return found

    def next_there(self, start: int, end: int) -> int:
        """Find the first page that is there from ``start`` on; ``end`` if there is none.

        Raises:
            OSError: the kernel refused.
        """
        at = start
        while at < end:
            ranges, at = self._look(at, end, first_page=True)
            if ranges:
                return ranges[0][0]
        return end

    def _look(self, start: int, end: int, *, first_page: bool = False) -> tuple[Pairs, int]:
        """Some ranges, and the address up to which they are all; or the first page's at least."""
        if self.scans:
            return self._scan(start, end, pages_max=1 if first_page else 0)
        end = min(end, start + (_FIRST_PAGES if first_page else _CHUNK_PAGES) * PAGE_SIZE)
        return self._read(start, end), end

    def _can_scan(self) -> bool:
        """Try it on nothing."""
        try:
            self._scan(0, 0)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            return False
        return True

    def _scan(self, start: int, end: int, *, pages_max: int = 0) -> tuple[Pairs, int]:
        """See `_look`: by the ioctl, which finds at most so many pages; 0 is no limit.

        Without that limit it walks to the end of a region, even of the first one.
        """
        regions = np.empty((_REGIONS, 3), np.uint64)
        there = _IS_PRESENT | _IS_SWAPPED
        span = _ARGUMENT.size, 0, start, end, 0, regions.ctypes.data, _REGIONS, pages_max
        argument = bytearray(
            _ARGUMENT.pack(*span, _IS_PFNZERO, _IS_PFNZERO, there, _IS_PRESENT)
        )  # not the zero page, and present or swapped out
        count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
        (walked_to,) = struct.unpack_from("=Q", argument, _WALK_END_AT)
        pairs = regions[:count, :2].tolist()
        return [(first, limit) for first, limit in pairs], walked_to

    def _read(self, start: int, end: int) -> Pairs:
        """See `_look`: by reading a word for each page."""
        first_page = start // PAGE_SIZE
        length = (end // PAGE_SIZE - first_page) * _WORD_BYTES
        words = np.frombuffer(os.pread(self._fd, length, first_page * _WORD_BYTES), np.uint64)
        there: NDArray[np.bool_] = np.zeros(len(words) + 2, np.bool_)
        there[1:-1] = (words & _THERE) != 0
        edges = np.flatnonzero(there[1:] != there[:-1]) * PAGE_SIZE + start
        return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))
