"""Notes of damage: what is known against an entry, in a small file beside its image.

The catalogue is expendable, this is not: a note is durable before anything else says what it says,
and it goes only when the same places were found good again, or with its entry. It also holds what
its entry is, so that an entry of which nothing else is left is still known to be missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from uringmig.archive.entry import Entry, entry_of, read_manifest
from uringmig.archive.folder import sync_folder
from uringmig.archive.record import record_of
from uringmig.errors import FormatError, LimitError, StorageError
from uringmig.storage.filelock import take_lock
from uringmig.storage.publication import PARTIAL

SUFFIX: Final = ".damage.json"
#: What is not in a block: headers, bitmaps, device state, index, and the files themselves.
STREAM_CHUNK: Final = -1
#: Nobody knows where: the note cannot be read. Only a verification of all chunks clears it.
UNKNOWN_CHUNK: Final = -2
_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in an entry that is not what its manifest says.

    Attributes:
        chunk: number of the chunk over all blocks, or `STREAM_CHUNK`, or `UNKNOWN_CHUNK`.
        text: block, offset, expected and found, in one line.
        found_at: ISO 8601.
    """

    chunk: int
    text: str
    found_at: str


@dataclass(frozen=True, slots=True)
class Note:
    """What a note says.

    Attributes:
        entry: the entry as it was known; None if the note cannot be read.
        damage: its damaged places, by their chunks.
    """

    entry: Entry | None
    damage: tuple[Damage, ...]


class _File(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal["uringmig-damage"] = "uringmig-damage"
    version: Literal[1] = 1
    entry: dict[str, Any]
    damage: tuple[Damage, ...]


def note_path(image: Path) -> Path:
    """Where the note of an entry is."""
    return Path(f"{image}{SUFFIX}")


def read_note(image: Path) -> Note | None:
    """Read the note of an entry; None is: nothing is known against it.

    A note that cannot be read is taken for damage: it would not be there without.

    Raises:
        LimitError: nothing can be read now.
    """
    path = note_path(image)
    try:
        said = msgspec.json.decode(read_manifest(path), type=_File)
        entry = entry_of(image.parent, said.entry)
        if entry.image != str(image):
            raise FormatError(f"the note is of the entry {entry.name!r}")
    except LimitError:
        raise
    except (StorageError, FormatError, ValueError, RecursionError) as error:
        if isinstance(error, StorageError) and error.is_absent:
            return None
        text = f"the note of its damage cannot be read: {error}"
        return Note(None, (Damage(UNKNOWN_CHUNK, text, ""),))
    return Note(entry, said.damage)


def write_note(entry: Entry, damage: Iterable[Damage]) -> None:
    """Keep what is known against an entry; it is durable when this returns.

    Raises:
        StorageError: it could not be kept; the former note is still there.
    """
    path = note_path(Path(entry.image))
    said = _File(
        entry=record_of(entry),
        damage=tuple(sorted(damage, key=lambda one: one.chunk)),
    )
    partial = Path(f"{path}{PARTIAL}")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
            # Against whoever clears what killed writers left, and another that notes just now.
            # Without locks nobody clears anything, and a note that two have garbled is damage too.
            take_lock(fd)
            try:
                file.truncate(0)
                file.write(msgspec.json.format(msgspec.json.encode(said), indent=1))
                file.flush()
                os.fsync(fd)
                partial.rename(path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StorageError("cannot keep the damage", errno=error.errno, path=path) from None
    sync_folder(path.parent)


def remove_note(image: Path) -> None:
    """Forget what was known against an entry.

    Raises:
        StorageError: it cannot be removed.
    """
    path = note_path(image)
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError("cannot remove", errno=error.errno, path=path) from None
    sync_folder(path.parent)
