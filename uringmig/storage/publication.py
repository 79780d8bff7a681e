"""How a file gets its name: NAME.partial, made durable, renamed, the folder synced.

A name without ``.partial`` is a whole, durable file. A sidecar is published with its file such that
no crash leaves a new file beside an old sidecar: the old sidecar goes first, the new one comes
last, and a file without one is still whole.

A partial file is locked with flock(2) while its writer lives, so a second writer is refused and
what a killed one left is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import Final

from uringmig.errors import StateError, StorageError
from uringmig.storage.mainfile import MainFile

PARTIAL: Final = ".partial"
#: QEMU creates its files so too (migration/file.c): guest memory is nobody else's business.
_MODE: Final = 0o600
#: NAME_MAX of linux/limits.h.
_NAME_BYTES_MAX: Final = 255


class Publication:
    """One file on its way to its final name.

    Args:
        path: the final name.
        sidecar: suffix of the sidecar's name.
        keep: what a killed writer left in the partial file stays there, for the caller to judge.

    Raises:
        StateError: the name cannot be a file's.
        StorageError: the partial file cannot be made, or another writer holds it.
    """

    def __init__(self, path: str | os.PathLike[str], *, sidecar: str, keep: bool = False) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.partial_path = self.path + PARTIAL
        self.sidecar_path = self.path + sidecar
        _check_name(self.path, longest=self.sidecar_path + PARTIAL)
        #: The buffered descriptor of the partial file; it also holds the lock.
        self.main = MainFile(_create_locked(self.partial_path, keep), self.partial_path)
        self._open = True

    def publish(self, sidecar: bytes | None) -> None:
        """Give the file, already durable, its final name; success is said only after this.

        Raises:
            StorageError: the name does not exist, or still holds its former content.
        """
        sidecar_partial = self.sidecar_path + PARTIAL
        folder = _open_folder(self.path)
        try:
            if sidecar is not None:
                _write_durable(sidecar_partial, sidecar)
            if _unlink(self.sidecar_path):
                os.fsync(folder)
            os.rename(self.partial_path, self.path)
            try:
                if sidecar is not None:
                    os.rename(sidecar_partial, self.sidecar_path)
                os.fsync(folder)
            except OSError:
                _unlink(self.path)
                _unlink(self.sidecar_path)
                raise
        except BaseException as error:
            with contextlib.suppress(OSError):
                _unlink(sidecar_partial)
            if isinstance(error, OSError):
                raise StorageError("cannot publish", errno=error.errno, path=self.path) from None
            raise
        finally:
            os.close(folder)
        self._close()

    def discard(self) -> None:
        """Remove the partial file, unless it was published; the final name is not touched.

        Where it cannot be removed (a disk that failed is read-only then) it stays, and the next
        writer of this name takes it over: the failure that led here is what matters.
        """
        if self._open:
            with contextlib.suppress(OSError):
                _unlink(self.partial_path)
            self._close()

    def _close(self) -> None:
        """Close the descriptor, and with it the lock."""
        self._open = False
        self.main.close()


def _check_name(path: str, *, longest: str) -> None:
    """Refuse what a rename could not replace, and a name whose length would only show then.

    ``longest`` is the longest name that will be made beside ``path``.
    """
    beyond = len(os.fsencode(os.path.basename(longest))) - _NAME_BYTES_MAX
    if beyond > 0:
        raise StateError(f"{path}: the name is {beyond} bytes too long for what goes beside it")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError("cannot look at", errno=error.errno, path=path) from None
    if not stat.S_ISREG(mode):
        raise StateError(f"{path}: exists and is not a regular file")


def _create_locked(path: str, keep: bool) -> int:
    """Create or take over the partial file, locked, and empty unless asked to keep it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            fd = os.open(path, flags, _MODE)
        except OSError as error:
            raise StorageError("cannot create", errno=error.errno, path=path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock its former owner may have renamed it: then it is not ours.
            if _same_file(fd, path):
                os.fchmod(fd, _MODE)
                if not keep:
                    os.ftruncate(fd, 0)
                return fd
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                raise StorageError(
                    "another save is writing this file", errno=error.errno, path=path
                ) from None
            raise StorageError("cannot prepare", errno=error.errno, path=path) from None
        os.close(fd)


def _same_file(fd: int, path: str) -> bool:
    """Say whether ``path`` still names the open file."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _open_folder(path: str) -> int:
    """Open the folder of ``path``, for its fsync."""
    try:
        return os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError("cannot open the folder", errno=error.errno, path=path) from None


def _write_durable(path: str, data: bytes) -> None:
    """Write a small file and make it durable; a link is not followed, a FIFO not waited for."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, _MODE)
    try:
        file = MainFile(fd, path)
        file.write_at(0, data)
        file.sync()
    finally:
        os.close(fd)


def _unlink(path: str) -> bool:
    """Remove a file; say whether there was one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        return True
    return False
