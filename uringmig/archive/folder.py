"""The folder of an archive: made, recognized, locked against a second writer, made durable."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from uringmig.archive.catalogue import NAME as CATALOGUE_NAME
from uringmig.archive.entry import split_image_name
from uringmig.errors import StateError, StorageError
from uringmig.image.manifest import SUFFIX as MANIFEST_SUFFIX
from uringmig.storage import folder as storage_folder
from uringmig.storage.filelock import take_lock

_LOCK: Final = ".lock"
#: Guest memory is nobody else's business, as for the images themselves.
_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
#: mkfs makes it on every ext file system; a folder with nothing else is empty.
_EMPTY: Final = frozenset({"lost+found"})


def make_folder(folder: Path) -> None:
    """Make the folder, or see that it is an archive or empty.

    Raises:
        StateError: it is something else.
        StorageError: it cannot be made or read.
    """
    try:
        folder.mkdir(mode=_MODE)
    except FileExistsError:
        check_folder(folder, empty=True)
    except OSError as error:
        raise StorageError("cannot make the archive", errno=error.errno, path=folder) from None
    else:
        sync_folder(folder.parent)


def has_archive(folder: Path) -> bool:
    """Say whether there is an archive, or only a place where `make_folder` can make one.

    Nothing is changed; what a writer would be refused is refused as it would be.

    Raises:
        StateError: what is there is no archive, and none can be made of it.
        StorageError: it cannot be made there, or not be looked at, or not be written.
    """
    if not os.path.lexists(folder):
        try:
            os.listdir(folder.parent)  # noqa: PTH208 - to be told why not
        except OSError as error:
            raise StorageError("cannot make the archive", errno=error.errno, path=folder) from None
        _check_writable(folder.parent, "cannot make the archive", folder)
        return False
    check_folder(folder, empty=True)
    path = folder / _LOCK
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    except FileNotFoundError:
        _check_writable(folder, "cannot lock the archive", path)
    except OSError as error:
        raise StorageError("cannot lock the archive", errno=error.errno, path=path) from None
    else:
        _check_writable(folder, "cannot write to the archive", folder)
    return bool(file_names(folder) - _EMPTY)


def _check_writable(folder: Path, what: str, path: Path) -> None:
    """Refuse a folder in which this process may make no file, by its permissions alone.

    Raises:
        StorageError: says ``what``, of ``path``.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise StorageError(what, errno=number, path=path)


def check_folder(folder: Path, *, empty: bool = False) -> None:
    """Refuse what is no archive; with ``empty`` an empty folder will do.

    Raises:
        StateError: it is none.
        StorageError: it cannot be read.
    """
    try:
        names = file_names(folder) - _EMPTY
    except StorageError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        raise StateError(f"{folder}: no archive: there is no such folder") from error
    if empty and not names:
        return
    if not names & {CATALOGUE_NAME, _LOCK} and not any(_is_manifest(name) for name in names):
        raise StateError(f"{folder}: no archive: there is neither a catalogue nor an entry in it")


def file_names(folder: Path) -> set[str]:
    """Names of all files in a folder.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - names are wanted, not paths
    except OSError as error:
        raise StorageError("cannot read the folder", errno=error.errno, path=folder) from None


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable.

    Raises:
        StorageError: that failed.
    """
    try:
        storage_folder.sync_folder(folder)
    except OSError as error:
        raise StorageError("cannot sync the folder", errno=error.errno, path=folder) from None


def lock_folder(folder: Path) -> tuple[int, str | None]:
    """Take the writer's lock; the descriptor that is returned holds it.

    Returns:
        The descriptor; and, where the file system has no locks, a warning, else None.

    Raises:
        StorageError: another process holds it, or it cannot be had.
    """
    path = folder / _LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _FILE_MODE)
    except OSError as error:
        raise StorageError("cannot lock the archive", errno=error.errno, path=path) from None
    try:
        trouble = take_lock(fd)
    except OSError as error:
        holder = b""
        with contextlib.suppress(OSError):
            holder = os.pread(fd, 20, 0).strip()
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise StorageError("cannot lock the archive", errno=error.errno, path=path) from None
        who = f" (process {holder.decode()})" if holder.isdigit() else ""
        raise StorageError(
            f"the archive is being written by another process{who}", path=folder
        ) from None
    # Whose it is helps a person; on a full disk the lock holds without it.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    if trouble is None:
        return fd, None
    return fd, f"{folder}: {trouble}: let no second process write the archive meanwhile"


@contextlib.contextmanager
def unwritten(path: Path, *, missing: bool = False) -> Iterator[bool]:
    """Hold the lock that a file's writer would hold; False if there is such a writer.

    ``missing`` is what a file that is not there counts as.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield missing
        return
    except OSError:
        yield False
        return
    try:
        free = take_lock(fd) is None  # without locks nobody can tell
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(fd)


def _is_manifest(name: str) -> bool:
    image = name.removesuffix(MANIFEST_SUFFIX)
    return image != name and split_image_name(image) is not None
