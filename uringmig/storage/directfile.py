"""The page descriptor of an image: O_DIRECT where it can be had, its alignment probed.

Direct I/O is a stated choice with three values. ``required`` fails with the cause and the cure;
``preferred`` goes on through the page cache and says so in ``note``; ``off`` never asks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Final

from msgspec import Struct

from uringmig.errors import StateError, StorageError
from uringmig.options import PAGE_SIZE, DirectMode
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.engine import Operation
from uringmig.storage.statx import statx_of

#: statx(2), Linux 6.1: ask for the alignment of direct I/O.
STATX_DIOALIGN: Final = 0x2000
#: Offset of stx_dio_mem_align in struct statx; stx_dio_offset_align follows.
_DIO_MEM_ALIGN_AT: Final = 152


class Alignment(Struct, frozen=True):
    """What every request must be a multiple of, in bytes: memory address; offset and length."""

    memory: int
    offset: int


#: Without O_DIRECT any address does; a resumed request keeps to sectors all the same.
BUFFERED_ALIGNMENT: Final = Alignment(memory=1, offset=512)
#: What every file system with O_DIRECT takes, for kernels that do not tell (before 6.1).
_SAFE_ALIGNMENT: Final = Alignment(memory=PAGE_SIZE, offset=PAGE_SIZE)


class DirectFile(Struct, frozen=True):
    """An open page descriptor.

    Attributes:
        fd: the descriptor, owned by the caller of `open_direct`.
        direct: whether O_DIRECT is really on.
        alignment: what requests must keep to.
        note: one line if the caller preferred O_DIRECT and it could not be had, else None.
    """

    fd: int
    direct: bool
    alignment: Alignment
    note: str | None = None


def open_direct(
    path: str, operation: Operation, mode: DirectMode, *, shown: str | None = None
) -> DirectFile:
    """Open an existing file a second time, for its pages.

    When writing, the file must be empty or expendable from offset 0: one page of zeros is written
    there as a probe, before the file gets its size.

    Args:
        path: the file.
        operation: what the descriptor is for.
        mode: whether O_DIRECT is wanted.
        shown: what messages call the file, if its path would tell nobody anything.

    Raises:
        StorageError: the file cannot be opened, or O_DIRECT is required and cannot be had.
    """
    access = os.O_RDONLY if operation is Operation.READ else os.O_WRONLY
    if mode == "off":
        return DirectFile(_open(path, access, shown), direct=False, alignment=BUFFERED_ALIGNMENT)
    reason: str | None
    try:
        fd = _open(path, access | os.O_DIRECT, shown)
    except StorageError as error:
        if error.errno != errno.EINVAL:
            raise
        reason = "this file system has no O_DIRECT"
    else:
        try:
            alignment = probe_alignment(fd)
            reason = _objection(fd, alignment, operation)
        except BaseException:
            os.close(fd)
            raise
        if reason is None:
            return DirectFile(fd, direct=True, alignment=alignment)
        os.close(fd)
    if mode == "required":
        raise StorageError(
            f"O_DIRECT is required, but {reason}",
            path=shown or path,
            cure="use a disk file system such as ext4, xfs or btrfs, or allow --direct preferred",
        )
    note = f"{shown or path}: no O_DIRECT ({reason}); going through the page cache"
    return DirectFile(_open(path, access, shown), False, BUFFERED_ALIGNMENT, note)


def adopt_direct(fd: int) -> DirectFile:
    """Take an O_DIRECT descriptor that the caller opened, as it is; it stays the caller's.

    Raises:
        StorageError: this file cannot be written with it, such as on ext4 with ``data=journal``.
    """
    alignment = probe_alignment(fd)
    reason = _misfit(alignment)
    if reason is not None:
        raise StorageError(f"O_DIRECT of descriptor {fd} is of no use: {reason}")
    return DirectFile(fd, direct=True, alignment=alignment)


def check_pair(direct_fd: int, main_fd: int) -> None:
    """Check two descriptors a caller passes for one image, as QEMU checks an fdset.

    They must be two separate opens (a dup shares the O_DIRECT bit) of one regular file, exactly
    the first with O_DIRECT, both for writing. QEMU: util/osdep.c, qemu_open_internal; an fdset
    without the O_DIRECT one kills QEMU 10.0's source (migration/file.c).

    Raises:
        StateError: names what is wrong with which descriptor.
    """
    flags = []
    for fd in (direct_fd, main_fd):
        try:
            flags.append(fcntl.fcntl(fd, fcntl.F_GETFL))
        except OSError as error:
            raise StateError(f"descriptor {fd}: {error.strerror}") from None
        if flags[-1] & os.O_ACCMODE == os.O_RDONLY:
            raise StateError(f"descriptor {fd} is not open for writing")
        if flags[-1] & os.O_APPEND:
            raise StateError(f"descriptor {fd} has O_APPEND; no offset would be kept to")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StateError(f"descriptor {fd} is not a regular file's")
    if flags[1] & os.O_ACCMODE != os.O_RDWR:
        raise StateError(
            f"the main stream's descriptor {main_fd} is not open for reading; "
            "what was written is read back before it is called safe"
        )
    if not flags[0] & os.O_DIRECT:
        raise StateError(f"the page descriptor {direct_fd} has no O_DIRECT")
    if flags[1] & os.O_DIRECT:
        raise StateError(
            f"the main stream's descriptor {main_fd} has O_DIRECT; "
            "it must be an open of its own without it, not a dup"
        )
    first, second = os.fstat(direct_fd), os.fstat(main_fd)
    if (first.st_dev, first.st_ino) != (second.st_dev, second.st_ino):
        raise StateError(f"descriptors {direct_fd} and {main_fd} are not of the same file")


def probe_alignment(fd: int) -> Alignment:
    """Ask statx(2) what direct I/O on ``fd`` must be aligned to.

    Raises:
        StorageError: the file system says that direct I/O is not possible on this file.
    """
    result = statx_of(fd, STATX_DIOALIGN)
    if result is None:
        return _SAFE_ALIGNMENT
    mask = int.from_bytes(result[:4], "little")
    if not mask & STATX_DIOALIGN:
        return _SAFE_ALIGNMENT
    memory, offset = (
        int.from_bytes(result[at : at + 4], "little")
        for at in (_DIO_MEM_ALIGN_AT, _DIO_MEM_ALIGN_AT + 4)
    )
    return Alignment(memory=memory, offset=offset)


def _misfit(alignment: Alignment) -> str | None:
    """Say why direct I/O with this alignment cannot move pages, or None."""
    if alignment.memory == 0 or alignment.offset == 0:
        return "this file system refuses it on this file"
    if alignment.memory > PAGE_SIZE or alignment.offset > PAGE_SIZE:
        return f"it would need {alignment.offset}-byte alignment, and pages are {PAGE_SIZE} bytes"
    return None


def _objection(fd: int, alignment: Alignment, operation: Operation) -> str | None:
    """Say why direct I/O cannot serve this file, by its word and by one trial, or None."""
    reason = _misfit(alignment)
    if reason is not None:
        return reason
    page = aligned_buffer(PAGE_SIZE)
    try:
        if operation is Operation.WRITE:
            os.pwrite(fd, page.data, 0)
        else:
            os.preadv(fd, [page.data], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise StorageError("the first direct request failed", errno=error.errno) from None
        return "a page-aligned direct request was refused"
    return None


def _open(path: str, flags: int, shown: str | None) -> int:
    """Open, with the path in the error."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError("cannot open", errno=error.errno, path=shown or path) from None
