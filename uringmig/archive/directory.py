"""An archive: a folder whose entries appear whole or not at all.

One writer at a time, by flock(2) on ``.lock`` (`storage.filelock`); readers neither wait nor are
waited for. What is true is what lies on the disk: an image under its name with its manifest is an
entry. The catalogue follows and can be had again from the files; where a writer was killed in
between, the next one puts it right when it opens the archive. What is known against an entry lies
in a note beside its image, and an entry that is known stays one, damaged or missing, until somebody
removes it.

An entry is added by its files first and its row last, and removed as `archive.removing` says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from msgspec import structs

from uringmig.archive.catalogue import Catalogue, Row
from uringmig.archive.damagenotes import Damage, note_path, read_note, remove_note, write_note
from uringmig.archive.entry import (
    Entry,
    check_name,
    image_path,
    journal_path,
    manifest_path,
    read_entry,
    split_image_name,
)
from uringmig.archive.folder import check_folder, lock_folder, make_folder, sync_folder
from uringmig.archive.healing import HealReport, heal
from uringmig.archive.looking import Seen, look, look_at, manifest_stamp, possible_images
from uringmig.archive.removing import remove_entries
from uringmig.archive.salvage import Known, known_of
from uringmig.errors import BytesError, StateError, StorageError
from uringmig.image.manifest import Tier
from uringmig.storage.publication import PARTIAL


@dataclass(frozen=True, slots=True)
class EntryFiles:
    """Where a new entry's files go; both paths are absolute."""

    image: Path
    journal: Path


@dataclass(frozen=True, slots=True)
class ReindexReport:
    """What the manifests and notes said.

    Attributes:
        entries: known ones, now in the catalogue.
        problems: what looks like an entry and is none, and what is wrong with the files of entries,
            one line each.
        kept_verification: entries whose earlier verification still holds.
        set_aside: where the old catalogue is now, if it could not be used; else empty.
    """

    path: str
    entries: int
    problems: tuple[str, ...]
    kept_verification: int
    set_aside: str


