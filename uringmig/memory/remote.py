"""Memory of another process that cannot be mapped here: read in windows, one call for each.

For private memory, anonymous or a private copy of a file. What is shared is mapped instead
(`memory.mapping`), without a copy. Reading needs the right to ptrace the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import HostError, LimitError, PeerError
from uringmig.memory.mapping import FileMemory
from uringmig.memory.pagemap import Pagemap
from uringmig.memory.source import Extents, check_range
from uringmig.options import PAGE_SIZE
from uringmig.units import MiB

#: UIO_MAXIOV, include/uapi/linux/uio.h: most ranges in one call.
_RANGES_MAX: Final = 1024
#: Looked at in one go to be counted: of so much there are not too many extents to hold.
_COUNTED_BYTES: Final = 64 * MiB

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.process_vm_readv.restype = ctypes.c_ssize_t
_LIBC.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


class RemoteMemory:
    """A range of another process's private memory, as a `CopiedMemory`.

    The process may go on meanwhile: then a page that it touches later may be missed, and what is
    read may be of many moments. Whoever needs one moment looks again when the process stands still.

    Args:
        pid: the process.
        address: where the memory begins there; page aligned.
        length: bytes, whole pages.
        pagemap: the process's, which stays the caller's.
        file: what the memory shows where the process has no page of its own, for a private mapping
            of a file; closed with this memory.
    """

    def __init__(
        self,
        pid: int,
        *,
        address: int,
        length: int,
        pagemap: Pagemap,
        file: FileMemory | None = None,
    ) -> None:
        self.length_bytes = length
        self._pid = pid
        self._address = address
        self._pagemap = pagemap
        self._file = file

    def data_extents(self, *, start: int, length: int) -> Extents:
        """Ask the page tables, and the file: where the process has no copy, its pages show.

        Raises:
            StateError: the range is not in the memory or not page aligned.
            PeerError: the process has ended.
            StorageError: the file does not tell its holes.
        """
        check_range(start=start, length=length, length_bytes=self.length_bytes)
        first = self._address + start
        try:
            found = self._pagemap.ranges(first, first + length)
        except OSError as error:
            raise self._refusal(error.errno or 0) from None
        pairs = [(one - self._address, other - self._address) for one, other in found]
        if self._file is not None:
            shown = self._file.data_extents(start=start, length=length)
            ends = (shown.start + shown.length).tolist()
            pairs = _joined([*pairs, *zip(shown.start.tolist(), ends, strict=True)])
        return Extents.from_pairs(pairs)

    def data_bytes(self) -> int:
        """See `CopiedMemory.data_bytes`; raises as `data_extents`."""
        pieces = range(0, self.length_bytes, _COUNTED_BYTES)
        return sum(
            self.data_extents(
                start=start, length=min(_COUNTED_BYTES, self.length_bytes - start)
            ).total_bytes
            for start in pieces
        )

    def next_data(self, start: int) -> int:
        """See `CopiedMemory.next_data`; raises as `data_extents`."""
        check_range(start=start, length=0, length_bytes=self.length_bytes)
        end = self._address + self.length_bytes
        try:
            found = self._pagemap.next_there(self._address + start, end) - self._address
        except OSError as error:
            raise self._refusal(error.errno or 0) from None
        return found if self._file is None else min(found, self._file.next_data(start))

    def read(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        """See `CopiedMemory.read`; one system call for up to 1024 extents.

        Raises:
            HostError: no right to read this process.
            PeerError: it has ended, or unmapped the memory.
        """
        for first in range(0, len(extents), _RANGES_MAX):
            part = slice(first, first + _RANGES_MAX)
            offset, length = extents.start[part], extents.length[part]
            assert offset[0] >= start
            assert offset[-1] + length[-1] <= start + len(into)
            theirs = np.column_stack([offset + self._address, length])
            ours = np.column_stack([offset - start + into.ctypes.data, length])
            got = _LIBC.process_vm_readv(
                self._pid, ours.ctypes.data, len(ours), theirs.ctypes.data, len(theirs), 0
            )
            if got != int(length.sum()):
                # What is cut short ends before a page that cannot be had.
                raise self._refusal(ctypes.get_errno() if got < 0 else errno.EFAULT)

    def forget_holes(self) -> None:
        """See `CopiedMemory.forget_holes`; page tables are never remembered."""
        if self._file is not None:
            self._file.forget_holes()

    def probe(self) -> None:
        """Read one page, if there is one: whoever may do that may read the rest.

        Raises:
            HostError: no right to read this process.
            PeerError: as for `read`.
        """
        start = self.next_data(0)
        if start < self.length_bytes:
            page = np.empty(PAGE_SIZE, np.uint8)
            self.read(Extents.from_pairs([(start, start + PAGE_SIZE)]), page, start=start)

    def close(self) -> None:
        """Let go of the file; further calls do nothing."""
        if self._file is not None:
            self._file.close()

    def _refusal(self, number: int) -> HostError | PeerError:
        """Put a kernel error in our words."""
        what = f"the memory of process {self._pid}"
        if number == errno.ESRCH:
            return PeerError(f"{what} is gone: it has ended")
        if number == errno.EPERM:
            return HostError(f"no right to read {what}")
        if number == errno.ENOMEM:
            return LimitError(f"{what} cannot be read: out of memory")
        return PeerError(
            f"{what} at {self._address:#x} cannot be read: {os.strerror(number)}; "
            "it has ended, or unmapped it"
        )


def _joined(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of (start, end) pairs, sorted and disjoint."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(pairs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
