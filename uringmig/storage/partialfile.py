"""The file that is written before it has its name: made or taken over, locked, its owner's only.

It is locked with flock(2) while its writer lives, so a second writer is refused and what a killed
one left is taken over. Modes and locks are courtesies of the file system: where it has none the
file is written all the same, and a note says what that means (see `storage.filelock`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from uringmig.errors import StorageError
from uringmig.storage.filelock import take_lock
from uringmig.storage.nameless import owner_of_new_files

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def take(path: str, *, keep: bool, mode: int) -> tuple[int, tuple[str, ...]]:
    """Create or take over a partial file, locked, and empty unless it is to be kept as it is.

    Args:
        path: its name.
        keep: what a killed writer left in it stays.
        mode: for whom it is.

    Returns:
        Its descriptor, which also holds the lock; and notes for the operator.

    Raises:
        StorageError: it cannot be made, another writer holds it, or it is another user's.
    """
    while True:
        fd, created = _open(path, mode)
        try:
            note = _lock(fd, path, created)
            # Between open and lock its former owner may have renamed it: then it is not ours.
            if not same_file(fd, path):
                os.close(fd)
                continue
        except BaseException:
            os.close(fd)
            raise
        try:
            if not created:
                _check_ours(fd, path)
            notes = (note, _shut_to_others(fd, path, mode))
            if not keep:
                os.ftruncate(fd, 0)
        except BaseException as error:
            if created:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(fd)
            if isinstance(error, OSError):
                raise StorageError("cannot prepare", errno=error.errno, path=path) from None
            raise
        return fd, tuple(text for text in notes if text is not None)


def same_file(fd: int, path: str) -> bool:
    """Say whether ``path`` names the open file."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def is_written(path: str) -> bool:
    """Say whether a writer of ours holds the file's lock; not of one that does not exist."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        take_lock(fd)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _open(path: str, mode: int) -> tuple[int, bool]:
    """Open the file; say whether it was made just now."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, mode), True
        except FileExistsError:
            pass
        except OSError as error:
            raise StorageError("cannot create", errno=error.errno, path=path) from None
        try:
            return os.open(path, flags), False
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError("cannot create", errno=error.errno, path=path) from None


def _lock(fd: int, path: str, created: bool) -> str | None:
    """Lock the file, or say why it must do without."""
    try:
        trouble = take_lock(fd)
    except BlockingIOError as error:
        raise StorageError(
            "another save is writing this file", errno=error.errno, path=path
        ) from None
    except OSError as error:
        raise StorageError("cannot lock", errno=error.errno, path=path) from None
    if trouble is None:
        return None
    if not created:
        # Its writer may live: only who made the file just now knows that he is alone.
        raise StorageError(
            "another save is writing this file or left it, and this file system has no locks to "
            "tell",
            path=path,
            cure="remove it if no save is running",
        )
    return f"{path}: {trouble}"


def _check_ours(fd: int, path: str) -> None:
    """Refuse a file that another user laid there: whoever made it can read what is put into it."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise StorageError("exists and is not a regular file", path=path)
    if found.st_nlink != 1:
        raise StorageError("has another name too; it is not touched", path=path)
    # Some file systems give every file one owner, whoever makes it.
    if found.st_uid not in (os.geteuid(), owner_of_new_files(os.path.dirname(path))):
        raise StorageError(
            f"belongs to another user (uid {found.st_uid}) and is not taken over",
            path=path,
            cure="remove it if no save is running",
        )


def _shut_to_others(fd: int, path: str, mode: int) -> str | None:
    """Give the file its mode where it has another; say so if others may read it all the same."""
    if stat.S_IMODE(os.fstat(fd).st_mode) == mode:
        return None
    why = ""
    try:
        os.fchmod(fd, mode)
    except OSError as error:
        why = f" ({errno.errorcode.get(error.errno or 0, error.errno)})"
    if stat.S_IMODE(os.fstat(fd).st_mode) & _OTHERS & ~mode:
        return f"{path}: others may read it: the file system keeps no modes{why}"
    return None
