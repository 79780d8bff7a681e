"""The plain buffered descriptor of an image: the main stream, whose pieces are never aligned.

A second open of the file, never a dup of the page descriptor: O_DIRECT belongs to the open file
description, so one description cannot serve both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final

from uringmig.errors import StorageError

#: Least bytes a read asks for while the stream's length is unknown.
READ_BYTES: Final = 64 * 1024
#: linux/falloc.h.
_FALLOC_FL_KEEP_SIZE: Final = 0x1
_FALLOC_FL_PUNCH_HOLE: Final = 0x2


class MainFile:
    """Positioned reads and writes on one buffered descriptor, whole or an error."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self.fd).st_size

    @property
    def allocated(self) -> int:
        """Bytes that the file system has allocated for it; a hole counts nothing."""
        return os.fstat(self.fd).st_blocks * 512

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at ``offset``; a short count goes on where it stopped.

        Raises:
            StorageError: with the errno and the offset.
        """
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                raise StorageError(
                    "write failed", errno=error.errno, path=self.path, offset=offset + done
                ) from None
            if count == 0:
                raise StorageError("nothing was written", path=self.path, offset=offset + done)
            done += count

    def read_at(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes, or fewer only where the file ends.

        Raises:
            StorageError: with the errno and the offset.
        """
        pieces = []
        while length > 0:
            try:
                piece = os.pread(self.fd, length, offset)
            except OSError as error:
                raise StorageError(
                    "read failed", errno=error.errno, path=self.path, offset=offset
                ) from None
            if not piece:
                break
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def data_pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what is not a hole between ``start`` and ``end``.

        Raises:
            StorageError: the kernel refused to tell.
        """
        while start < end:
            try:
                start = os.lseek(self.fd, start, os.SEEK_DATA)
                hole = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                    return
                raise StorageError(
                    "cannot look for holes", errno=error.errno, path=self.path, offset=start
                ) from None
            if start < end:
                yield start, min(hole, end) - start
            start = hole

    def set_size(self, size: int) -> None:
        """Give the file its length before the first page write.

        A write that extends a file is serialised by the file system; one inside it need not be.

        Raises:
            StorageError: for example EFBIG on a file system with a lower limit.
        """
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise StorageError(
                f"cannot make the file {size} bytes long", errno=error.errno, path=self.path
            ) from None

    def punch_hole(self, offset: int, length: int) -> int:
        """Free the blocks of a range whose bytes nobody needs; its bytes are zero afterwards.

        Only an offer: a file system that cannot keeps them.

        Returns:
            The errno; 0 if it could.
        """
        return self._fallocate(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length)

    def allocate(self, offset: int, length: int) -> None:
        """Give a range its blocks; its bytes stay as they are, zero where there was a hole.

        Not posix_fallocate, which writes to every block where the file system cannot do this.

        Raises:
            StorageError: for example ENOSPC, or EOPNOTSUPP; part of the range may have its blocks.
        """
        number = self._fallocate(0, offset, length)
        if number:
            raise StorageError("fallocate failed", errno=number, path=self.path, offset=offset)

    def _fallocate(self, mode: int, offset: int, length: int) -> int:
        """Call fallocate(2), again after a signal; return the errno, 0 if all went well."""
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
        fallocate.restype = ctypes.c_int
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        while fallocate(self.fd, mode, offset, length):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                return number
        return 0

    def sync(self) -> None:
        """Make data and size durable; O_DIRECT data may still lie in the device's own cache.

        Raises:
            StorageError: nothing may be said to be safe after this.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise StorageError("fdatasync failed", errno=error.errno, path=self.path) from None

    def close(self) -> None:
        """Close the descriptor; harmless when called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def drop_cache(self) -> None:
        """Let the kernel forget clean cached pages of this file, so that others' stay."""
        with contextlib.suppress(OSError):  # advice: a file system may not take it
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def open_for_reading(path: str) -> MainFile:
    """Open an image's main stream for reading.

    Raises:
        StorageError: it cannot be opened, or is not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would block
    except OSError as error:
        raise StorageError("cannot open", errno=error.errno, path=path) from None
    if not os.path.isfile(f"/proc/self/fd/{fd}"):
        os.close(fd)
        raise StorageError("not a regular file", path=path)
    return MainFile(fd, path)
