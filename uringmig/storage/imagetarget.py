"""Where an image goes: a name, published atomically; or two descriptors of the caller's.

Either way there are two separate opens of one file: ``direct`` for the pages, ``main`` for the
stream. No flag is ever toggled and nothing is dup'ed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from uringmig import signals
from uringmig.options import PAGE_SIZE, DirectMode
from uringmig.storage.directfile import DirectFile, adopt_direct, check_pair, open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.mainfile import MainFile
from uringmig.storage.publication import Publication


class Target(Protocol):
    """An image file being written."""

    direct: DirectFile
    main: MainFile
    path: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be had, one line each; complete after `publish`."""

    def publish(self, sidecar: bytes | None) -> str | None:
        """Give the durable file its name; return the path of the sidecar, if there is one.

        Raises:
            Interrupted: a signal came before; nothing has been done.
            StorageError: the name does not exist, or still holds its former content.
        """

    def close(self) -> None:
        """Close what was opened here; discard what was not published."""


class NamedTarget:
    """A path: written as ``NAME.partial``, renamed when it is whole and durable.

    Args:
        path: the final name; a symbolic link is followed.
        mode: O_DIRECT or not, for the pages.
        sidecar_suffix: of the manifest's name.
        keep: asked, before anything else, whether a partial file that was there is of use; it
            then stays as it is but for its first page, which is zeroed.

    Raises:
        StateError: the name is taken by something that is not a file.
        StorageError: it cannot be created, or O_DIRECT is required and cannot be had.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: DirectMode,
        sidecar_suffix: str,
        keep: Callable[[MainFile], bool] | None = None,
    ) -> None:
        self._publication = Publication(path, sidecar=sidecar_suffix, keep=keep is not None)
        self.path = self._publication.path
        self.main = self._publication.main
        self.partial_path = self._publication.partial_path
        #: Whether there was a partial file of use, which was kept.
        self.kept = False
        try:
            self.kept = keep is not None and keep(self.main)
            if not self.kept:
                self.main.set_size(0)
            # By its final name, so that whoever reads it back says the same.
            self.direct = open_direct(self.partial_path, Operation.WRITE, mode, shown=self.path)
            if self.kept:
                self.main.write_at(0, bytes(PAGE_SIZE))
            else:
                self.main.set_size(0)  # the probe left a page
        except BaseException:
            self._end(keep=self.kept)
            raise

    @property
    def notes(self) -> tuple[str, ...]:
        """What the file system could not do, one line each; complete after `publish`."""
        return _noted(self.direct, self._publication.notes)

    def publish(self, sidecar: bytes | None) -> str | None:
        """Rename, sidecar included; see `Publication.publish`."""
        signals.commit()
        self._publication.publish(sidecar)
        return None if sidecar is None else self._publication.sidecar_path

    def close(self, *, keep: bool = False) -> None:
        """Close both descriptors; remove the partial file if it was not published.

        Args:
            keep: the partial file stays, for a later writer to go on with.
        """
        try:
            os.close(self.direct.fd)
        finally:
            self._end(keep=keep)

    def _end(self, *, keep: bool) -> None:
        """Let the partial file go, one way or the other."""
        if keep:
            self._publication.leave()
        else:
            self._publication.discard()


def _noted(direct: DirectFile, notes: Sequence[str]) -> tuple[str, ...]:
    """All notes of a file."""
    return (*([] if direct.note is None else [direct.note]), *notes)


class PassedTarget:
    """Two open descriptors, as a management application passes them in a QEMU fdset.

    They stay the caller's, and so do the name and what becomes of the file after a failure.

    Raises:
        StateError: they are not a plain and an O_DIRECT open of one file.
    """

    def __init__(self, direct_fd: int, main_fd: int) -> None:
        check_pair(direct_fd, main_fd)
        self.path = f"descriptors {direct_fd} and {main_fd}"
        self.direct = adopt_direct(direct_fd)
        self.main = MainFile(main_fd, self.path)
        self.notes = _noted(self.direct, ())

    def publish(self, sidecar: bytes | None) -> str | None:
        """Nothing to do: the name is the caller's, and there is no place for a sidecar."""
        signals.commit()
        return None

    def close(self) -> None:
        """Nothing: the descriptors are the caller's."""
