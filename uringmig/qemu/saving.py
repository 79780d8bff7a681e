"""Save a VM, whatever its RAM: from outside, or else by a migration that leaves its RAM out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from uringmig.errors import HostError, PeerError, StateError
from uringmig.options import WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.diskway import DisksWay
from uringmig.qemu.guardian import LIVE
from uringmig.qemu.guestmemory import why_unreadable
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.sharedram import save_shared
from uringmig.qemu.vmsave import Then, VmSave

#: ``auto`` takes the way from outside, and the other where QEMU's process cannot be read.
How = Literal["auto", "outside", "migrate"]


def save_vm(
    qmp: str | os.PathLike[str] | Monitor,
    out: str | os.PathLike[str],
    *,
    how: How = "auto",
    then: Then | None = None,
    disks: str = "none",
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
) -> VmSave:
    """Save a running or stopped VM of this host to one mapped-ram image.

    From ``outside`` any VM is saved whose process we may read, and nothing of QEMU's changes. By
    ``migrate`` those whose RAM is memory-backend-file,share=on, with QEMU 7.2 and newer, and
    without a right to read its process; migration settings are changed meanwhile.

    Args:
        qmp: QEMU's QMP socket, or a `Monitor` of it.
        out: the image's final name.
        how: the way to its memory; ``auto`` says in the notes if it had to take ``migrate``.
        then: let the guest ``cont``, ``quit`` QEMU, or ``leave`` it stopped; None: as it was found.
        disks: what becomes of the guest's disks as they are at the image's moment: ``none``, they
            are not kept; ``internal``, a snapshot in each qcow2 file; ``external=DIR``, they stay
            as they are, and the guest goes on in overlays that are made in this folder. By
            ``migrate`` they cannot be kept.
        options: how to write.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        StateError: ``disks`` is something else, or kept without a manifest to say so.
        PeerError: the VM has something that cannot be saved, or QEMU failed; the guest is as it
            was.
        HostError: no right to read QEMU's process, or io_uring is required and cannot be had.
        FormatError: what QEMU says of its devices breaks a rule; the guest is as it was.
        StorageError: the image cannot be written; the guest is as it was.
    """
    way = DisksWay.parse(disks)
    if way.kind != "none" and not options.manifest:
        raise StateError("disks are kept for an image whose manifest says so: it needs one")
    with ExitStack() as stack:
        monitor = qmp if isinstance(qmp, Monitor) else stack.enter_context(Monitor(qmp))
        reason = None
        if how == "auto":
            reason = why_unreadable(monitor)
        if how == "migrate" or reason is not None:
            if way.kind != "none":
                raise reason or PeerError("disks are kept only by a save from outside")
            return _by_migration(monitor, out, then, options, progress, reason)
        return save_outside(monitor, out, options=options, then=then, disks=way, progress=progress)


def _by_migration(
    monitor: Monitor,
    out: str | os.PathLike[str],
    then: Then | None,
    options: WriteOptions,
    progress: ProgressCallback | None,
    reason: HostError | PeerError | None,
) -> VmSave:
    """Save by the other way, and say why, and that disks are not kept."""
    disks = DiskMoment(monitor)
    disks.prepare()
    try:
        saved = save_shared(monitor, out, options=options, then=then, progress=progress)
    except PeerError as error:
        if reason is None or error.may_pass:
            raise
        raise type(reason)(f"{reason}; and not by a migration: {error}") from None
    told = disks.notes(goes_on=saved.state_after in LIVE)
    if reason is not None:
        told = (f"saved by a migration that leaves shared RAM out (--how migrate): {reason}", *told)
    image = replace(saved.image, notes=(*saved.image.notes, *told))
    return replace(saved, image=image, disks=tuple(disks.disks), notes=(*told, *saved.notes))
