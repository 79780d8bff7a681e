"""An archive: a folder whose entries appear whole or not at all.

One writer at a time, by flock(2) on ``.lock``; readers neither wait nor are waited for. What is
true is what lies on the disk: an image under its name with its manifest is an entry. The catalogue
follows; where a writer was killed in between, the next one puts it right when it opens the archive.

An entry is added by its files first and its row last, and removed in this order: the row is marked
(which hides it), the manifest (from here on there is no entry), the image, the row.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from uringmig.archive.catalogue import NAME as CATALOGUE_NAME
from uringmig.archive.catalogue import Catalogue, Damage, Row, manifest_stamp
from uringmig.archive.entry import (
    Entry,
    check_name,
    image_path,
    journal_path,
    manifest_path,
    read_entry,
    split_image_name,
)
from uringmig.archive.healing import (
    HealReport,
    clear_leftovers,
    heal,
    read_rows,
    remove_files,
)
from uringmig.errors import BytesError, StateError, StorageError
from uringmig.image.manifest import SUFFIX as MANIFEST_SUFFIX
from uringmig.image.manifest import Tier
from uringmig.storage.folder import sync_folder
from uringmig.storage.publication import PARTIAL

_LOCK: Final = ".lock"
#: Guest memory is nobody else's business, as for the images themselves.
_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
#: mkfs makes it on every ext file system; a folder with nothing else is empty.
_EMPTY: Final = frozenset({"lost+found"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a new entry's files go; both paths are absolute."""

    image: Path
    journal: Path


@dataclass(frozen=True, slots=True)
class ReindexReport:
    """What the manifests said.

    Attributes:
        entries: whole ones, now in the catalogue.
        problems: what looks like an entry and is none, one line each.
        kept_verification: entries whose earlier verification still holds.
    """

    path: str
    entries: int
    problems: tuple[str, ...]
    kept_verification: int


