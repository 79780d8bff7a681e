"""What an entry of an archive is, and what its copy came to: said once for all who hold it.  Pure.

A manifest holds most of it (`image.manifest.ArchiveFields`, and three fields beside them); the
catalogue and the notes of damage keep all of it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from uringmig.image.manifest import ArchiveFields, Label, Size

#: Empty where it is not known: in what an older version wrote.
_ManifestDigest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")]


class EntryRecord(ArchiveFields, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What an entry is, as its manifest says it; sizes in bytes.

    Attributes:
        created: ISO 8601, with its time zone.
        machine: QEMU's machine type.
        file_bytes: length of the image's file.
        manifest_digest: of the manifest's bytes: while they are the same, so is the entry, wherever
            its files were copied to; hex.
    """

    created: Label
    machine: Label
    file_bytes: Size
    manifest_digest: _ManifestDigest = ""


class CopyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy into an archive came to; sizes in bytes.

    Attributes:
        memory_bytes: guest memory it stands for.
        stored_bytes: guest memory in pages that are set.
        file_bytes: length of the image's file.
        allocated_bytes: what the file system counts for it, shared blocks included.
        shared_bytes: of the file, that another file has too (reflink).
        resumed_bytes: guest memory taken over from an interrupted copy.
        ratio: bytes of the pages stored for each byte they take in the file.
        seconds: elapsed.
    """

    memory_bytes: int
    stored_bytes: int
    file_bytes: int
    allocated_bytes: int
    shared_bytes: int = 0
    resumed_bytes: int = 0
    ratio: float
    seconds: float = 0.0


def record_of(entry: EntryRecord) -> dict[str, object]:
    """The record of an entry as plain values, without what is known of it besides."""
    return {name: getattr(entry, name) for name in EntryRecord.__struct_fields__}
