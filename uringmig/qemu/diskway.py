"""How the disks of a guest are to be kept for its image, and what cannot be kept so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

from uringmig.errors import BusyError, PeerError, StateError
from uringmig.qemu.disknodes import PROTOCOLS, DiskNode
from uringmig.qemu.monitor import Monitor

_WAYS: Final = "none, internal or external=DIR"
#: Formats over which QEMU can put an overlay; a filter or a protocol of a network is none.
_OVERLAID: Final = frozenset(
    {"raw", *PROTOCOLS, "qcow2", "qcow", "qed", "vdi", "vmdk", "vpc", "vhdx", "parallels"}
)
#: Devices that hand the guest's commands to the host's own device: there is nothing to put over it.
_PASSED_THROUGH: Final = ("scsi-block", "scsi-generic")
#: QEMU: block/qcow2.c, the header has no room for more.
_BACKING_NAME_MAX: Final = 1023


@dataclass(frozen=True, slots=True)
class DisksWay:
    """How the disks of an image's moment are to be kept.

    Attributes:
        kind: not at all, in their own files, or beneath overlays.
        folder: for the overlays, absolute; None unless ``external``.
    """

    kind: Literal["none", "internal", "external"]
    folder: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take ``none``, ``internal`` or ``external=DIR``.

        Raises:
            StateError: it is something else.
        """
        folder = text.removeprefix("external=")
        if folder and folder != text:
            folder = os.path.abspath(folder)  # noqa: PTH100 - links stay: QEMU is told this name
            if not folder.isprintable():
                raise StateError(f"QEMU cannot be told this path: {folder!a}")
            return cls("external", folder)
        if text in ("none", "internal"):
            return cls("none" if text == "none" else "internal")
        raise StateError(f"disks: expected {_WAYS}, found {text!r}")


NO_DISKS: Final = DisksWay("none")


def refuse_disks(monitor: Monitor, disks: Sequence[DiskNode], way: DisksWay) -> None:
    """Refuse disks that QEMU cannot keep this way, before anything is done.

    Raises:
        BusyError: a block job is under way, which has disks of its own.
        PeerError: names the disk, its file, and what it is.
    """
    for one in disks:
        reason = why_not(one, way)
        if reason is not None:
            place = f"disk {one.facts.name} ({one.facts.files[0].path})"
            raise PeerError(f"{place} cannot be kept by --disks {way.kind}: {reason}")
    for job in monitor.execute("query-block-jobs"):
        raise BusyError(f"QEMU is busy with a {job['type']} job on its disks ({job['device']})")


def why_not(disk: DiskNode, way: DisksWay) -> str | None:
    """Say why a disk cannot be kept this way; None: it can.  Pure."""
    if not disk.info:
        return f"{disk.device_type} has it written by another process"
    if disk.info.get("active") is False:
        return "QEMU has given it away, as in a migration"
    if disk.device_type in _PASSED_THROUGH:
        return f"{disk.device_type} passes the guest's commands through"
    if not disk.named:
        return "no file of that name that QEMU has open (as with -drive snapshot=on, or a network)"
    if way.kind == "internal":
        return _why_not_internal(disk)
    if disk.driver not in _OVERLAID:
        return f"no overlay is put over {disk.driver!r}"
    if disk.info.get("encrypted"):
        return "it is encrypted, and the overlay would not be"
    if len(os.fsencode(disk.facts.files[0].path)) > _BACKING_NAME_MAX:
        return f"its name is longer than the {_BACKING_NAME_MAX} bytes that an overlay holds"
    return None


def _why_not_internal(disk: DiskNode) -> str | None:
    """As `why_not`, of a snapshot in the disk's own file."""
    if disk.driver != "qcow2":
        return f"it is {disk.driver!r}, and snapshots are in qcow2 files only"
    specific = disk.info.get("image", {}).get("format-specific", {}).get("data", {})
    if specific.get("data-file"):
        return "its data is in a file of its own, which has no snapshots"
    return None
