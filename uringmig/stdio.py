"""Standard streams that never get in the way, whatever the caller has left of them.

A daemon may start a program with descriptors 0 to 2 closed. The next files that are opened then get
these numbers, and what is printed goes into them: an image, a lock, a socket. And a terminal that
is gone, a reader that has left or a full disk below standard output are no reason to undo a save.
So the missing ones are opened first of all, and what cannot be written is dropped and remembered.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from typing import Final, TextIO

from uringmig.errors import StorageError

#: A chroot may be without /dev; what is written to a folder is refused, and dropped.
_NOTHINGS: Final = ((os.devnull, os.O_RDWR), ("/", os.O_RDONLY | os.O_DIRECTORY))


class _Sink(io.FileIO):
    """A descriptor that takes everything.

    Attributes:
        trouble: why something was dropped, or None. A reader that has gone is no trouble: it does
            not want what follows.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        # A terminal that was hung up does not call itself one any more.
        self._terminal = stat.S_ISCHR(os.fstat(number).st_mode)
        self._drops = False
        self.trouble: OSError | None = None

    def write(self, data: object, /) -> int:
        """Write all, or drop it and all that follows; as many bytes as were given."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        at = 0
        while at < len(view) and not self._drops:
            try:
                count = os.write(self.fileno(), view[at:])
            except BlockingIOError:
                # Somebody who shares it has made it non-blocking; a reader still is there.
                waiting = select.poll()
                waiting.register(self.fileno(), select.POLLOUT)
                waiting.poll()
                continue
            except OSError as error:
                self._drops = True
                gone = error.errno == errno.EPIPE or (self._terminal and error.errno == errno.EIO)
                self.trouble = None if gone else error
                break
            at += count
        return len(view)


def prepare() -> None:
    """Make the standard streams of this process safe to write to; harmless when called again."""
    occupy()
    if not isinstance(_sink_of(sys.stdout), _Sink):
        sys.stdout = _stream(1, sys.stdout)
    if not isinstance(_sink_of(sys.stderr), _Sink):
        sys.stderr = _stream(2, sys.stderr)


def occupy() -> None:
    """Open /dev/null in place of every standard descriptor that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is given, which in ascending order is this one.
            os.set_inheritable(_nothing(), True)


def trouble(stream: TextIO | None) -> StorageError | None:
    """Why something that was written to a standard stream was dropped, or None."""
    sink = _sink_of(stream)
    if isinstance(sink, _Sink) and sink.trouble is not None:
        return StorageError("cannot write the output", errno=sink.trouble.errno)
    return None


def _nothing() -> int:
    """A new descriptor that is of no use."""
    for path, flags in _NOTHINGS:
        try:
            return os.open(path, flags)
        except OSError:
            continue
    raise StorageError("cannot open even the root folder")


def _stream(number: int, before: TextIO | None) -> TextIO:
    """A text stream over a descriptor, in the encoding of the one before it."""
    encoding = "utf-8" if before is None else before.encoding
    if before is not None:
        before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(number)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def _sink_of(stream: TextIO | None) -> object:
    """What lies below a text stream."""
    return getattr(getattr(stream, "buffer", None), "raw", None)
