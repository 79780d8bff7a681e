"""How a file gets its name: NAME.partial, made durable, renamed, the folder synced.

A name without ``.partial`` is a whole, durable file; and its sidecar, if it has one, is its own.
Two names cannot be replaced at once, so a publication goes through steps, each of which can be
undone until the last:

    1. NAME.json.partial is written and made durable        (NAME is the former file)
    2. NAME gets a second name, NAME.former~                (where there are no links: only that)
    3. NAME.json -> NAME.json.former~, folder synced        (so the name of step 1 stays, too)
    4. NAME.partial -> NAME, folder synced                  (NAME is the new file)
    5. NAME.json.partial -> NAME.json, folder synced        (success is said after this)
    6. NAME.json.former~ and NAME.former~ are removed

So no power cut, whatever of the steps since the last sync it forgets, leaves a new file beside an
old sidecar or the reverse: between 3 and 5 there is none, and a file without one is still whole;
nor a file that was to have a sidecar without anything from which healing could give it one, nor a
sidecar without its file. A
step that fails puts the former file and its sidecar back. What a killed writer leaves tells how far
it came (NAME and NAME.former~ are one file until 4), and `settle`, which the next writer of the
name and the archive's healing call, undoes it before 4 and finishes it after.

Nothing is written before it has been looked whether the name can be replaced at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from uringmig.errors import StateError, StorageError
from uringmig.storage import partialfile
from uringmig.storage.folder import Folder, check_replaceable, final_name
from uringmig.storage.mainfile import MainFile

PARTIAL: Final = ".partial"
#: The file that a publication is about to replace, and its sidecar.
FORMER: Final = ".former~"
#: QEMU creates its files so too (migration/file.c): guest memory is nobody else's business.
PRIVATE: Final = 0o600
#: NAME_MAX of linux/limits.h.
_NAME_BYTES_MAX: Final = 255


class Publication:
    """One file on its way to its final name.

    Args:
        path: the final name; a symbolic link is followed, see `final_name`.
        sidecar: suffix of the sidecar's name; None: there is none, and none is removed.
        keep: what a killed writer left in the partial file stays there, for the caller to judge.
        mode: for whom the files are.

    Attributes:
        path: the final name, absolute.
        main: the buffered descriptor of the partial file; it also holds the lock.
        notes: what the file system could not do, one line each; complete after `publish`.

    Raises:
        StateError: the name cannot be a file's.
        StorageError: the name cannot be replaced, the partial file cannot be made, or another
            writer holds it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sidecar: str | None,
        keep: bool = False,
        mode: int = PRIVATE,
    ) -> None:
        self.path = final_name(path)
        self.partial_path = self.path + PARTIAL
        self.sidecar_path = None if sidecar is None else self.path + sidecar
        self._mode = mode
        self._check_names()
        self._folder = Folder(self.path)
        try:
            fd, notes = partialfile.take(self.partial_path, keep=keep, mode=mode)
        except BaseException:
            self._folder.close()
            raise
        self.notes = list(notes)
        self.main = MainFile(fd, self.partial_path)
        self._open = True
        try:
            settle(self.path, self.sidecar_path)
        except BaseException:
            self.leave() if keep else self.discard()
            raise

    def publish(self, sidecar: bytes | None) -> None:
        """Give the file, already durable, its final name; success is said only after this.

        Raises:
            StorageError: the name does not exist, or still holds its former content, with its
                sidecar.
        """
        if self.sidecar_path is None and sidecar is not None:
            raise StateError(f"{self.path}: was not opened for a sidecar")
        try:
            self._rename(sidecar)
        except BaseException as error:
            self._put_back()
            if isinstance(error, OSError):
                raise StorageError("cannot publish", errno=error.errno, path=self.path) from None
            raise
        with contextlib.suppress(OSError):
            self._drop_former(sidecar)
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

    def leave(self) -> None:
        """Close without publishing; the partial file stays for whoever goes on with it."""
        if self._open:
            self._close()

    def _check_names(self) -> None:
        """Refuse what would only fail when everything has been written."""
        names = [self.path, self.path + FORMER]
        if self.sidecar_path is not None:
            names += [self.sidecar_path + suffix for suffix in ("", FORMER, PARTIAL)]
        longest = max(len(os.fsencode(os.path.basename(name))) for name in names)
        longest = max(longest, len(os.fsencode(os.path.basename(self.partial_path))))
        if longest > _NAME_BYTES_MAX:
            beyond = longest - _NAME_BYTES_MAX
            raise StateError(
                f"{self.path}: the name is {beyond} bytes too long for what goes beside it"
            )
        for name in names:
            check_replaceable(name)

    def _rename(self, sidecar: bytes | None) -> None:
        """Do steps 1 to 5."""
        beside = self.sidecar_path
        if beside is not None and sidecar is not None:
            _write_durable(beside + PARTIAL, sidecar, self._mode)
        _set_aside(self.path)
        moved = beside is not None and _move(beside, beside + FORMER)
        if moved or sidecar is not None:
            self._sync()
        os.rename(self.partial_path, self.path)
        if beside is not None and sidecar is not None:
            self._sync()
            os.rename(beside + PARTIAL, beside)
        self._sync()

    def _put_back(self) -> None:
        """Undo the steps that were done; on a disk that refuses this too, `settle` may later."""
        beside = self.sidecar_path
        if beside is not None:
            with contextlib.suppress(OSError):
                _unlink(beside + PARTIAL)
        with contextlib.suppress(OSError):
            if partialfile.same_file(self.main.fd, self.path):
                if beside is not None:
                    _unlink(beside)
                if not os.path.lexists(self.path + FORMER):
                    _unlink(self.path)
            _take_back(self.path)
            if beside is not None:
                _take_back(beside)
            self._sync()

    def _drop_former(self, sidecar: bytes | None) -> None:
        """Do step 6; what remains of it is the next writer's to remove."""
        if self.sidecar_path is not None:
            if sidecar is None:
                _unlink(self.sidecar_path + PARTIAL)
            _unlink(self.sidecar_path + FORMER)
        _unlink(self.path + FORMER)

    def _sync(self) -> None:
        """Make the names durable."""
        note = self._folder.sync(self.main.fd)
        if note is not None and note not in self.notes:
            self.notes.append(note)

    def _close(self) -> None:
        """Close the descriptors, and with them the lock."""
        self._open = False
        self._folder.close()
        self.main.close()


