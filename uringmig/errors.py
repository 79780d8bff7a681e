"""Every error uringmig raises on purpose, by who is at fault.

    UringmigError                 exit code
    +-- StateError       2   the caller: a wrong argument, a call out of order
    +-- BytesError       3
    |   +-- FormatError      the bytes of a file or stream break their format
    |   +-- MismatchError    two things that should be equal are not
    +-- PeerError        4   the other side: QEMU, its QMP socket, its stream
    |   +-- BusyError        it is there but taken, or not there yet
    +-- StorageError     5   the kernel or the disk: ENOSPC, EIO, no O_DIRECT where required
    +-- HostError        6   this machine cannot: no io_uring and nothing allowed to replace it
        +-- LimitError       at this moment: no memory, thread, process or descriptor is left
            +-- StorageLimitError   a StorageError, too: learned from a call on a file

The error knows its exit code; the command line catches the base class in one place. A traceback
therefore means a bug of ours.
"""

from __future__ import annotations

import errno as errno_names
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Final, Self

#: EX_SOFTWARE of sysexits.h: of a bug of ours. Python's own would be 1, which is a warning here.
BUG_EXIT_CODE: Final = 70
#: What a kernel says of a moment, not of a disk.
_PASSING: Final = frozenset(
    {errno_names.EAGAIN, errno_names.EBUSY, errno_names.EINTR, errno_names.ENOMEM}
)
#: What a limit of this process or of its host makes the kernel say, wherever it is said.
_LIMITS: Final = {
    errno_names.EMFILE: "raise its limit of open files (ulimit -n, LimitNOFILE=)",
    errno_names.ENFILE: "the host has too many open files (fs.file-max)",
    errno_names.EAGAIN: "raise its limit of processes (ulimit -u, TasksMax=)",
    errno_names.ENOMEM: "give it more memory (ulimit -v, MemoryMax=)",
}
#: Those that are never said of the file itself; EAGAIN is, of one that somebody has locked.
_FILE_LIMITS: Final = frozenset({errno_names.EMFILE, errno_names.ENFILE, errno_names.ENOMEM})
#: What a disk makes it say.
_STORAGE: Final = frozenset(
    {
        errno_names.ENOSPC, errno_names.EDQUOT, errno_names.EFBIG, errno_names.EIO,
        errno_names.EROFS, errno_names.ESTALE,
    }
)  # fmt: skip
_NO_MEMORY_TO_LOAD: Final = ("failed to map segment", "annot allocate memory")


class UringmigError(Exception):
    """Base of all errors that are not bugs of ours; ``str()`` is one line for an operator."""

    exit_code: ClassVar[int] = 1

    @property
    def may_pass(self) -> bool:
        """The same attempt, later, may succeed although nobody changes anything."""
        return False


class StateError(UringmigError):
    """The caller's fault: a bad argument, or a call that does not fit the present state."""

    exit_code = 2


class BytesError(UringmigError):
    """What `FormatError` and `MismatchError` share: the place, and two values that disagree.

    Attributes:
        what: the field or rule at fault.
        offset: absolute file or stream offset in bytes of the field, or None.
        block: idstr of the ramblock concerned, or None.
        expected: what should be there, or None.
        found: what is there, or None.
        detail: where in it more exactly, in words, or None.
        path: the file at fault, where somebody has said so with `naming`, or None.
    """

    exit_code = 3
    path: str | None = None

    def __init__(
        self,
        what: str,
        *,
        offset: int | None = None,
        block: str | None = None,
        expected: object = None,
        found: object = None,
        detail: str | None = None,
    ) -> None:
        self.what = what
        self.offset = offset
        self.block = block
        self.expected = expected
        self.found = found
        self.detail = detail
        line = what if block is None else f"ramblock {block!r}: {what}"
        if offset is not None:
            line += f" at offset {offset:#x}"
        details = [] if expected is None else [f"expected {expected}"]
        if found is not None:
            details.append(f"found {found}")
        if detail is not None:
            details.append(detail)
        super().__init__(line + (f" ({', '.join(details)})" if details else ""))


class FormatError(BytesError):
    """The bytes of a file or stream break a rule of their format."""