class Archive:
    """One archive, open for reading or writing; a context manager.  See `open`.

    Attributes:
        path: the folder, absolute.
        healed: what a killed writer had left, when open for writing.
        notes: what the operator should know, one line each.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self.healed = HealReport()
        self.notes: list[str] = []
        self.catalogue = Catalogue(path)
        self._lock = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, write: bool) -> Self:
        """Open an archive.

        Args:
            path: the folder.
            write: make it if it is missing, lock it against a second writer, and put right what a
                killed one left. A process made by fork(2) shares the lock, one made by spawning
                does not have it.

        Raises:
            StateError: there is no archive, and none can be made of what is there.
            FormatError: the catalogue is damaged; says how to rebuild it.
            StorageError: another process writes it, or it cannot be read or written.
        """
        folder = Path(path).absolute()
        if not write:
            _check_folder(folder)
            return cls(folder, None)
        _make(folder)
        archive = cls(folder, _locked(folder))
        try:
            if not archive.catalogue.exists:
                _rebuild(folder, [])
            archive.healed = heal(folder, archive.catalogue)
            archive.notes += archive.healed.problems
        except BaseException:
            archive.close()
            raise
        return archive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; harmless when called again."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def entries(self) -> list[Entry]:
        """All entries, oldest first.

        Raises:
            FormatError: the catalogue is damaged.
            StorageError: it cannot be read.
        """
        return [
            row.entry
            for row in self._rows()
            if not row.removing and _is_whole(Path(row.entry.image))
        ]

    def find(self, name: str) -> Entry:
        """Find the entry of a name.

        Raises:
            StateError: there is none.
        """
        entries = self.entries()
        for entry in entries:
            if entry.name == name:
                return entry
        raise StateError(f"{self.path}: no entry {name!r} among its {len(entries)}")

    def damage(self, name: str) -> list[Damage]:
        """Places of an entry that verification found damaged; none where there is no catalogue.

        Raises:
            FormatError: the catalogue is damaged.
            StorageError: it cannot be read.
        """
        return self.catalogue.damage(name) if self._has_catalogue() else []

    def has(self, name: str) -> bool:
        """Say whether there is an entry of this name now."""
        return any(entry.name == name for entry in self.entries())

    @property
    def keeps_checks(self) -> bool:
        """Whether `note_checked` can keep what it is told."""
        return self._has_catalogue()

    def note_checked(
        self,
        name: str,
        *,
        cursor: int,
        verified_at: str | None,
        good: Iterable[int],
        damaged: Iterable[Damage],
    ) -> None:
        """Keep what a verification found, see `Catalogue.note_checked`; a reader may do so too.

        Raises:
            FormatError: the catalogue is damaged.
            StorageError: it cannot be written.
        """
        if self._has_catalogue():
            self.catalogue.note_checked(
                name, cursor=cursor, verified_at=verified_at, good=good, damaged=damaged
            )

    def latest_of(self, vm: str, *, tier: Tier | None = "hot") -> Entry | None:
        """The newest entry of a virtual machine that is not known to be damaged, or None."""
        found = [
            entry
            for entry in self.entries()
            if entry.vm == vm and tier in (None, entry.tier) and entry.condition != "damaged"
        ]
        return found[-1] if found else None

    def place(self, name: str, tier: Tier) -> Place:
        """Say where the image of a new entry goes; nothing is made.

        Raises:
            StateError: no entry can have this name, or one has it.
        """
        self._check_writable()
        check_name(name)
        image = image_path(self.path, name, tier)
        for other in (image_path(self.path, name, "hot"), image_path(self.path, name, "cold")):
            if other.exists() or manifest_path(other).exists():
                raise StateError(f"{other}: there already is something of this name")
        return Place(image, journal_path(image))

    def add(self, image: str | os.PathLike[str]) -> Entry:
        """Put an image, published with its manifest in this folder, into the catalogue.

        Raises:
            StateError: it lies somewhere else.
            BytesError: its manifest is none, or another image's.
            StorageError: a file cannot be read, or the catalogue not written.
        """
        self._check_writable()
        path = Path(image).absolute()
        if path.parent != self.path:
            raise StateError(f"{path} is not in the archive {self.path}")
        stamp = manifest_stamp(manifest_path(path))
        entry = read_entry(path)
        self.catalogue.put([Row(entry, stamp, removing=False)])
        return entry

    def remove(self, name: str) -> None:
        """Remove an entry; readers see it whole, or not at all.

        Raises:
            StateError: there is none of this name.
            StorageError: a file cannot be removed; the next to open the archive goes on with it.
        """
        self._check_writable()
        entry = self.find(name)
        self.catalogue.mark_removing(name)
        remove_files(Path(entry.image))
        self.catalogue.drop([name])

    def unfinished(self) -> list[Place]:
        """Images whose copying was interrupted and can go on from its journal."""
        names = sorted(path.name for path in self.path.glob(f"*{PARTIAL}"))
        images = [self.path / name.removesuffix(PARTIAL) for name in names]
        return [
            Place(image, journal_path(image))
            for image in images
            if split_image_name(image.name) and journal_path(image).exists()
        ]

    def discard(self, place: Place) -> None:
        """Give up an image that was never published.

        Raises:
            OSError: a file cannot be removed.
        """
        self._check_writable()
        sidecar = f"{manifest_path(place.image)}{PARTIAL}"
        for path in (place.journal, Path(sidecar), Path(f"{place.image}{PARTIAL}")):
            path.unlink(missing_ok=True)
        sync_folder(self.path)

    def _rows(self) -> list[Row]:
        """Rows of the catalogue; where it cannot be had, what the manifests say."""
        if self._has_catalogue():
            return self.catalogue.rows()
        problems: list[str] = []
        rows = read_rows(self.path, known={}, problems=problems)
        self.notes += [text for text in problems if text not in self.notes]
        return sorted(rows, key=lambda row: (row.entry.created_time, row.entry.name))

    def _has_catalogue(self) -> bool:
        """Say whether there is one that can be used: SQLite needs to write beside it."""
        return self.catalogue.exists and os.access(self.path, os.W_OK)

    def _check_writable(self) -> None:
        if self._lock is None:
            raise StateError(f"the archive {self.path} is open for reading only")


def reindex(path: str | os.PathLike[str]) -> ReindexReport:
    """Make an archive's catalogue anew, from its manifests alone; the old one may be damaged.

    What verification had found is kept where the old catalogue can still be read and the manifest
    is the same file.

    Raises:
        StateError: there is no archive.
        StorageError: another process writes it, or it cannot be read or written.
    """
    folder = Path(path).absolute()
    _check_folder(folder)
    lock = _locked(folder)
    try:
        healed = HealReport()
        clear_leftovers(folder, healed)
        rows = read_rows(folder, known={}, problems=healed.problems)
        kept = _rebuild(folder, rows)
    finally:
        os.close(lock)
    return ReindexReport(str(folder), len(rows), tuple(healed.problems), kept)


def _rebuild(folder: Path, rows: list[Row]) -> int:
    """Let the catalogue say ``rows`` and nothing else; return how many verifications it keeps.

    A whole one is changed in one transaction, since others may be using it. A damaged one, which
    nobody can use, is replaced.
    """
    catalogue = Catalogue(folder)
    known = _readable_rows(catalogue)
    kept: dict[str, list[Damage]] = {}
    merged = []
    for row in rows:
        former = (known or {}).get((row.entry.name, row.manifest_stamp))
        if former is not None and former.entry.condition != "unchecked":
            kept[row.entry.name] = catalogue.damage(row.entry.name)
        merged.append(row if former is None else row.with_checks_of(former))
    try:
        if known is not None:
            catalogue.put_all(merged, kept)
            return len(kept)
    except BytesError:
        pass  # damaged where only a writer comes by
    new = Catalogue(folder, name=CATALOGUE_NAME + PARTIAL)
    new.remove()
    new.create()
    new.put_all(merged, kept)
    new.replace(catalogue)
    sync_folder(folder)
    return len(kept)


def _readable_rows(catalogue: Catalogue) -> dict[tuple[str, str], Row] | None:
    """Rows of a catalogue by name and manifest; None if it is not there or not whole."""
    if not catalogue.exists:
        return None
    try:
        catalogue.check()
        return {
            (row.entry.name, row.manifest_stamp): row
            for row in catalogue.rows()
            if not row.removing
        }
    except BytesError:
        return None


def _make(folder: Path) -> None:
    """Make the folder, or see that it is an archive or empty."""
    try:
        folder.mkdir(mode=_MODE)
        sync_folder(folder.parent)
    except FileExistsError:
        _check_folder(folder, empty=True)
    except OSError as error:
        raise StorageError("cannot make the archive", errno=error.errno, path=folder) from None


def _check_folder(folder: Path, *, empty: bool = False) -> None:
    """Refuse what is no archive; with ``empty`` an empty folder will do."""
    try:
        names = set(os.listdir(folder)) - _EMPTY  # noqa: PTH208 - names are wanted, not paths
    except (FileNotFoundError, NotADirectoryError):
        raise StateError(f"{folder}: no archive: there is no such folder") from None
    except OSError as error:
        raise StorageError("cannot read the folder", errno=error.errno, path=folder) from None
    if empty and not names:
        return
    if not names & {CATALOGUE_NAME, _LOCK} and not any(_is_manifest(name) for name in names):
        raise StateError(f"{folder}: no archive: there is neither a catalogue nor an entry in it")


def _is_manifest(name: str) -> bool:
    image = name.removesuffix(MANIFEST_SUFFIX)
    return image != name and split_image_name(image) is not None


def _locked(folder: Path) -> int:
    """Take the writer's lock; the descriptor holds it."""
    path = folder / _LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _FILE_MODE)
    except OSError as error:
        raise StorageError("cannot lock the archive", errno=error.errno, path=path) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise StorageError("cannot lock the archive", errno=error.errno, path=path) from None
        who = f" (process {holder})" if holder.isdecimal() else ""
        raise StorageError(
            f"the archive is being written by another process{who}", path=folder
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_whole(image: Path) -> bool:
    """Say whether both files of an entry are there."""
    return image.exists() and manifest_path(image).exists()
