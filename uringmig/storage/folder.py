"""What a folder lets us do with names: which one may be replaced, and how names become durable."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import Final

from uringmig.errors import StateError, StorageError
from uringmig.storage.statx import ATTR_APPEND, ATTR_IMMUTABLE, ATTR_MOUNT_ROOT, attributes_of

#: What a file system answers to an fsync of a folder that it does not know (fsync(2)).
_NO_FOLDER_SYNC: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})


class Folder:
    """A file's folder, in which it gets its name; open from before the first byte is written.

    Args:
        file: the file's path.

    Raises:
        StorageError: it cannot be opened.
    """

    def __init__(self, file: str) -> None:
        self._path = path = os.path.dirname(file)
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            # May be written and not read: names can be given, and `sync` has another way.
            pass
        except OSError as error:
            raise StorageError("cannot open its folder", errno=error.errno, path=file) from None

    def sync(self, inside: int) -> str | None:
        """Make all names in it durable.

        Args:
            inside: descriptor of a file on the same file system.

        Returns:
            A note where the file system makes no promise, else None.

        Raises:
            OSError: nothing may be said to be safe after this.
        """
        note = None
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            except OSError as error:
                if error.errno not in _NO_FOLDER_SYNC:
                    raise
                note = f"{self._path}: the file system does not say when a name is durable"
            else:
                return None
        _sync_file_system(inside)
        return note

    def close(self) -> None:
        """Close the descriptor; harmless when called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and removals in a folder durable, as far as its file system knows how.

    Raises:
        OSError: they may not be.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def final_name(path: str | os.PathLike[str]) -> str:
    """The absolute name of the file that is to be made.

    A symbolic link is followed, as QEMU follows it: the file is made, or replaced, where the link
    leads to, and the link stays. A dangling link's target is made.

    Raises:
        StateError: it cannot be a file's name.
        StorageError: it cannot be looked at.
    """
    given = os.fsdecode(path)
    folder, name = os.path.split(given)
    if name in ("", ".", ".."):
        raise StateError(f"{given!r} is the name of a folder; name a file")
    folder = os.path.join(os.getcwd(), folder)
    # What is before a ".." may be a link: only the kernel knows where that leads.
    folder = os.path.realpath(folder) if ".." in Path(folder).parts else os.path.abspath(folder)
    absolute = os.path.join(folder, name)
    exists = _check_regular(absolute)
    if not os.path.islink(absolute):
        return absolute
    target = os.path.realpath(absolute)
    if exists and not os.path.exists(target):
        raise StateError(f"{given}: leads to a file that has no name")
    return target


def beside(path: str | os.PathLike[str], suffix: str) -> str:
    """The name of what was published beside a file, which may be named by a link.

    It is beside the file that the link leads to; only where nothing is there, beside the link.
    """
    name = os.fsdecode(path)
    target = os.path.realpath(name) + suffix
    return target if os.path.islink(name) and os.path.exists(target) else name + suffix


def check_replaceable(path: str) -> None:
    """Refuse a name that a rename could not replace, before anything is written.

    Raises:
        StateError: it is a folder's.
        StorageError: names what is in the way.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        raise StateError(f"{path}: is a folder, and a file would go there")
    if attributes_of(os.path.dirname(path)) & (ATTR_APPEND | ATTR_IMMUTABLE):
        raise StorageError(
            "cannot be published: the folder is immutable or append-only",
            path=path,
            cure="choose another folder, or see chattr(1)",
        )
    attributes = attributes_of(path)
    if attributes & ATTR_MOUNT_ROOT:
        raise StorageError(
            "cannot be replaced: something is mounted on it",
            errno=errno.EBUSY,
            path=path,
            cure="mount its folder instead, and name a file in that",
        )
    if attributes & (ATTR_APPEND | ATTR_IMMUTABLE):
        raise StorageError(
            "cannot be replaced: it is immutable or append-only",
            errno=errno.EPERM,
            path=path,
            cure="see chattr(1)",
        )
    try:
        # rmdir(2) never removes a file, but tells whether this user might: that is checked first.
        os.rmdir(path)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise StorageError(
                "cannot be replaced: it is another user's, and in this folder only the owner may "
                "replace a file",
                errno=error.errno,
                path=path,
            ) from None


def _check_regular(path: str) -> bool:
    """Refuse what is there and no file; say whether there is one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StateError(f"{path}: a loop of symbolic links") from None
        raise StorageError("cannot look at", errno=error.errno, path=path) from None
    if not stat.S_ISREG(mode):
        raise StateError(f"{path}: exists and is not a regular file")
    return True


def _sync_file_system(fd: int) -> None:
    """syncfs(2), which Python does not have.

    Raises:
        OSError: what was written is not all durable.
    """
    syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    syncfs.argtypes = [ctypes.c_int]
    if syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