class MismatchError(BytesError):
    """Two things that should be equal are not: an image and its manifest, a block and a buffer."""


class PeerError(UringmigError):
    """QEMU, its QMP socket or its migration stream failed or refused."""

    exit_code = 4


class BusyError(PeerError):
    """The other side is taken by another client, or not (yet) there: this may pass."""

    @property
    def may_pass(self) -> bool:
        """The other client may leave, and a migration end."""
        return True


class StorageError(UringmigError):
    """The kernel or the disk refused.

    Made with an errno that tells of a limit of this process or its host, and of nothing about the
    file, it is a `StorageLimitError`.

    Attributes:
        errno: the kernel's number, or None where there is none.
        path: the file concerned, or None.
        offset: file offset in bytes of the failed request, or None.
    """

    exit_code = 5

    def __new__(cls, *args: object, errno: int | None = None, **_: object) -> Self:
        """Make a `StorageLimitError` where the errno is that of a limit.

        Without arguments too: libraries that carry an error to another process call it so, and fill
        in the attributes afterwards.
        """
        limited = cls is StorageError and errno in _FILE_LIMITS
        # A subclass, which has its own name; whoever asks for StorageError gets one.
        return super().__new__(StorageLimitError if limited else cls, *args)  # type: ignore[return-value]

    def __init__(
        self,
        what: str,
        *,
        errno: int | None = None,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        cure: str | None = None,
    ) -> None:
        self.errno = errno
        self.path = None if path is None else os.fspath(path)
        self.offset = offset
        where = "" if self.path is None else f"{self.path}: "
        at = "" if offset is None else f" at offset {offset:#x}"
        why = ""
        if errno is not None:
            why = f": {os.strerror(errno)} ({errno_names.errorcode.get(errno, errno)})"
        super().__init__(f"{where}{what}{at}{why}" + ("" if cure is None else f"; {cure}"))

    @property
    def is_absent(self) -> bool:
        """Whether it failed because there is no such file."""
        return self.errno == errno_names.ENOENT

    @property
    def may_pass(self) -> bool:
        """A lock may be given back and memory found; a full or failing disk stays as it is."""
        return self.errno in _PASSING


class HostError(UringmigError):
    """This machine lacks something that was required; the message names the cause and the cure."""

    exit_code = 6


class LimitError(HostError):
    """This process is not given the memory, thread, process or descriptor that it needs."""

    @property
    def may_pass(self) -> bool:
        """Other processes may give some back."""
        return True


class StorageLimitError(StorageError, LimitError):
    """A call on a file failed for want of a descriptor or of memory; the file may be all right."""

    exit_code = LimitError.exit_code

    def __init__(
        self,
        what: str,
        *,
        errno: int | None = None,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        cure: str | None = None,
    ) -> None:
        cure = cure or _LIMITS.get(errno or 0)
        super().__init__(what, errno=errno, path=path, offset=offset, cure=cure)

    @property
    def may_pass(self) -> bool:
        """Somebody else gives some back."""
        return True


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, an error about bytes gets the file's name in front, if it has it not."""
    try:
        yield
    except BytesError as error:
        name = os.fspath(path)
        if error.path is None and name not in str(error):
            error.path = name
            error.args = (f"{name}: {error}",)
        raise


def explained(error: BaseException) -> UringmigError | None:
    """The one-line error for trouble that any step may meet; None if ``error`` is something else.

    A process that has no more memory, threads, processes or descriptors, or whose disk is full or
    failing, may learn it at any step: that is no bug, and deserves one line.
    """
    if isinstance(error, MemoryError):
        return LimitError(f"out of memory; {_LIMITS[errno_names.ENOMEM]}")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return LimitError(f"no more threads for this process; {_LIMITS[errno_names.EAGAIN]}")
    if isinstance(error, ImportError):
        if any(words in str(error) for words in _NO_MEMORY_TO_LOAD):
            return LimitError(f"out of memory; {_LIMITS[errno_names.ENOMEM]}")
        return None
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in _LIMITS:
        return LimitError(f"{os.strerror(error.errno)}; {_LIMITS[error.errno]}")
    if error.errno in _STORAGE:
        return StorageError("the kernel refused", errno=error.errno, path=error.filename)
    return None
