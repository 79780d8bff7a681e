"""The sidecar NAME.manifest.json: what was saved, how, and a digest for every window.  Pure.

Optional: stock QEMU loads the image with or without it. `verify` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from uringmig.errors import FormatError
from uringmig.image import digest
from uringmig.image.guestfacts import GuestFacts, check_disk_facts, check_map
from uringmig.options import WINDOW_BYTES
from uringmig.units import MiB

SUFFIX: Final = ".manifest.json"
WRITER: Final = "uringmig"
FORMAT: Final = "uringmig-manifest"
COLD_FORMAT: Final = "uringmig-cold-manifest"
#: Of a manifest that has nothing but what the first programs knew.
FIRST_VERSION: Final = 1
#: Of one that has ``guest`` or ``pieces``, fields that they do not know and so refuse.
SECOND_VERSION: Final = 2
#: Of one whose ``guest`` has ``disks``.
VERSION: Final = 3
#: 64 TiB of RAM give 16 Mi windows of 35 bytes, and pieces are kept of at most a TiB of data, in
#: 256 MiB: no honest manifest is larger.
BYTES_MAX: Final = 900 * MiB

Tier = Literal["hot", "cold"]
#: A count of bytes that a catalogue can hold too.
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
#: A host's or a virtual machine's name; longer than any of them may be.
Label = Annotated[str, msgspec.Meta(max_length=255)]
#: A path or what stands for one; PATH_MAX and a little.
Whereabouts = Annotated[str, msgspec.Meta(max_length=5000)]
HexDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class ManifestBlock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ramblock: its place, its pages, and the digest of each window of its memory, as hex.

    ``pieces``, if it is there, has those of 64 KiB of which any page is set, see `pieces`; as a
    text it is base64.
    """

    idstr: str
    used_length: int
    bitmap_offset: int
    pages_offset: int
    pages_set: int
    digests: list[str]
    pieces: bytes | msgspec.UnsetType = msgspec.UNSET


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What really ran, not what was asked for."""

    engine: str
    direct: bool
    channels: int
    depth: int
    block_size: int
    bridge: int
    rate: int


class ArchiveFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes an image an entry of an archive; with the rest it rebuilds the catalogue.

    Every tier's manifest has these as ``archive``, beside ``created``, ``machine`` and
    ``file_size``.

    Attributes:
        name: of the entry; the image's file is named after it.
        vm: whose memory it is.
        host: where it was made.
        source_kind: what it was read from: ``qmp`` (a running QEMU), or a kind of contents.
        source_path: where that was.
        source_fingerprint: what the source was, so that the same one is known again; may be empty.
        content_digest: `digest.content_digest`, equal in all tiers.
        memory_bytes: guest memory.
        stored_bytes: guest memory in pages that are set.
    """

    name: Label
    vm: Label
    tier: Tier
    host: Label
    source_kind: Label
    source_path: Whereabouts
    source_fingerprint: Whereabouts
    content_digest: HexDigest
    memory_bytes: Size
    stored_bytes: Size


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole sidecar; sizes and offsets in bytes, times in seconds.

    ``base`` is where the image begins in its file; ``stream_digest`` covers every byte outside the
    page areas; ``archive`` is there if the image is an entry of an archive, and ``guest`` if it was
    saved from a running QEMU.
    """

    format: str = FORMAT
    version: int = FIRST_VERSION
    created: str
    writer: str
    machine: str
    base: int
    file_size: int
    digest: str = digest.ALGORITHM
    digest_bytes: int = WINDOW_BYTES
    piece_bytes: int | msgspec.UnsetType = msgspec.UNSET
    stream_digest: str
    blocks: list[ManifestBlock]
    settings: Settings
    seconds: dict[str, float]
    notes: list[str]
    archive: ArchiveFields | msgspec.UnsetType = msgspec.UNSET
    guest: GuestFacts | msgspec.UnsetType = msgspec.UNSET


class ColdManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sidecar of a cold image; sizes in bytes, times in seconds.

    The digests of windows and frames are in the image's own index; ``index_digest`` covers it.

    Attributes:
        level: of the compression.
        frames: in the image; a window without data has none.
        frame_bytes: of all frames, compressed.
        guest: the machine, if the memory came from a running QEMU.
    """

    format: str = COLD_FORMAT
    version: int = FIRST_VERSION
    created: str
    writer: str
    machine: str
    file_size: int
    digest: str = digest.ALGORITHM
    digest_bytes: int = WINDOW_BYTES
    index_digest: str
    level: int
    frames: int
    frame_bytes: int
    settings: Settings
    seconds: dict[str, float]
    notes: list[str]
    archive: ArchiveFields
    guest: GuestFacts | msgspec.UnsetType = msgspec.UNSET


