"""One entry of an archive: its name, where its files are, and what its manifest says.

The name is the only way to an entry's files: paths are made of it here, and none is ever taken from
a manifest or a catalogue.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from uringmig.archive.record import EntryRecord, record_of
from uringmig.errors import FormatError, MismatchError, StateError, StorageError
from uringmig.image import manifest
from uringmig.image.digest import bytes_digest
from uringmig.image.manifest import Label, Size, Tier

#: What an image's file is called after its entry's name.
SUFFIXES: Final[dict[Tier, str]] = {"hot": ".mig", "cold": ".cold"}
JOURNAL_SUFFIX: Final = ".journal"
#: NAME_MAX is 255, and the longest that follows a name is ``.cold.manifest.json.partial``.
NAME_BYTES_MAX: Final = 200
#: QEMU takes this for the end of a path, so it could not load such an image.
_OFFSET_WORD: Final = ",offset="

Condition = Literal["unchecked", "good", "damaged", "missing"]


class Entry(EntryRecord, frozen=True, kw_only=True):
    """A whole image in an archive: its record, its files, and what is known of them.

    Attributes:
        image: the path of its file.
        manifest: the path of its manifest.
        verified_at: when every chunk had last been found good, ISO 8601; None is never.
        verify_cursor: chunks looked at since, in the pass that goes on.
        damaged_chunks: places known to be damaged now.
        missing: its image or its manifest is not there.
        trouble: what is wrong with its files at the first look, in one line; empty is nothing.
    """

    image: str
    manifest: str
    verified_at: Label | None = None
    verify_cursor: Size = 0
    damaged_chunks: Size = 0
    missing: bool = False
    trouble: str = ""

    @property
    def created_time(self) -> datetime:
        """When it was made, with its time zone."""
        return datetime.fromisoformat(self.created)

    @property
    def condition(self) -> Condition:
        """What its files' looks and verification know of it."""
        if self.missing:
            return "missing"
        if self.damaged_chunks or self.trouble:
            return "damaged"
        return "unchecked" if self.verified_at is None else "good"

    @property
    def is_sound(self) -> bool:
        """Whether nothing is known against it."""
        return self.condition in ("good", "unchecked")

    def is_same(self, other: Entry) -> bool:
        """Say whether both are the same image at the same name, by what their manifests hold."""
        if self.manifest_digest and other.manifest_digest:
            return self.manifest_digest == other.manifest_digest
        mine = (self.content_digest, self.created, self.file_bytes)
        return mine == (other.content_digest, other.created, other.file_bytes)


def entry_of(folder: Path, said: object, **known: object) -> Entry:
    """Make an entry of what a file says, checked as if a stranger had written it.

    Args:
        folder: of the archive; paths are made of it and the name, and never taken from the file.
        said: its record, as a JSON object; what else is in there is ignored.
        known: other fields of `Entry` that are no paths.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        record = msgspec.convert(said, EntryRecord)
        image = image_path(folder, record.name, record.tier)
        paths = {"image": str(image), "manifest": str(manifest_path(image))}
        entry = msgspec.convert({**record_of(record), **known, **paths}, Entry)
    except (msgspec.ValidationError, StateError) as error:
        raise ValueError(str(error)) from None
    if entry.created_time.tzinfo is None:
        raise ValueError("created has no time zone")
    return entry


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifests of all tiers have in common; the rest is for who reads the image."""

    created: Label
    machine: Label
    file_size: Size
    archive: manifest.ArchiveFields


def check_name(name: str) -> None:
    """Refuse a name that no entry can have.

    Raises:
        StateError: says which rule it breaks.
    """
    complaint = None
    if not name or not name.isprintable():
        complaint = "it is empty or has characters that cannot be shown"
    elif "/" in name or name[0] in ".-":
        complaint = "it has a / or begins with . or -"
    elif len(name.encode()) > NAME_BYTES_MAX:
        complaint = f"it is longer than {NAME_BYTES_MAX} bytes"
    elif _OFFSET_WORD in name:
        complaint = f"QEMU cannot load a file with {_OFFSET_WORD!r} in its name"
    if complaint is not None:
        raise StateError(f"no name for an entry: {name!r}: {complaint}")


