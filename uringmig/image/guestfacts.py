"""What a manifest says of the machine that was saved, and where its memory lay.  Pure.

Nothing is restored from it. It is for whoever takes the memory out of the image to look into it: an
image knows blocks, and a tool of forensics asks for physical addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec

from uringmig.errors import FormatError
from uringmig.format.constants import MAPPED_RANGES_MAX

#: A word of QEMU's, as long as any of them may be.
Word = Annotated[str, msgspec.Meta(max_length=255)]
#: A guest-physical address, or bytes.
Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
#: A file's name as QEMU has it; PATH_MAX and a little.
FileName = Annotated[str, msgspec.Meta(min_length=1, max_length=5000)]
#: More disks than any machine has buses for, and longer chains than QEMU opens.
DISKS_MAX: Final = 4096
CHAIN_MAX: Final = 1024

#: How the disk of the image's moment is kept: not at all; as an internal snapshot in its file; as
#: its file itself, over which an overlay was put; or in the image's own memory, as flash is.
Kept = Literal["none", "internal", "external", "image"]


class MapRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Guest-physical addresses behind which memory lies; in bytes.

    Attributes:
        start: the first address.
        length: not zero.
        block: idstr of the ramblock that is there; None is memory that is not in the image, as a
            device's own.
        offset: of ``start`` in that block.
        read_only: the guest's writes do not reach it, as in a ROM.
        region: QEMU's name of the memory.
    """

    start: Bytes
    length: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    block: Word | None
    offset: Bytes
    read_only: bool
    region: Word


class DiskFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of those that a disk lies in; None is what could not be looked at.

    Attributes:
        path: absolute, as QEMU's process sees it, or QEMU's own word for what is no plain file.
        format: ``qcow2``, ``raw``, ...
        inode: of a regular file.
        size: of the file, in bytes.
        modified_ns: when it was last written, in nanoseconds of Unix time, as it was kept.
    """

    path: FileName
    format: Word | None
    inode: Bytes | None = None
    size: Bytes | None = None
    modified_ns: Bytes | None = None


class GuestDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk that the guest may write to.

    Attributes:
        device: QOM path or id of the guest's device.
        backend: id of QEMU's ``-drive``, if it has one.
        node: name of the block node that it wrote to.
        size: of the disk as the guest sees it, in bytes.
        kept: how the disk of the image's moment is kept.
        files: what the disk of that moment lies in: its file, then what is behind that.
        snapshot: name of the internal snapshot.
        snapshot_id: its number in the file.
        overlay: the file that the guest writes to since then.
    """

    device: FileName
    backend: Word | None
    node: Word
    size: Bytes
    kept: Kept
    files: Annotated[list[DiskFile], msgspec.Meta(min_length=1, max_length=CHAIN_MAX)]
    snapshot: Word | None = None
    snapshot_id: Word | None = None
    overlay: FileName | None = None

    @property
    def name(self) -> str:
        """What people call it: the drive's id, or the device's without its path."""
        return self.backend or self.device.removesuffix("/virtio-backend").rpartition("/")[2]


class GuestFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine as QEMU described it while the guest stood still; None is what it did not say.

    Attributes:
        qemu_version: for example ``10.0.2``.
        qemu_package: the distribution's name of it.
        machine: machine type.
        target: architecture of the guest, for example ``x86_64``.
        cpu_type: QOM type of the first processor.
        cpu_count: processors, those that were plugged in later too.
        kvm: KVM ran the guest.
        name: of the virtual machine, QEMU's ``-name``.
        uuid: of the virtual machine, QEMU's ``-uuid``.
        memory_map: where its memory lay, ascending and without overlap.
        disks: those that it may write to; not there if there is none.
    """

    qemu_version: Word
    qemu_package: Word | None
    machine: Word | None
    target: Word | None
    cpu_type: Word | None
    cpu_count: Count | None
    kvm: bool | None
    name: Word | None
    uuid: Word | None
    memory_map: Annotated[list[MapRange], msgspec.Meta(max_length=MAPPED_RANGES_MAX)] | None
    disks: Annotated[list[GuestDisk], msgspec.Meta(max_length=DISKS_MAX)] | msgspec.UnsetType = (
        msgspec.UNSET
    )


def check_map(ranges: Sequence[MapRange], lengths: Mapping[str, int] | None) -> None:
    """Check that ranges are in order, and lie in the blocks that they name.

    Args:
        ranges: of a machine.
        lengths: used length of every block by idstr; None: they are not known here.

    Raises:
        FormatError: names the first range that breaks a rule.
    """
    end = 0
    for one in ranges:
        place = f"memory map at guest address {one.start:#x}"
        if one.start < end:
            raise FormatError(f"{place} begins in the range before it")
        end = one.start + one.length
        if one.block is None or lengths is None:
            continue
        if one.block not in lengths:
            raise FormatError(f"{place}: no such block", found=one.block)
        if one.offset + one.length > lengths[one.block]:
            raise FormatError(
                f"{place} ends past its block",
                block=one.block,
                expected=lengths[one.block],
                found=one.offset + one.length,
            )


def how_kept(disk: GuestDisk) -> str:
    """How the disk of the image's moment is kept, in a few words."""
    match disk.kept:
        case "internal":
            return f"snapshot {disk.snapshot}"
        case "external":
            return f"beneath {disk.overlay}"
        case "image":
            return "in the image"
        case "none":
            return "not"


def disk_lines(disks: Sequence[GuestDisk]) -> list[str]:
    """What belongs to an image of the disks of its machine, for whoever restores it."""
    return [f"disk {one.name} ({one.files[0].path}) was kept: {how_kept(one)}" for one in disks]


def check_disk_facts(disks: Sequence[GuestDisk]) -> None:
    """Check that what is said of each disk goes with the way it is kept.

    Raises:
        FormatError: names the first disk that breaks a rule.
    """
    for one in disks:
        if (one.kept == "internal") != (one.snapshot is not None):
            raise FormatError(f"disk {one.device!r}: snapshot of one that is kept", found=one.kept)
        if (one.kept == "external") != (one.overlay is not None):
            raise FormatError(f"disk {one.device!r}: overlay of one that is kept", found=one.kept)
