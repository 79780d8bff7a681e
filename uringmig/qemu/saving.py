"""Save a VM, whatever its RAM: from outside, or else by a migration that leaves its RAM out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import Final, Literal

from uringmig.errors import HostError, PeerError, StateError, UringmigError
from uringmig.options import WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.diskway import DisksWay
from uringmig.qemu.guardian import LIVE
from uringmig.qemu.guestmemory import why_unreadable
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.vmsave import Then, VmSave

#: ``auto`` takes the way from outside, and the other where QEMU's process cannot be read.
How = Literal["auto", "outside", "migrate"]
_UNPACED: Final = (
    "--rate was not kept: the guest stands still until a migration (--how migrate) ends"
)


def save_vm(
    qmp: str | os.PathLike[str] | Monitor,
    out: str | os.PathLike[str],
    *,
    how: How = "auto",
    live: bool = False,
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
        live: write everything once while the guest runs; it stands still only for what changed
            since. From ``outside`` only; so is a running guest saved with a rate.
        then: let the guest ``cont``, ``quit`` QEMU, or ``leave`` it stopped; None: as it was found.
        disks: what becomes of the guest's disks as they are at the image's moment: ``none``, they
            are not kept; ``internal``, a snapshot in each qcow2 file; ``external=DIR``, they stay
            as they are, and the guest goes on in overlays that are made in this folder. By
            ``migrate`` they cannot be kept.
        options: how to write.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        StateError: ``disks`` is something else, or kept without a manifest to say so; or a live
            save by a migration.
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
        if live and (how == "migrate" or reason is not None):
            raise _no_live_migration(reason)
        if how == "migrate" or reason is not None:
            if way.kind != "none":
                raise reason or PeerError("disks are kept only by a save from outside")
            return _by_migration(monitor, out, then, options, progress, reason)
        return save_outside(
            monitor, out, live=live, options=options, then=then, disks=way, progress=progress
        )


def _no_live_migration(reason: HostError | PeerError | None) -> UringmigError:
    """A guest that was to run on is not held for all of a save without a word."""
    if reason is None:
        return StateError("a live save (--live) reads memory from outside, not by a migration")
    return type(reason)(f"{reason}; and a live save (--live) is not made by a migration")


def _by_migration(
    monitor: Monitor,
    out: str | os.PathLike[str],
    then: Then | None,
    options: WriteOptions,
    progress: ProgressCallback | None,
    reason: HostError | PeerError | None,
) -> VmSave:
    """Save by the other way, and say why, and that disks are not kept."""
    # Seldom wanted, and it brings in all that reads a migration's stream.
    from uringmig.qemu.sharedram import save_shared

    disks = DiskMoment(monitor)
    disks.prepare()
    told = []
    if options.rate and monitor.run_state() in LIVE:
        told.append(_UNPACED)
        options = replace(options, rate=0)
    try:
        saved = save_shared(monitor, out, options=options, then=then, progress=progress)
    except PeerError as error:
        if reason is None or error.may_pass:
            raise
        raise type(reason)(f"{reason}; and not by a migration: {error}") from None
    if reason is not None:
        told.append(f"saved by a migration that leaves shared RAM out (--how migrate): {reason}")
    told += disks.notes(goes_on=saved.state_after in LIVE)
    image = replace(saved.image, notes=(*saved.image.notes, *told))
    return replace(saved, image=image, disks=tuple(disks.disks), notes=(*told, *saved.notes))
