"""Files mapped as guest RAM: tmpfs (/dev/shm), memfd, hugetlbfs, and ordinary files.

Rules: the mapping is MAP_SHARED, so what a VMM has in the same file is what is seen. A hole is
never read through it: on tmpfs that allocates the page, on hugetlbfs a whole huge page, or SIGBUS
when the pool is empty. Whoever shrinks the file meanwhile makes this process die of SIGBUS: nothing
here can prevent that.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import StateError, StorageError
from uringmig.memory.faultaround import MADV_POPULATE_READ, FaultAround
from uringmig.memory.source import Extents, check_range
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.units import KiB, align_down, align_up, is_aligned

#: HUGETLBFS_MAGIC, include/uapi/linux/magic.h.
_HUGETLBFS_MAGIC: Final = 0x958458F6
#: TMPFS_MAGIC; of memfds, too.
_TMPFS_MAGIC: Final = 0x01021994
#: include/uapi/asm-generic/mman.h; the mmap module has no name for it in Python 3.11.
_MAP_NORESERVE: Final = 0x4000
#: How much of a huge page is looked at in one go for a nonzero byte; fits the L2 cache.
_PROBE_BYTES: Final = 256 * KiB

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_LIBC.fstatfs.restype = ctypes.c_int
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.madvise.restype = ctypes.c_int


class FileMemory:
    """A range of a file mapped into this process, as a `MemorySource` or `MemorySink`.

    Args:
        file: path, or an open descriptor, which is duplicated: the caller keeps and closes his, but
            its file position moves.
        offset: where in the file the memory begins; page aligned.
        length: bytes of memory, whole pages; None is everything from ``offset`` to the end.
        writable: map for writing, as a sink; a descriptor must then be open for both.

    Raises:
        StateError: not a regular file, or the range is not in it or not page aligned.
        StorageError: the kernel refused to open or to map.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | int,
        *,
        offset: int = 0,
        length: int | None = None,
        writable: bool = False,
    ) -> None:
        self._name = f"descriptor {file}" if isinstance(file, int) else os.fspath(file)
        self._view: NDArray[np.uint8] | None = None
        # A range of offsets last seen to be data. SEEK_HOLE walks the page cache to the end of the
        # extent (7 ms a GiB): asked anew for each window, a dense guest would cost hours.
        self._known_data = (0, 0)
        self._asking = threading.Lock()
        self._fd = self._open(file, writable)
        try:
            kind, block_bytes = _file_system(self._fd)
            self._in_memory = kind in (_TMPFS_MAGIC, _HUGETLBFS_MAGIC)
            self._huge_page_bytes = block_bytes if kind == _HUGETLBFS_MAGIC else 0
            self.length_bytes = self._checked_length(offset, length)
            self._offset = offset
            self._view = self._map(writable)
        except BaseException:
            os.close(self._fd)
            raise
        self._around = FaultAround()

    def _open(self, file: str | os.PathLike[str] | int, writable: bool) -> int:
        """Get a descriptor of our own."""
        try:
            if isinstance(file, int):
                return os.dup(file)
            return os.open(file, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise self._refusal("cannot be opened as guest memory", error) from error

    def _checked_length(self, offset: int, length: int | None) -> int:
        """Say how long the memory is, or raise StateError."""
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(f"{self._name}: not a regular file, cannot be mapped as guest memory")
        length = status.st_size - offset if length is None else length
        if offset < 0 or length <= 0 or offset + length > status.st_size:
            raise StateError(
                f"{self._name}: {length} bytes at offset {offset} are not in a file of "
                f"{status.st_size} bytes"
            )
        if not is_aligned(offset, PAGE_SIZE) or not is_aligned(length, PAGE_SIZE):
            raise StateError(
                f"{self._name}: {length} bytes at offset {offset} are not whole pages of "
                f"{PAGE_SIZE}"
            )
        return length

    def _map(self, writable: bool) -> NDArray[np.uint8]:
        """Map the range and view it; the view alone keeps the mapping alive."""
        granule = self._huge_page_bytes or PAGE_SIZE
        first = align_down(self._offset, granule)
        flags = mmap.MAP_SHARED
        if self._huge_page_bytes and not writable:
            # Otherwise the kernel sets huge pages aside for every hole, or fails for want of them.
            flags |= _MAP_NORESERVE
        try:
            mapping = mmap.mmap(
                self._fd,
                align_up(self._offset + self.length_bytes, granule) - first,
                flags=flags,
                prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
                offset=first,
            )
        except OSError as error:
            cure = None
            if self._huge_page_bytes and error.errno == errno.ENOMEM:
                cure = f"free huge pages of {self._huge_page_bytes} bytes (vm.nr_hugepages)"
            raise self._refusal("cannot be mapped", error, cure=cure) from error
        return np.frombuffer(mapping, np.uint8)[self._offset - first :][: self.length_bytes]

    @property
    def view(self) -> NDArray[np.uint8]:
        """The memory, 1-D uint8; read-only unless ``writable``. Not to be read in holes."""
        if self._view is None:
            raise StateError(f"{self._name}: the memory is closed")
        return self._view

    @property
    def address(self) -> int:
        """Address of the first byte; page aligned."""
        return self.view.ctypes.data

    def data_extents(self, *, start: int, length: int) -> Extents:
        """Find what is not a hole; on hugetlbfs, where the kernel does not tell, what is not zero.

        While the file is written a page that was a hole may be data a moment later.

        Raises:
            StateError: the range is not in the memory or not page aligned, or it is closed.
            StorageError: the kernel refused to tell.
        """
        check_range(start=start, length=length, length_bytes=len(self.view))
        first, limit = self._offset + start, self._offset + start + length
        try:
            find = self._nonzero_ranges if self._huge_page_bytes else self._data_ranges
            found = find(first, limit)
        except OSError as error:
            raise self._refusal("does not tell its holes", error, offset=first) from error
        return Extents.from_pairs([(a - self._offset, b - self._offset) for a, b in found])

    def data_bytes(self) -> int:
        """Count what is no hole; see `MemorySource.data_bytes`.

        Files that lie in memory have a count of their pages. Others are asked for their extents,
        window by window: what they count may be compressed, or another part of the file.
        """
        length = len(self.view)
        status = os.fstat(self._fd)
        if self._in_memory and (self._offset, length) == (0, status.st_size):
            return min(length, status.st_blocks * 512)
        return sum(
            self.data_extents(start=start, length=min(WINDOW_BYTES, length - start)).total_bytes
            for start in range(0, length, WINDOW_BYTES)
        )

    def next_data(self, start: int) -> int:
        """Ask SEEK_DATA; see `MemorySource.next_data`. hugetlbfs does not tell, so ``start``."""
        check_range(start=start, length=0, length_bytes=len(self.view))
        if self._huge_page_bytes:
            return start
        position = self._offset + start
        try:
            found = os.lseek(self._fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return self.length_bytes
            raise self._refusal("does not tell its holes", error, offset=position) from error
        found = align_down(max(found, position), PAGE_SIZE)
        return min(found - self._offset, self.length_bytes)

    def copy_out(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        """Read the file: unlike a look through the mapping, that allocates no page of a new hole.

        Raises:
            StateError: it is closed.
            StorageError: the kernel refused, or the file has become shorter.
        """
        if self._view is None:
            raise StateError(f"{self._name}: the memory is closed")
        target = into.data
        for first, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True):
            at, end = first, first + length
            while at < end:
                try:
                    got = os.preadv(self._fd, [target[at - start : end - start]], self._offset + at)
                except OSError as error:
                    raise self._refusal("cannot be read", error, offset=at) from error
                if got == 0:
                    raise StorageError("the file became shorter", path=self._name, offset=at)
                at += got

    def forget_holes(self) -> None:
        """See `MemorySource.forget_holes`."""
        with self._asking:
            self._known_data = (0, 0)

    def prefault(self, *, start: int, length: int) -> None:
        """Map a range in with one system call; see `MemorySource.prefault`.

        On this mapping faults come every 16 pages (the kernel's fault-around) and cost, in a
        virtual machine, more than all else that a scan does.
        """
        if not self._huge_page_bytes and self._around.map_in(self.address + start, length):
            return
        _LIBC.madvise(self.address + start, length, MADV_POPULATE_READ)

    def map_out(self, *, start: int, length: int) -> None:
        """Unmap a range; see `MemorySource.map_out`. The file keeps its pages."""
        _LIBC.madvise(self.address + start, length, mmap.MADV_DONTNEED)

    def _data_ranges(self, first: int, limit: int) -> list[tuple[int, int]]:
        """Ask SEEK_DATA and SEEK_HOLE; file offsets, rounded outwards to pages."""
        ranges = []
        position = first
        while position < limit:
            try:
                known_first, known_limit = self._data_at(position, limit)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # Nothing but hole up to the end of the file.
                raise
            range_first = align_down(max(position, known_first), PAGE_SIZE)
            range_limit = min(align_up(known_limit, PAGE_SIZE), limit)
            if range_first < range_limit:
                # Rounding outwards makes neighbours meet where file system blocks are under 4 KiB.
                ranges.append((range_first, range_limit))
            position = max(range_limit, range_first)
        return ranges

    def _data_at(self, position: int, limit: int) -> tuple[int, int]:
        """Find the data that an offset lies in, or the next after it: first byte and end.

        Where it begins beyond ``limit`` its end is not asked for, and is told to be there, too.
        Channels begin at the same time, and one walk through the page cache is enough for all.
        """
        with self._asking:
            known_first, known_limit = self._known_data
            if not known_first <= position < known_limit:
                known_first = os.lseek(self._fd, position, os.SEEK_DATA)
                if known_first >= limit:
                    return known_first, known_first
                known_limit = os.lseek(self._fd, known_first, os.SEEK_HOLE)
                self._known_data = (known_first, known_limit)
            return known_first, known_limit

    def _nonzero_ranges(self, first: int, limit: int) -> list[tuple[int, int]]:
        """Read, which allocates nothing, until each huge page shows a nonzero byte or ends."""
        status = os.fstat(self._fd)
        if status.st_blocks * 512 >= status.st_size:
            return [(first, limit)]  # Fully populated: no hole to be wary of.
        buffer = memoryview(bytearray(_PROBE_BYTES))
        ranges = []
        position = first
        while position < limit:
            page_limit = align_down(position, self._huge_page_bytes) + self._huge_page_bytes
            page_limit = min(page_limit, limit)
            if self._any_nonzero(position, page_limit, buffer):
                ranges.append((position, page_limit))
            position = page_limit
        return ranges

    def _any_nonzero(self, first: int, limit: int, buffer: memoryview) -> bool:
        """Say whether a range of the file holds a nonzero byte; the first 4 KiB often tell."""
        position, piece = first, PAGE_SIZE
        while position < limit:
            got = os.preadv(self._fd, [buffer[: min(piece, limit - position)]], position)
            if got == 0:
                raise OSError(errno.EIO, "the file became shorter")
            if np.frombuffer(buffer[:got], np.uint8).any():
                return True
            position, piece = position + got, len(buffer)
        return False

    def close(self) -> None:
        """Let go of mapping and descriptor; further calls do nothing.

        Views handed out earlier keep the mapping alive; an address does not.
        """
        if self._view is not None:
            self._view = None
            self._around.close()
            os.close(self._fd)

    def _refusal(
        self, what: str, error: OSError, *, offset: int | None = None, cure: str | None = None
    ) -> StorageError:
        """Put a kernel error in our words."""
        return StorageError(what, errno=error.errno, path=self._name, offset=offset, cure=cure)


def create_memfd(name: str, length: int, *, hugetlb: bool = False) -> int:
    """Make an anonymous shared memory file of ``length`` bytes, all holes.

    Args:
        name: shown in /proc; need not be unique.
        length: bytes; with ``hugetlb`` a multiple of the system's default huge page size.
        hugetlb: back it by huge pages, which are taken from the pool when first written.

    Returns:
        A descriptor, close-on-exec, owned by the caller.

    Raises:
        StorageError: the kernel refused.
    """
    flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if hugetlb else 0)
    fd = -1
    try:
        fd = os.memfd_create(name, flags)
        os.ftruncate(fd, length)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        cure = (
            "the length must be a multiple of the huge page size" if hugetlb and fd >= 0 else None
        )
        raise StorageError(
            f"no memory file of {length} bytes", errno=error.errno, path=name, cure=cure
        ) from error
    return fd


def _file_system(fd: int) -> tuple[int, int]:
    """Magic number and block size of the file system a file is of; hugetlbfs: of a huge page."""
    # struct statfs begins with f_type and f_bsize, both long, and is shorter than 256 bytes.
    status = (ctypes.c_long * 32)()
    if _LIBC.fstatfs(fd, status) != 0:
        raise StorageError("fstatfs failed", errno=ctypes.get_errno())
    return status[0], status[1]
