"""What a killed writer left, put right: files, notes and catalogue agree, nothing half-made stays.

Only what is certain is done. A file that another process writes (it holds its lock) is left alone,
as is a partial file whose journal lets the copy go on; what no writer of ours can have left is
told, and never removed. An entry that is known is never forgotten: if its files are wrong or gone,
that is kept in a note beside them first, and in the catalogue then.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from uringmig import signals
from uringmig.archive.catalogue import Catalogue, Row
from uringmig.archive.damagenotes import SUFFIX as NOTE_SUFFIX
from uringmig.archive.damagenotes import write_note
from uringmig.archive.entry import (
    JOURNAL_SUFFIX,
    manifest_path,
    read_entry,
    split_image_name,
)
from uringmig.archive.folder import file_names, sync_folder, unwritten
from uringmig.archive.looking import Look, look
from uringmig.archive.removing import finish_removals
from uringmig.archive.salvage import Known, known_of, set_aside
from uringmig.errors import BytesError, StorageError
from uringmig.image import manifest
from uringmig.storage import nameless
from uringmig.storage.publication import FORMER, PARTIAL, settle

_SIDECAR_PARTIAL = manifest.SUFFIX + PARTIAL
_SIDECAR_FORMER = manifest.SUFFIX + FORMER
#: How the names of scratch files begin: those that are about to lose them, and those with which
#: earlier releases measured disks.
_SCRATCH = (nameless.PREFIX, ".depth-")
_NOTE_PARTIAL = NOTE_SUFFIX + PARTIAL


@dataclass(slots=True)
class HealReport:
    """What was put right; names of entries and files.

    Attributes:
        known: entries that are known, whatever is left of them.
        added: entries that were whole and not in the catalogue.
        removed: entries whose removal had begun.
        published: entries whose image lacked only the last step, its manifest's name.
        cleared: files of saves that cannot go on.
        kept_verification: entries whose earlier verification still holds.
        troubled: what is wrong with the files of entries, one line each.
        set_aside: where a catalogue that could not be used is now; empty: it could.
        problems: what looks like an entry and is none, and what could not be put right; one line
            each.
    """

    known: int = field(default=0, compare=False)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    kept_verification: int = field(default=0, compare=False)
    troubled: list[str] = field(default_factory=list)
    set_aside: str = ""
    problems: list[str] = field(default_factory=list)


def heal(folder: Path, catalogue: Catalogue, *, anew: bool = False) -> HealReport:
    """Put an archive right; the caller holds its lock.

    A catalogue that cannot be used is set aside and made anew, with what could be read of it. One
    that cannot be written is told and left: it is expendable.

    Args:
        folder: the archive.
        catalogue: its catalogue; need not exist.
        anew: read every manifest again, whatever the catalogue says.

    Raises:
        StorageError: the folder cannot be read; or, ``anew``, the catalogue cannot be written.
    """
    report = HealReport()
    known = known_of(catalogue, check=True)
    removed, troubles = finish_removals(catalogue, known.rows.values())
    report.removed += removed
    report.problems += troubles
    for name in removed:
        del known.rows[name]
    clear_leftovers(folder, report)
    if anew:
        rows = known.rows.items()
        known.rows = {name: Row(row.entry, "", row.removing) for name, row in rows}
    found = look(folder, known)
    report.problems += found.problems
    report.known = len(found.seen)
    report.troubled += [f"{one.name}: {one.trouble}" for one in found.entries if one.trouble]
    report.added += [entry.name for entry in found.entries if entry.name not in known.rows]
    report.kept_verification = sum(entry.condition in ("good", "damaged", "missing")
                                   for entry in found.entries)  # fmt: skip
    _keep_notes(found, report)
    try:
        _write_down(catalogue, known, found, report, anew=anew)
    except StorageError as error:
        if anew:
            raise
        report.problems.append(str(error))
    return report


def _keep_notes(found: Look, report: HealReport) -> None:
    """Note what is known against entries and lies in no note yet."""
    for seen in found.seen:
        signals.look()
        if seen.unkept and seen.row is not None:
            try:
                write_note(seen.row.entry, seen.damage)
            except StorageError as error:
                report.problems.append(str(error))


def _write_down(
    catalogue: Catalogue, known: Known, found: Look, report: HealReport, *, anew: bool
) -> None:
    """Let the catalogue say what was found."""
    seen = [one for one in found.seen if one.row is not None]
    if catalogue.exists and not known.trouble:
        rows = [one.row for one in seen if one.row is not None and one.unlisted]
        try:
            if rows:
                catalogue.put(rows)
        except StorageError:
            # If only stamps are new, nothing is lost: they save a later reader some reading.
            if not all(_is_known(row, known) for row in rows):
                raise
        catalogue.clear_log()
        return
    if known.trouble and not (known.damaged or anew):
        report.problems.append(known.trouble)
        return
    # Also where only a log is left: it would be played into the new one.
    aside = set_aside(catalogue)
    if known.trouble:
        report.set_aside = aside.name
    folder = catalogue.path.parent
    new = Catalogue(folder, name=catalogue.path.name + PARTIAL)
    new.remove()
    new.create()
    new.put_all(one.row for one in seen if one.row is not None)
    new.replace(catalogue)
    sync_folder(folder)


def _is_known(row: Row, known: Known) -> bool:
    """Whether the catalogue lacks nothing of a row but the stamp."""
    former = known.rows.get(row.entry.name)
    return former is not None and former.entry == structs.replace(row.entry, damaged_chunks=0)


def clear_leftovers(folder: Path, report: HealReport) -> None:
    """Finish publications that lack only a rename, and remove what cannot go on."""
    for name in sorted(file_names(folder)):
        signals.look()
        if image := _image_of(name, _SIDECAR_FORMER) or _image_of(name, FORMER):
            _settle(folder / image, report)
        elif name.startswith(_SCRATCH):
            _clear(folder / name, report)
    names = file_names(folder)
    for name in sorted(names):
        signals.look()
        if image := _image_of(name, _SIDECAR_PARTIAL):
            if image in names:
                _finish_publication(folder / image, folder / name, report)
            elif image + PARTIAL not in names:
                _clear(folder / name, report)
            else:
                with unwritten(folder / (image + PARTIAL)) as free:
                    if free:
                        _clear(folder / name, report)
        elif _image_of(name, _NOTE_PARTIAL):
            _clear(folder / name, report)
        elif image := _image_of(name, PARTIAL):
            if image + JOURNAL_SUFFIX not in names:
                _clear(folder / name, report)
        elif (image := _image_of(name, JOURNAL_SUFFIX)) and image + PARTIAL not in names:
            _clear(folder / name, report)


def _settle(image: Path, report: HealReport) -> None:
    """Undo or finish the replacement of an image that a killed save had begun."""
    with unwritten(Path(f"{image}{PARTIAL}"), missing=True) as free:
        if not free:
            return
        with contextlib.suppress(StorageError):  # one that is just going on settles itself
            settle(str(image), str(manifest_path(image)))
            report.cleared.append(image.name + FORMER)


def _finish_publication(image: Path, sidecar: Path, report: HealReport) -> None:
    """Give a manifest its name; it was durable before the image had its own."""
    with unwritten(image) as free:
        if not free:
            return
        if os.path.lexists(manifest_path(image)):
            _clear(sidecar, report)
            return
        try:
            entry = read_entry(image, sidecar=sidecar)
            sidecar.rename(manifest_path(image))
            sync_folder(image.parent)
        except (BytesError, StorageError) as error:
            report.problems.append(f"{image}: its manifest is not published: {error}")
        except OSError as error:
            report.problems.append(f"{sidecar}: cannot be renamed: {error.strerror}")
        else:
            report.published.append(entry.name)


def _clear(path: Path, report: HealReport) -> None:
    """Remove a file that nobody writes."""
    with unwritten(path) as free:
        if free:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                report.problems.append(f"{path}: cannot be removed: {error.strerror}")
            else:
                report.cleared.append(path.name)


def _image_of(name: str, suffix: str) -> str | None:
    """The image's file name that is followed by ``suffix`` in ``name``, or None."""
    image = name.removesuffix(suffix)
    return image if image != name and split_image_name(image) else None