def settle(path: str, sidecar_path: str | None) -> None:
    """Put right what a killed publication of ``path`` left; nothing is done where nothing is.

    The caller holds the partial file's lock, or knows that there is no writer.

    Raises:
        StorageError: another writer is just publishing, or a file cannot be renamed or removed.
    """
    former = path + FORMER
    beside = None if sidecar_path is None else sidecar_path + FORMER
    if not any(name is not None and os.path.lexists(name) for name in (former, beside)):
        return
    if partialfile.is_written(path):
        raise StorageError("another save is writing this file", errno=errno.EAGAIN, path=path)
    try:
        if not os.path.lexists(former):
            pass
        elif os.path.lexists(path) and not os.path.samefile(former, path):
            if sidecar_path is not None and not os.path.lexists(sidecar_path):
                _move(sidecar_path + PARTIAL, sidecar_path)
        else:
            if sidecar_path is not None and not os.path.lexists(sidecar_path):
                _take_back(sidecar_path)
            _take_back(path)
        if beside is not None:
            _unlink(beside)
        _unlink(former)
    except OSError as error:
        raise StorageError("cannot heal", errno=error.errno, path=path) from None


def _set_aside(path: str) -> None:
    """Keep the present file, if there is one, under a second name."""
    if not os.path.lexists(path):
        return
    try:
        os.link(path, path + FORMER)
    except OSError:
        # No links here (FAT, CIFS, some FUSE), or none to another's file: it moves.
        os.rename(path, path + FORMER)


def _take_back(path: str) -> None:
    """Give a file that was set aside its name again, if it was."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path + FORMER, path)
        # Two names of one file: then a rename does nothing.
        _unlink(path + FORMER)


def _move(path: str, to: str) -> bool:
    """Rename a file; say whether there was one."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, to)
        return True
    return False


def _write_durable(path: str, data: bytes, mode: int) -> None:
    """Write a small file and make it durable; whatever lay there is nobody's, and goes."""
    _unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
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
