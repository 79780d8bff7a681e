"""What was kept of a guest's disks for an image that did not come to be, and how it goes again.

It is found by looking at what QEMU has, not by remembering how far a save came: so the save itself
undoes it with the same steps as whoever finds the note of one that was killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from uringmig.errors import BytesError, StorageError
from uringmig.image import manifest
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.sidecar import load_sidecar, sidecar_path
from uringmig.qemu.diskfile import look_at_qcow2
from uringmig.qemu.guardprocess import OURS
from uringmig.qemu.jobs import has_job, run_job
from uringmig.qemu.monitor import Monitor
from uringmig.storage.mainfile import open_for_reading
from uringmig.storage.publication import PARTIAL

#: Begins the note that QEMU keeps from before disks are touched until the image has its name.
NOTE: Final = f"{OURS} disks kept for an image: "
_NAME: Final = re.compile(r"uringmig-[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


class KeptDisk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a `Keeping`; ``overlay`` and ``overlay_node`` are None for internal snapshots."""

    node: str
    file: str
    overlay: str | None = None
    overlay_node: str | None = None


class Keeping(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be kept of a guest's disks, and for which image.

    Attributes:
        kind: internal snapshots or overlays.
        name: of the snapshots, and part of the overlays' names; no other save has it.
        out: final name of the image.
        disks: all of them.
    """

    kind: Literal["internal", "external"]
    name: str
    out: str
    disks: list[KeptDisk]


def undo(monitor: Monitor, keeping: Keeping) -> None:
    """Take back what was kept, as far as there is anything; the guest may run meanwhile.

    Raises:
        PeerError: QEMU refuses, or is gone; the rest is as it was.
        StorageError: an overlay that is not used any more cannot be removed.
    """
    nodes = {str(n["node-name"]): n for n in monitor.execute("query-named-block-nodes", flat=True)}
    for disk in keeping.disks:
        if keeping.kind == "external":
            _merge_back(monitor, nodes, disk)
        elif keeping.name in _snapshots(nodes, disk):
            monitor.execute(
                "blockdev-snapshot-delete-internal-sync", device=disk.node, name=keeping.name
            )


def settle(monitor: Monitor, note: str) -> str | None:
    """Deal with the disks of a save that was killed, by its note: its image may have its name.

    Returns:
        What was done, in one line; None: there was nothing.

    Raises:
        PeerError: as for `undo`.
        StorageError: likewise.
    """
    keeping = _read(note)
    if keeping is None:
        return None
    if _is_published(keeping):
        return f"what a killed save kept of the disks stays: {keeping.out} has its name"
    if not _was_begun(monitor, keeping):
        return None
    undo(monitor, keeping)
    files = ", ".join(disk.file for disk in keeping.disks)
    what = "internal snapshots" if keeping.kind == "internal" else "overlays"
    return f"the {what} {keeping.name} that a killed save had made were taken back: {files}"


def _read(note: str) -> Keeping | None:
    """What a note says; None is another version's, or none that we would have written."""
    try:
        keeping = msgspec.json.decode(note.removeprefix(NOTE).encode(), type=Keeping)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    # It comes from QEMU, and files are removed by it: none but those that are named as ours.
    if _NAME.fullmatch(keeping.name) is None:
        return None
    for number, disk in enumerate(keeping.disks):
        if (keeping.kind == "external") != (disk.overlay is not None):
            return None
        if disk.overlay and not disk.overlay.endswith(overlay_ending(keeping.name, number)):
            return None
    return keeping


def overlay_ending(name: str, number: int) -> str:
    """How the name of an overlay's file ends."""
    return f"{name}-{number}.qcow2"


def _was_begun(monitor: Monitor, keeping: Keeping) -> bool:
    """Whether there is anything to undo."""
    nodes = {str(n["node-name"]): n for n in monitor.execute("query-named-block-nodes", flat=True)}
    return any(
        os.path.lexists(disk.overlay) if disk.overlay else keeping.name in _snapshots(nodes, disk)
        for disk in keeping.disks
    )


def _snapshots(nodes: Mapping[str, Any], disk: KeptDisk) -> list[str]:
    """Names of a disk's internal snapshots."""
    image = nodes.get(disk.node, {}).get("image", {})
    return [str(each["name"]) for each in image.get("snapshots", [])]


def _merge_back(monitor: Monitor, nodes: Mapping[str, Any], disk: KeptDisk) -> None:
    """Write what the guest wrote to an overlay to its disk's own file, and remove the overlay."""
    assert disk.overlay is not None
    assert disk.overlay_node is not None
    job = disk.overlay_node
    if job in nodes or has_job(monitor, job):
        run_job(
            monitor,
            job,
            "block-commit",
            **{"device": disk.overlay_node, "base-node": disk.node, "auto-dismiss": False},
        )
    elif not _is_unused(disk.overlay):
        return
    try:
        Path(disk.overlay).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError("cannot remove", errno=error.errno, path=disk.overlay) from None


def _is_unused(path: str) -> bool:
    """Whether an overlay that QEMU does not have open never held anything of a guest's."""
    try:
        with closing(open_for_reading(path)) as file:
            return file.size == 0 or look_at_qcow2(file).is_empty
    except (StorageError, BytesError):
        return False


def _is_published(keeping: Keeping) -> bool:
    """Whether the image that the disks were kept for has its name: its manifest says so."""
    beside = sidecar_path(keeping.out)
    if _is_named(beside, keeping.name):
        return True
    # Killed between the two names of a publication, which the next writer of them completes.
    halfway = not os.path.lexists(keeping.out + PARTIAL)
    return halfway and _is_named(Path(f"{beside}{PARTIAL}"), keeping.name)


def _is_named(sidecar: Path, name: str) -> bool:
    """Whether a manifest says that disks are kept under this name."""
    try:
        text = load_sidecar(sidecar)
        guest = None if text is None else _guest(text)
    except (BytesError, StorageError):
        return False
    if not guest or guest.disks is msgspec.UNSET:
        return False
    return any(name in (one.snapshot or one.overlay or "") for one in guest.disks)


def _guest(text: bytes) -> GuestFacts | None:
    """The machine of a manifest, whichever kind of image has it."""
    try:
        return manifest.decode(text).guest or None
    except BytesError:
        return manifest.decode_cold(text).guest or None
