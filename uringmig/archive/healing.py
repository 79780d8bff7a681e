"""What a killed writer left, put right: files and catalogue agree, and nothing half-made stays.

Only what is certain is done. A file that another process writes (it holds its lock) is left alone,
as is a partial file whose journal lets the copy go on; what no writer of ours can have left is
told, and never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from uringmig.archive.catalogue import Catalogue, Row, manifest_stamp
from uringmig.archive.entry import (
    JOURNAL_SUFFIX,
    journal_path,
    manifest_path,
    read_entry,
    split_image_name,
)
from uringmig.errors import BytesError, StorageError
from uringmig.image import manifest
from uringmig.storage import nameless
from uringmig.storage.folder import sync_folder
from uringmig.storage.publication import FORMER, PARTIAL, settle

_SIDECAR_PARTIAL = manifest.SUFFIX + PARTIAL
_SIDECAR_FORMER = manifest.SUFFIX + FORMER
#: How the names of scratch files begin: those that are about to lose them, and those with which
#: earlier releases measured disks.
_SCRATCH = (nameless.PREFIX, ".depth-")


@dataclass(slots=True)
class HealReport:
    """What was put right; names of entries and files.

    Attributes:
        added: entries that were whole and not in the catalogue.
        forgotten: entries in the catalogue whose files are gone.
        removed: entries whose removal had begun.
        published: images that lacked only the last step, their manifest's name.
        cleared: files of saves that cannot go on.
        problems: what looks like an entry and is none, one line each; left as it is.
    """

    added: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def heal(folder: Path, catalogue: Catalogue) -> HealReport:
    """Put an archive right; the caller holds its lock.

    Raises:
        FormatError: the catalogue is damaged.
        StorageError: the folder or the catalogue cannot be read or written.
    """
    report = HealReport()
    catalogue.check()
    rows = {row.entry.name: row for row in catalogue.rows()}
    for name, row in list(rows.items()):
        if row.removing:
            remove_files(Path(row.entry.image))
            catalogue.drop([name])
            del rows[name]
            report.removed.append(name)
    clear_leftovers(folder, report)
    found = {row.entry.name: row for row in read_rows(folder, known=rows, problems=report.problems)}
    new = [row for name, row in found.items() if rows.get(name) is not row]
    gone = [name for name in rows if name not in found]
    catalogue.put(new)
    catalogue.drop(gone)
    report.added += [row.entry.name for row in new]
    report.forgotten += gone
    return report


def read_rows(folder: Path, *, known: dict[str, Row], problems: list[str]) -> list[Row]:
    """Read every entry of a folder; a manifest that is still the known one is not read again.

    Args:
        folder: the archive.
        known: rows of the catalogue by the entry's name; such a row is returned itself.
        problems: what looks like an entry and is none is added here.
    """
    rows: dict[str, Row] = {}
    names = _names(folder)
    for name in sorted(names):
        image = folder / name.removesuffix(manifest.SUFFIX)
        if name == image.name:
            if split_image_name(name) and name + manifest.SUFFIX not in names:
                problems.append(f"{image}: an image without a manifest")
            continue
        if split_image_name(image.name) is None:
            continue
        try:
            stamp = manifest_stamp(folder / name)
            row = known.get(image.name.rpartition(".")[0])
            if row is None or row.manifest_stamp != stamp or row.entry.image != str(image):
                row = Row(read_entry(image), stamp, removing=False)
            elif image.stat().st_size != row.entry.file_bytes:
                read_entry(image)  # which says what is wrong
        except (BytesError, StorageError) as error:
            problems.append(str(error))
        except OSError:
            problems.append(f"{folder / name}: a manifest without an image")
        else:
            if row.entry.name in rows:
                problems.append(f"{image}: there is another entry of the name {row.entry.name!r}")
            rows.setdefault(row.entry.name, row)
    return list(rows.values())


def clear_leftovers(folder: Path, report: HealReport) -> None:
    """Finish publications that lack only a rename, and remove what cannot go on."""
    for name in sorted(_names(folder)):
        if image := _image_of(name, _SIDECAR_FORMER) or _image_of(name, FORMER):
            _settle(folder / image, report)
        elif name.startswith(_SCRATCH):
            _clear(folder / name, report)
    names = _names(folder)
    for name in sorted(names):
        if image := _image_of(name, _SIDECAR_PARTIAL):
            if image in names:
                _finish_publication(folder / image, folder / name, report)
            elif image + PARTIAL not in names:
                _clear(folder / name, report)
            else:
                with _unwritten(folder / (image + PARTIAL)) as free:
                    if free:
                        _clear(folder / name, report)
        elif image := _image_of(name, PARTIAL):
            if image + JOURNAL_SUFFIX not in names:
                _clear(folder / name, report)
        elif (image := _image_of(name, JOURNAL_SUFFIX)) and image + PARTIAL not in names:
            _clear(folder / name, report)


def remove_files(image: Path) -> None:
    """Remove an entry's files: the manifest first, so that no half entry is ever seen.

    Raises:
        StorageError: one cannot be removed.
    """
    try:
        manifest_path(image).unlink(missing_ok=True)
        sync_folder(image.parent)
        image.unlink(missing_ok=True)
        journal_path(image).unlink(missing_ok=True)
        sync_folder(image.parent)
    except OSError as error:
        raise StorageError("cannot remove", errno=error.errno, path=image) from None


def _settle(image: Path, report: HealReport) -> None:
    """Undo or finish the replacement of an image that a killed save had begun."""
    with _unwritten(Path(f"{image}{PARTIAL}"), missing=True) as free:
        if not free:
            return
        with contextlib.suppress(StorageError):  # one that is just going on settles itself
            settle(str(image), str(manifest_path(image)))
            report.cleared.append(image.name + FORMER)


def _finish_publication(image: Path, sidecar: Path, report: HealReport) -> None:
    """Give a manifest its name; it was durable before the image had its own."""
    with _unwritten(image) as free:
        if not free:
            return
        if manifest_path(image).exists():
            _clear(sidecar, report)
            return
        try:
            read_entry(image, sidecar=sidecar)
        except (BytesError, StorageError) as error:
            report.problems.append(f"{image}: an image without a manifest ({error})")
            return
        sidecar.rename(manifest_path(image))
        sync_folder(image.parent)
        report.published.append(image.name)


def _clear(path: Path, report: HealReport) -> None:
    """Remove a file that nobody writes."""
    with _unwritten(path) as free:
        if free:
            path.unlink(missing_ok=True)
            report.cleared.append(path.name)


@contextlib.contextmanager
def _unwritten(path: Path, *, missing: bool = False) -> Iterator[bool]:
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
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken; or there are no locks here, and nobody can tell
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def _image_of(name: str, suffix: str) -> str | None:
    """The image's file name that is followed by ``suffix`` in ``name``, or None."""
    image = name.removesuffix(suffix)
    return image if image != name and split_image_name(image) else None


def _names(folder: Path) -> set[str]:
    """Names of all files in a folder.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - names are wanted, not paths
    except OSError as error:
        raise StorageError("cannot read the folder", errno=error.errno, path=folder) from None