class _Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What must be looked at first: all else means what it does in this format and version."""

    format: str = ""
    version: int = FIRST_VERSION


ArchiveManifest = Manifest | ColdManifest
_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Manifest = TypeVar("_Manifest", Manifest, ColdManifest)


def version_of(guest: GuestFacts | None, *, pieces: bool = False) -> int:
    """The oldest version that a manifest with these can have: old programs read what they can."""
    if guest is not None and guest.disks is not msgspec.UNSET:
        return VERSION
    return FIRST_VERSION if guest is None and not pieces else SECOND_VERSION


def encode(manifest: ArchiveManifest) -> bytes:
    """Write a manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """Read the manifest of a mapped-ram image.

    Raises:
        FormatError: it is not JSON, lacks a field, or is of another format, digest or newer
            version; or what it says of the guest's memory or disks does not fit.
    """
    said = _checked(data, Manifest, FORMAT)
    pieces = sum(block.pieces is not msgspec.UNSET for block in said.blocks)
    if pieces not in (0, len(said.blocks)):
        raise FormatError("manifest blocks with digests of pieces", found=pieces)
    expected = digest.PIECE_BYTES if pieces else msgspec.UNSET
    if said.piece_bytes != expected:
        raise FormatError("manifest piece_bytes", expected=expected, found=said.piece_bytes)
    _check_version(said, version_of(said.guest or None, pieces=bool(pieces)))
    if said.guest:
        _check_guest(said.guest, {block.idstr: block.used_length for block in said.blocks})
    return said


def decode_cold(data: bytes) -> ColdManifest:
    """Read the manifest of a cold image.

    Raises:
        FormatError: as for `decode`; its blocks are in the image's own index.
    """
    said = _checked(data, ColdManifest, COLD_FORMAT)
    _check_version(said, version_of(said.guest or None))
    if said.guest:
        _check_guest(said.guest, None)
    return said


def _check_guest(guest: GuestFacts, lengths: Mapping[str, int] | None) -> None:
    """Check what is said of a machine, by the used lengths of its blocks if they are known here."""
    if guest.memory_map is not None:
        check_map(guest.memory_map, lengths)
    if guest.disks is not msgspec.UNSET:
        check_disk_facts(guest.disks)


def _structure(data: bytes, kind: type[_Struct]) -> _Struct:
    """Decode JSON as a structure."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"manifest: {error}") from None


def _check_version(said: ArchiveManifest, oldest: int) -> None:
    """Refuse a manifest that has what its version does not."""
    if said.version < oldest:
        raise FormatError("manifest version", expected=oldest, found=said.version)


def _checked(data: bytes, kind: type[_Manifest], format_name: str) -> _Manifest:
    """Decode a manifest, and check what has only few values."""
    first = _structure(data, _Kind)
    if first.format != format_name:
        raise FormatError("manifest format", expected=format_name, found=first.format)
    if not FIRST_VERSION <= first.version <= VERSION:
        expected = f"{FIRST_VERSION} to {VERSION}"
        raise FormatError("manifest version", expected=expected, found=first.version)
    manifest = _structure(data, kind)
    for name, expected_value in (
        ("digest", digest.ALGORITHM),
        ("digest_bytes", WINDOW_BYTES),
    ):
        found = getattr(manifest, name)
        if found != expected_value:
            raise FormatError(f"manifest {name}", expected=expected_value, found=found)
    return manifest
