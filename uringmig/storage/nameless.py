"""A file without a name: it is gone with its last descriptor, however the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from uringmig.errors import StorageError
from uringmig.storage.mainfile import MainFile

#: What a file system without O_TMPFILE answers (open(2)); an old kernel takes it for a folder.
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
#: How the names begin that such files have for a moment where there is no O_TMPFILE.
PREFIX: Final = ".uringmig-"
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC
_MODE: Final = 0o600


@contextlib.contextmanager
def nameless_file(folder: str) -> Iterator[MainFile]:
    """Open an empty file in ``folder`` for the time of a ``with`` block.

    Its room is given back, and that made durable, before the block is left, so that the next file
    does not pay for it.

    Raises:
        StorageError: no file can be made there.
    """
    try:
        fd = _create(folder)
    except OSError as error:
        raise StorageError("cannot make a file in", errno=error.errno, path=folder) from None
    file = MainFile(fd, folder)
    try:
        yield file
        file.set_size(0)
        file.sync()
    finally:
        file.close()


def owner_of_new_files(folder: str) -> int:
    """User id that a file gets which this process makes in ``folder``.

    Not always its own: an export may map it, and some file systems know only one owner.

    Raises:
        OSError: no file can be made there.
    """
    fd = _create(folder)
    try:
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)


def path_of(file: MainFile) -> str:
    """A path by which a nameless file can be opened once more."""
    return f"/proc/self/fd/{file.fd}"


def _create(folder: str) -> int:
    """Make the file nameless from the start where the file system can, else right afterwards."""
    try:
        return os.open(folder, os.O_TMPFILE | _FLAGS, _MODE)
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not os.path.isdir(folder):
            raise
    path = os.path.join(folder, f"{PREFIX}{os.urandom(8).hex()}")
    try:
        return os.open(path, os.O_CREAT | os.O_EXCL | _FLAGS, _MODE)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