class Archive:
    """One archive, open for reading or writing; a context manager.  See `open`.

    Attributes:
        path: the folder, absolute.
        healed: what a killed writer had left, when open for writing.
        notes: what is wrong with the archive, one line each.
        catalogue_note: why entries are read from their manifests instead; empty: they are not.
        may_be_shared: it is open for writing, and nobody can tell whether another process writes
            it too: its file system has no locks.
        unkept: why something that verification found could not be kept; empty: all was.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self.healed = HealReport()
        self.notes: list[str] = []
        self.catalogue_note = ""
        self.unkept = ""
        self.may_be_shared = False
        self.catalogue = Catalogue(path)
        self._salvaged: Known | None = None
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
            StorageError: another process writes it, or it cannot be read or written.
        """
        folder = Path(path).absolute()
        if not write:
            check_folder(folder)
            return cls(folder, None)
        make_folder(folder)
        lock, warning = lock_folder(folder)
        archive = cls(folder, lock)
        archive.may_be_shared = warning is not None
        archive._warn([warning] if warning else [])
        try:
            archive.heal()
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

    def heal(self) -> None:
        """Put right what a killed writer left; `healed` says what that was.

        Raises:
            StorageError: the folder cannot be read.
        """
        self._check_writable()
        self.healed = heal(self.path, self.catalogue)
        self._warn(self.healed.problems)
        if self.healed.set_aside:
            self._warn(
                [
                    f"{self.catalogue.path} could not be used: it was set aside as "
                    f"{self.healed.set_aside}, and made anew as by `uringmig archive reindex`"
                ]
            )

    def entries(self) -> list[Entry]:
        """All entries, oldest first: sound, damaged and missing ones.

        Raises:
            StorageError: the folder cannot be read.
        """
        found = look(self.path, self._known(), self._look_again)
        self._warn(found.problems)
        return found.entries

    def find(self, name: str) -> Entry:
        """Find the entry of a name, whatever its condition.

        Raises:
            StateError: there is none.
        """
        seen = self._find(name)
        if seen.row is None:
            why = f": {seen.problem}" if seen.problem else ""
            count = len(self.entries())
            raise StateError(f"{self.path}: no entry {name!r} among its {count}{why}")
        return seen.row.entry

    def damage(self, name: str) -> list[Damage]:
        """What is known against an entry."""
        return list(self._find(name).damage)

    def has(self, name: str) -> bool:
        """Say whether there is an entry of this name now."""
        return self._find(name).row is not None

    def note_checked(
        self,
        entry: Entry,
        *,
        cursor: int,
        verified_at: str | None,
        good: Iterable[int] = (),
        damaged: Iterable[Damage] = (),
        all_seen: bool = False,
    ) -> None:
        """Keep what a verification found; a reader may do so too.

        What is damaged is durable in a note before the catalogue says anything. An entry that is
        gone meanwhile is left out. What cannot be kept is told in `unkept`.

        Args:
            entry: as it was when it was looked at.
            cursor: chunks of the pass that are done.
            verified_at: the pass over the entry has ended, at this time; it counts if nothing is
                known against the entry then.
            good: chunks whose earlier damage is no longer there.
            damaged: places that are damaged now.
            all_seen: everything was looked at, and ``damaged`` is all there is.
        """
        good, damaged = list(good), list(damaged)
        left: list[Damage] | None = None
        try:
            # In the transaction, so that nobody removes the entry meanwhile.
            with self.catalogue.changing(entry.name) as change:
                row = change.row
                if row.removing if row is not None else not self.has(entry.name):
                    return
                left = self._keep_damage(entry, good, damaged, all_seen)
                if row is not None:
                    known = verified_at if verified_at and not left else entry.verified_at
                    checked = structs.replace(entry, verify_cursor=cursor, verified_at=known)
                    stamp = row.manifest_stamp if row.entry.is_same(entry) else ""
                    change.row = Row(checked, stamp)
        except (BytesError, StorageError) as error:
            self.unkept = str(error)
            if left is None and self.has(entry.name):
                try:
                    self._keep_damage(entry, good, damaged, all_seen)
                except StorageError as trouble:
                    self.unkept = str(trouble)

    def latest_of(self, vm: str, *, tier: Tier | None = "hot") -> Entry | None:
        """The newest sound entry of a virtual machine, or None."""
        rows = self._known(vm=vm).ordered()
        if self._salvaged is not None or not self.catalogue.exists:
            of_vm = [entry.name for entry in self.entries() if entry.vm == vm]
        else:
            of_vm = [row.entry.name for row in rows]
        for name in reversed(of_vm):
            seen = self._find(name)
            entry = None if seen.row is None else seen.row.entry
            if entry is not None and entry.is_sound and tier in (None, entry.tier):
                return entry
        return None

    def place(self, name: str, tier: Tier) -> EntryFiles:
        """Say where the image of a new entry goes; nothing is made.

        Raises:
            StateError: no entry can have this name, or one has it.
        """
        self._check_writable()
        self.check_free(name)
        image = image_path(self.path, name, tier)
        return EntryFiles(image, journal_path(image))

    def check_free(self, name: str) -> None:
        """Refuse a name that no new entry can have.

        Raises:
            StateError: says why.
        """
        check_name(name)
        row = self._find(name).row
        if row is not None and not row.entry.is_sound:
            raise StateError(
                f"{self.path}: there already is an entry {name!r}, which is {row.entry.condition}; "
                f"`uringmig archive prune --forget {name} --delete` drops it"
            )
        for other in (image_path(self.path, name, "hot"), image_path(self.path, name, "cold")):
            for path in (other, manifest_path(other), note_path(other)):
                if os.path.lexists(path):
                    raise StateError(f"{path}: there already is something of this name")

    def add(self, image: str | os.PathLike[str]) -> Entry:
        """Put an image, published with its manifest in this folder, into the catalogue.

        Raises:
            StateError: it lies somewhere else.
            BytesError: its manifest is none, or another image's; or the catalogue is damaged.
            StorageError: a file cannot be read, or the catalogue not written.
        """
        self._check_writable()
        path = Path(image).absolute()
        if path.parent != self.path:
            raise StateError(f"{path} is not in the archive {self.path}")
        stamp = manifest_stamp(manifest_path(path))
        entry = read_entry(path)
        self.catalogue.put([Row(entry, stamp)])
        return entry

    def remove(self, *names: str) -> None:
        """Remove entries; readers see each whole, or not at all.

        Raises:
            StateError: there is none of one of the names.
            StorageError: a file cannot be removed; the next to open the archive goes on with it.
        """
        self.remove_entries([self.find(name) for name in names])

    def remove_entries(self, entries: Sequence[Entry]) -> None:
        """Remove entries that were found just now, see `remove`.

        Raises:
            StorageError: a file cannot be removed; the next to open the archive goes on with it.
        """
        self._check_writable()
        images = [image_path(self.path, entry.name, entry.tier) for entry in entries]
        self._warn(remove_entries(self.catalogue, images))

    def unfinished(self) -> list[EntryFiles]:
        """Images whose copying was interrupted and can go on from its journal."""
        names = sorted(path.name for path in self.path.glob(f"*{PARTIAL}"))
        images = [self.path / name.removesuffix(PARTIAL) for name in names]
        return [
            EntryFiles(image, journal_path(image))
            for image in images
            if split_image_name(image.name) and os.path.lexists(journal_path(image))
        ]

    def discard(self, place: EntryFiles) -> None:
        """Give up an image that was never published.

        Raises:
            StorageError: a file cannot be removed.
        """
        self._check_writable()
        sidecar = f"{manifest_path(place.image)}{PARTIAL}"
        for path in (place.journal, Path(sidecar), Path(f"{place.image}{PARTIAL}")):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError("cannot remove", errno=error.errno, path=path) from None
        sync_folder(self.path)

    def _find(self, name: str) -> Seen:
        """Look at what is under a name; nothing where no entry can have it."""
        try:
            check_name(name)
        except StateError:
            return Seen()
        row, damage = self._row(name)
        found = Seen()
        for image in possible_images(self.path, name, row):
            seen = look_at(image, row, damage=damage)
            seen = seen if seen.is_clear else self._look_again(image, seen)
            if seen.row is not None:
                return seen
            found = seen if seen.problem else found
        return found

    def _look_again(self, image: Path, seen: Seen) -> Seen:
        """Look at what is not clear until nobody changed it meanwhile."""
        name, _ = split_image_name(image.name) or ("", "hot")
        while not seen.is_clear:
            row, damage = self._row(name)
            seen = look_at(image, row, damage=damage)
            again, _ = self._row(name)
            if (again and (again.removing, again.entry.manifest_digest)) == (
                row and (row.removing, row.entry.manifest_digest)
            ):
                break
        return seen

    def _row(self, name: str) -> tuple[Row | None, tuple[Damage, ...]]:
        """What the catalogue says of an entry, and knows against it."""
        if self._salvaged is None and self.catalogue.exists:
            try:
                return self.catalogue.row(name), ()
            except (BytesError, StorageError):
                self._known()
        known = self._salvaged or Known()
        return known.rows.get(name), known.damage.get(name, ())

    def _known(self, *, vm: str | None = None) -> Known:
        """What the catalogue says; once it cannot be used, what could be read of it."""
        if self._salvaged is not None:
            return self._salvaged
        known = known_of(self.catalogue, vm=vm)
        if known.trouble:
            self._salvaged = known
            self.catalogue_note = f"{known.trouble}; entries are read from their manifests"
        return known

    def _keep_damage(
        self, entry: Entry, good: list[int], damaged: list[Damage], all_seen: bool
    ) -> list[Damage]:
        """Let the note say what is known against an entry; returns that.

        Raises:
            StorageError: it could not be kept.
        """
        image = Path(entry.image)
        note = read_note(image)
        before = {} if note is None else {one.chunk: one for one in note.damage}
        after = {} if all_seen else {c: one for c, one in before.items() if c not in good}
        after |= {one.chunk: one for one in damaged}
        if after != before:
            if after:
                write_note(entry, after.values())
            else:
                remove_note(image)
        return list(after.values())

    def _warn(self, texts: Iterable[str]) -> None:
        """Add what is not told yet."""
        self.notes += [text for text in dict.fromkeys(texts) if text not in self.notes]

    def _check_writable(self) -> None:
        if self._lock is None:
            raise StateError(f"the archive {self.path} is open for reading only")


def reindex(path: str | os.PathLike[str]) -> ReindexReport:
    """Make an archive's catalogue anew, from its manifests; the old one may be damaged.

    What is known against entries lies in notes and stays; entries of which no file is left stay
    missing. When an entry was last found good is kept where the old catalogue can still be read and
    the manifest has the same bytes.

    Raises:
        StateError: there is no archive.
        StorageError: another process writes it, or it cannot be read or written.
    """
    folder = Path(path).absolute()
    check_folder(folder)
    lock, warning = lock_folder(folder)
    try:
        healed = heal(folder, Catalogue(folder), anew=True)
    finally:
        os.close(lock)
    return ReindexReport(
        str(folder),
        healed.known,
        (*([warning] if warning else []), *healed.problems, *healed.troubled),
        healed.kept_verification,
        healed.set_aside,
    )