def image_path(folder: Path, name: str, tier: Tier) -> Path:
    """Where an entry's image is; its manifest and journal have this path and their suffix.

    Raises:
        StateError: no entry can have this name.
    """
    check_name(name)
    if tier not in get_args(Tier):
        raise StateError(f"tier {tier!r} is none of {', '.join(get_args(Tier))}")
    return folder / f"{name}{SUFFIXES[tier]}"


def journal_path(image: Path) -> Path:
    """Where the journal of an unfinished image is."""
    return Path(f"{image}{JOURNAL_SUFFIX}")


def manifest_path(image: Path) -> Path:
    """Where an image's manifest is."""
    return Path(f"{image}{manifest.SUFFIX}")


def split_image_name(file_name: str) -> tuple[str, Tier] | None:
    """The entry's name and tier that an image's file name stands for, or None."""
    for tier, suffix in SUFFIXES.items():
        name = file_name.removesuffix(suffix)
        if name != file_name:
            try:
                check_name(name)
            except StateError:
                return None
            return name, tier
    return None


def read_entry(image: Path, *, sidecar: Path | None = None) -> Entry:
    """Read an image's manifest and compare it with the file's name and length.

    The image itself is not read: that is `verify`'s.

    Args:
        image: its path.
        sidecar: the manifest, where it does not have its name yet.

    Raises:
        FormatError: the manifest is not one of an archive's entry.
        MismatchError: the manifest is another image's.
        StorageError: one of the two files cannot be read.
    """
    entry = read_identity(image, sidecar=sidecar)
    with _accessing(image):
        size = image.stat().st_size
    if size != entry.file_bytes:
        raise MismatchError(
            f"{image}: length is not its manifest's", expected=entry.file_bytes, found=size
        )
    return entry


def read_identity(image: Path, *, sidecar: Path | None = None) -> Entry:
    """Read what an image's manifest says; the image need not be there.

    Raises:
        FormatError: the manifest is not one of an archive's entry.
        MismatchError: the manifest is another image's.
        StorageError: the manifest cannot be read.
    """
    sidecar = sidecar or manifest_path(image)
    text = read_manifest(sidecar)
    try:
        header = msgspec.json.decode(text, type=_Header)
        created = datetime.fromisoformat(header.created)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{sidecar}: no manifest of an archive's entry: {error}") from None
    if created.tzinfo is None:
        raise FormatError(f"{sidecar}: created", expected="a time zone", found=header.created)
    fields = header.archive
    if split_image_name(image.name) != (fields.name, fields.tier):
        raise MismatchError(
            f"{image}: the file's name is not its manifest's",
            expected=f"{fields.name!r} of tier {fields.tier}",
            found=repr(image.name),
        )
    return Entry(
        created=header.created,
        machine=header.machine,
        file_bytes=header.file_size,
        image=str(image),
        manifest=str(manifest_path(image)),
        manifest_digest=bytes_digest(text).hex(),
        **msgspec.structs.asdict(fields),
    )


def read_manifest(path: Path) -> bytes:
    """Read a manifest's file: a FIFO does not hang, a link does not lead elsewhere.

    Raises:
        StorageError: it cannot be read, is no regular file, or is too large to be a manifest.
    """
    with _accessing(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError("not a regular file", path=path)
            if status.st_size > manifest.BYTES_MAX:
                raise StorageError(f"larger than {manifest.BYTES_MAX} bytes", path=path)
            return file.read(status.st_size)


@contextmanager
def _accessing(path: Path) -> Iterator[None]:
    """Name the file whose access fails."""
    try:
        yield
    except OSError as error:
        raise StorageError("cannot read", errno=error.errno, path=path) from None
