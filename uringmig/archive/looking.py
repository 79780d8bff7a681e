"""What is in an archive's folder, seen together with what is known of it; nothing is changed.

Readers and the writer see an archive through this and nothing else, so that what one is told the
other does. An entry that is known stays one, whatever became of its files: then it is damaged, or
missing. It is the same entry while its manifest has the same bytes, wherever they lie.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from msgspec import structs

from uringmig import signals
from uringmig.archive.catalogue import Row
from uringmig.archive.damagenotes import STREAM_CHUNK, Damage, Note, read_note
from uringmig.archive.damagenotes import SUFFIX as NOTE_SUFFIX
from uringmig.archive.entry import (
    SUFFIXES,
    Entry,
    image_path,
    manifest_path,
    read_identity,
    split_image_name,
)
from uringmig.archive.folder import file_names, unwritten
from uringmig.archive.salvage import Known
from uringmig.errors import BytesError, LimitError, StorageError, explained
from uringmig.image.manifest import SUFFIX as MANIFEST_SUFFIX
from uringmig.image.manifest import Tier
from uringmig.storage.publication import PARTIAL

#: A file that was changed so shortly before it was looked at could be changed again at what its
#: file system takes for the same time; the coarsest (FAT) counts in two seconds.
_SETTLED_NS: Final = 3_000_000_000


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen under one image's name.

    Attributes:
        row: the entry as it is now; None is: there is none.
        problem: what looks like an entry and is none, in one line; empty is nothing.
        damage: what is known against the entry.
        unkept: some of it is in no note yet.
        unlisted: the row is not the catalogue's.
    """

    row: Row | None = None
    problem: str = ""
    damage: tuple[Damage, ...] = ()
    unkept: bool = False
    unlisted: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether a whole entry was seen, or nothing at all."""
        return not self.problem and (self.row is None or not self.row.entry.trouble)


@dataclass(slots=True)
class Look:
    """What was seen of an archive.

    Attributes:
        seen: entries, oldest first.
        problems: what looks like an entry and is none, one line each.
    """

    seen: list[Seen] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """The entries, oldest first."""
        return [seen.row.entry for seen in self.seen if seen.row is not None]


def look(
    folder: Path, known: Known, again: Callable[[Path, Seen], Seen] = lambda _, seen: seen
) -> Look:
    """Look at a whole archive.

    Args:
        folder: the archive.
        known: what is known of it.
        again: given an image and what was seen that is not clear, looks once more.

    Raises:
        StorageError: the folder cannot be read.
    """
    names = file_names(folder)
    found = Look()
    taken: dict[str, Path] = {}
    for image in _candidates(folder, names, known):
        signals.look()
        name, tier = split_image_name(image.name) or ("", "hot")
        row = known.rows.get(name)
        seen = look_at(
            image,
            row if row and row.entry.tier == tier else None,
            damage=known.damage.get(name, ()) if not row or row.entry.tier == tier else (),
            noted=image.name + NOTE_SUFFIX in names,
        )
        seen = seen if seen.is_clear else again(image, seen)
        if seen.row is not None and name in taken:
            seen = Seen(problem=f"{image}: there is another entry of the name {name!r}")
        if seen.problem:
            found.problems.append(seen.problem)
        elif seen.row is not None:
            taken[name] = image
            found.seen.append(seen)
    found.seen.sort(key=_age)
    return found


def look_at(
    image: Path, row: Row | None, *, damage: Iterable[Damage] = (), noted: bool = True
) -> Seen:
    """Look at what lies under an image's name.

    Args:
        image: its path, whether there is one or not.
        row: what the catalogue says of it.
        damage: known against it from elsewhere.
        noted: there may be a note of damage.
    """
    if row is not None and row.removing:
        return Seen()
    note = read_note(image) if noted else None
    known = row.entry if row is not None else note.entry if note is not None else None
    stamp, entry, trouble, missing = _look_at_manifest(image, row, known)
    if entry is None:
        return Seen(problem=_problem_of(image, note, "" if missing else trouble))
    wrong, gone = _look_at_image(image, entry)
    trouble, missing = trouble or wrong, missing or gone
    places = {one.chunk: one for one in (*damage, *(note.damage if note else ()))}
    if trouble:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        places.setdefault(STREAM_CHUNK, Damage(STREAM_CHUNK, trouble, at))
        # Files that come back later may be others than those that were found good.
        entry = structs.replace(entry, verified_at=None, verify_cursor=0)
    noted_places = {one.chunk for one in note.damage} if note else set()
    stored = Row(entry, stamp)
    return Seen(
        row=replace(
            stored,
            entry=structs.replace(
                entry, damaged_chunks=len(places), missing=missing, trouble=trouble
            ),
        ),
        damage=tuple(places[chunk] for chunk in sorted(places)),
        unkept=noted_places != set(places),
        unlisted=stored != row,
    )


def manifest_stamp(path: Path) -> str:
    """What tells that a file is still the one that was read, without reading it.

    Inode, size, and the times of the last change of content and of anything. It only saves reading:
    where it differs, the bytes decide. Empty where it could be the same for other bytes, since the
    file was changed just now.

    Raises:
        StorageError: there is no such file.
    """
    try:
        status = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - all of it is wanted
    except OSError as error:
        raise StorageError("cannot look at", errno=error.errno, path=path) from None
    if not stat.S_ISREG(status.st_mode):
        return ""
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED_NS:
        return ""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _candidates(folder: Path, names: set[str], known: Known) -> list[Path]:
    """Paths of images that are there or should be, known ones first where a name has two."""
    images = {
        name.removesuffix(suffix)
        for name in names
        for suffix in ("", MANIFEST_SUFFIX, NOTE_SUFFIX)
        if name.endswith(suffix)
    }
    there = {image for image in images if split_image_name(image)}
    rows = {Path(row.entry.image).name for row in known.rows.values()}
    if not known.whole:
        rows &= there
    return [
        folder / name for name in sorted(there | rows, key=lambda name: (name not in rows, name))
    ]


def _look_at_manifest(
    image: Path, row: Row | None, known: Entry | None
) -> tuple[str, Entry | None, str, bool]:
    """Stamp, entry, what is wrong, and whether the manifest is missing."""
    stamp = ""
    try:
        stamp = manifest_stamp(manifest_path(image))
        if row is not None and stamp and row.manifest_stamp == stamp:
            return stamp, row.entry, "", False
        found = read_identity(image)
    except LimitError:
        raise  # of which the entry can do nothing
    except (BytesError, StorageError) as error:
        missing = isinstance(error, StorageError) and error.is_absent
        return "", known, "its manifest is missing" if missing else str(error), missing
    if known is None:
        return stamp, found, "", False
    if not known.is_same(found):
        return stamp, found, "its manifest is another one than before", False
    found = structs.replace(found, verified_at=known.verified_at, verify_cursor=known.verify_cursor)
    return stamp, found, "", False


def _look_at_image(image: Path, entry: Entry) -> tuple[str, bool]:
    """What is wrong, and whether the image is missing."""
    try:
        status = image.stat()
    except FileNotFoundError:
        return "its image is missing", True
    except OSError as error:
        if isinstance(limit := explained(error), LimitError):
            raise limit from None
        return f"its image cannot be looked at: {error.strerror}", False
    if not stat.S_ISREG(status.st_mode):
        return "its image is not a regular file", False
    if status.st_size != entry.file_bytes:
        return (
            f"its image has another length (expected {entry.file_bytes}, found {status.st_size})",
            False,
        )
    return "", False


def _problem_of(image: Path, note: Note | None, trouble: str) -> str:
    """What to say of files that are no entry; empty if there are none, or not yet.

    ``trouble`` is what is wrong with the manifest; empty is: it is not there.
    """
    manifest = manifest_path(image)
    if note is not None and note.entry is None:
        return f"{image}: {note.damage[0].text}"
    if trouble:
        return trouble if str(image) in trouble else f"{image}: {trouble}"
    if not os.path.lexists(image):
        return ""
    if os.path.lexists(f"{manifest}{PARTIAL}"):
        with unwritten(image) as free:
            if not free:
                return ""  # Its writer is between the two renames.
        return f"{image}: an image whose publication was interrupted; the next run finishes it"
    return f"{image}: an image without a manifest"


def _age(seen: Seen) -> tuple[datetime, str]:
    assert seen.row is not None
    return seen.row.entry.created_time, seen.row.entry.name


def possible_images(folder: Path, name: str, row: Row | None) -> list[Path]:
    """Where the image of an entry may be.

    Raises:
        StateError: no entry can have this name.
    """
    if row is not None:
        return [Path(row.entry.image)]
    tiers: tuple[Tier, ...] = tuple(SUFFIXES)
    return [image_path(folder, name, tier) for tier in tiers]
