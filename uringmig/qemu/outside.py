"""Save a VM from outside: no migration runs, and no setting of QEMU's changes.

The guest is stopped; the state of its devices is taken (`moment`); its memory is mapped or read in
its process; then it goes on, and the image is finished and published afterwards.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import replace

from uringmig.errors import PeerError
from uringmig.image.guestfacts import GuestFacts
from uringmig.options import WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.diskway import NO_DISKS, DisksWay
from uringmig.qemu.guardian import LIVE, Standstill, standing_still
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.guestmemory import GuestMemory, guest_memory
from uringmig.qemu.moment import (
    RAM_SECTION_ID,
    Moment,
    configuration_of,
    refuse_what_is_more,
)
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.vmsave import DONE_BUT, Then, VmSave, state_to_save
from uringmig.result import SaveResult
from uringmig.writer import MappedRamWriter, RamBlock


def save_outside(
    monitor: Monitor,
    out: str | os.PathLike[str],
    *,
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    then: Then | None = None,
    disks: DisksWay = NO_DISKS,
    progress: ProgressCallback | None = None,
) -> VmSave:
    """Save a VM on this host, whatever its RAM, to one mapped-ram image.

    Args:
        monitor: of the VM.
        out: the image's final name.
        options: how to write.
        then: let the guest ``cont``, ``quit`` QEMU, or ``leave`` it stopped; None: as it was found.
        disks: how the guest's disks are kept at the image's moment.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        PeerError: the VM has something that cannot be saved this way, or QEMU failed; the guest is
            as it was.
        HostError: no right to read QEMU's process, or io_uring is required and cannot be had.
        FormatError: QEMU's device state is not as expected; the guest is as it was.
        StorageError: the image cannot be written; the guest is as it was.
    """
    with ExitStack() as stack:
        # It ends last: what was done to the disks is taken back while the guest goes on already.
        disk_moment = stack.enter_context(DiskMoment(monitor, disks, out))
        # First of all: its process comes up while the guest is looked at.
        still = stack.enter_context(standing_still(monitor))
        _, healed = state_to_save(monitor)
        refuse_what_is_more(monitor)
        memory = stack.enter_context(guest_memory(monitor))
        disk_moment.prepare()
        # What cannot be written at all shows before the guest is stopped.
        writer = stack.enter_context(
            MappedRamWriter(
                out,
                [RamBlock(b.idstr, memory.memory_of(b.idstr)) for b in memory.blocks],
                options=options,
                configuration=configuration_of(monitor),
                section_id=RAM_SECTION_ID,
                progress=progress,
            )
        )
        still.stop()
        image, notes, stopped = _write(
            monitor, memory, writer, still, disk_moment, then, facts=options.manifest
        )
        if then in ("leave", "quit"):
            still.keep()
    notes += _go_on(monitor, then, still)
    state_after = None if then == "quit" and not notes else _state_after(monitor)
    told = disk_moment.notes(goes_on=state_after in LIVE)
    return VmSave(
        image=replace(image, notes=(*image.notes, *told)),
        how="outside",
        blocks_mapped=tuple(memory.mapped),
        blocks_copied=tuple(memory.copied),
        stopped_seconds=stopped if still.live else 0.0,
        state_before=still.found,
        state_after=state_after,
        disks=tuple(disk_moment.disks),
        notes=(*image.notes, *told, *healed, *notes),
    )


def _write(
    monitor: Monitor,
    memory: GuestMemory,
    writer: MappedRamWriter,
    still: Standstill,
    disk_moment: DiskMoment,
    then: Then | None,
    *,
    facts: bool,
) -> tuple[SaveResult, list[str], float]:
    """Write the image of a guest that stands still, and let it go on as soon as its memory is.

    With ``facts`` the manifest gets those of the machine, too.

    Returns:
        The image, what went amiss, and how long the guest stood still, in seconds.
    """
    moment = Moment(monitor, memory, still)
    guest: GuestFacts | None = None
    notes: tuple[str, ...] = ()
    for _ in writer.iter_write_all():
        if facts and guest is None:  # while the channels write
            guest, notes = describe_guest(monitor)
    if facts and guest is None:  # they were done at once
        guest, notes = describe_guest(monitor)
    disk_moment.take()
    moment.check()
    amiss = []
    if then in (None, "cont"):
        try:
            still.go_on()
        except PeerError as error:
            amiss.append(f"{DONE_BUT} {error}")
    stopped = time.monotonic() - still.stopped_at
    image = writer.finish(moment.state, guest=disk_moment.describe(guest))
    disk_moment.keep()
    told = replace(image.time, receive=moment.received_seconds)
    return replace(image, time=told, notes=(*image.notes, *notes)), amiss, stopped


def _go_on(monitor: Monitor, then: Then | None, still: Standstill) -> list[str]:
    """Do what was asked for, now that the image is durable."""
    try:
        if then == "cont" and not still.live:
            monitor.execute("cont")
        elif then == "quit":
            monitor.execute("quit")
    except PeerError as error:
        return [f"{DONE_BUT} {error}"]
    return []


def _state_after(monitor: Monitor) -> str | None:
    """QEMU's run state, or None if there is no QEMU any more."""
    try:
        return monitor.run_state()
    except PeerError:
        return None
