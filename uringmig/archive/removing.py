"""Entries removed: in an order in which whoever is killed when leaves them whole, or not at all.

The rows are marked first, which hides them; then the manifests go, and once that is durable the
images, then the notes, and the rows last. Removing a file needs no room on a disk: if the rows
cannot be written, the files go all the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from uringmig import signals
from uringmig.archive.catalogue import Catalogue, Row
from uringmig.archive.damagenotes import note_path
from uringmig.archive.entry import journal_path, manifest_path, split_image_name
from uringmig.archive.folder import sync_folder
from uringmig.errors import BytesError, StorageError

#: Entries whose files go together, with two or three syncs of the folder for all of them.
_BATCH: Final = 100


def remove_entries(catalogue: Catalogue, images: Sequence[Path]) -> list[str]:
    """Remove entries, whatever is left of them; the caller holds the archive's lock.

    Returns:
        What could not be done with the catalogue, one line each.

    Raises:
        StorageError: a file cannot be removed. Entries whose manifest is still there are whole, the
            next to open the archive goes on with the others. So it is after a signal.
    """
    if not catalogue.exists:
        remove_files(images)
        return []
    # Without this mark a reader may see some of them as missing for a moment; no more.
    _trouble_with(lambda: catalogue.mark(_names(images), removing=True))
    try:
        remove_files(images)
    except (StorageError, signals.Interrupted):
        whole = [image for image in images if os.path.lexists(manifest_path(image))]
        _trouble_with(lambda: catalogue.mark(_names(whole), removing=False))
        raise
    finally:
        gone = [image for image in images if not _has_files(image)]
        troubles = _trouble_with(lambda: catalogue.drop(_names(gone)))
    if troubles:
        # By its rows, what was removed would count as lost. The catalogue is expendable.
        catalogue.remove()
        troubles.append(f"{catalogue.path} was removed, since it cannot be changed")
    return troubles


def finish_removals(catalogue: Catalogue, rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """Go on with removals that a killed writer had begun.

    Returns:
        Names of entries that are gone now, and what could not be done, one line each.
    """
    removed, troubles = [], []
    for row in rows:
        if row.removing:
            try:
                troubles += remove_entries(catalogue, [Path(row.entry.image)])
            except StorageError as error:
                troubles.append(str(error))
            else:
                removed.append(row.entry.name)
    return removed, troubles


def remove_files(images: Sequence[Path]) -> None:
    """Remove the files of entries: the manifests first, so that no half entry is ever seen.

    Raises:
        StorageError: one cannot be removed.
    """
    folders = {image.parent for image in images}
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        _unlink([manifest_path(image) for image in batch], folders)
        _unlink([path for image in batch for path in (image, journal_path(image))], folders)
        _unlink([note_path(image) for image in batch], folders)


def _unlink(paths: Iterable[Path], folders: Iterable[Path]) -> None:
    """Remove files, durably."""
    any_gone = False
    for path in paths:
        signals.look()
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError("cannot remove", errno=error.errno, path=path) from None
        any_gone = True
    if any_gone:
        for folder in folders:
            sync_folder(folder)


def _trouble_with(change: Callable[[], None]) -> list[str]:
    """Try to change the catalogue; say what went wrong."""
    try:
        change()
    except (BytesError, StorageError) as error:
        return [str(error)]
    return []


def _names(images: Iterable[Path]) -> list[str]:
    """Names of the entries that images are of."""
    split = [split_image_name(image.name) for image in images]
    return [one[0] for one in split if one is not None]


def _has_files(image: Path) -> bool:
    return os.path.lexists(image) or os.path.lexists(manifest_path(image))
