"""What an entry of an archive is: one record, wherever it is written down.  Pure.

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


def record_of(entry: EntryRecord) -> dict[str, object]:
    """The record of an entry as plain values, without what is known of it besides."""
    return {name: getattr(entry, name) for name in EntryRecord.__struct_fields__}
