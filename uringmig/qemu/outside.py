"""Save a VM from outside: no migration runs, and no setting of QEMU's changes.

The guest is stopped; the state of its devices is taken (`moment`); its memory is mapped or read in
its process; then it goes on, and the image is finished and published afterwards. In a live save
everything is written before that, while the guest runs, and it stands still only for what has
changed since.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from uringmig.errors import BusyError, HostError, PeerError
from uringmig.image.guestfacts import GuestFacts
from uringmig.options import WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.diskway import NO_DISKS, DisksWay
from uringmig.qemu.guardian import LIVE, Standstill, standing_still
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.guestmemory import GuestMemory, guest_memory
from uringmig.qemu.moment import (
    RAM_CHANGED,
    RAM_SECTION_ID,
    Moment,
    configuration_of,
    refuse_what_is_more,
)
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.vmsave import DONE_BUT, Then, VmSave, check_state, state_to_save
from uringmig.result import SaveResult
from uringmig.writer import MappedRamWriter, RamBlock

#: After a pass that took longer than this, a guest that runs is likely to have changed much.
_LONG_SECONDS: Final = 2.0
_PACED: Final = "written while the guest ran, as with --live: --rate is not to hold it up"
_STOPPED: Final = "the guest did not run any more when it was to be stopped: it is left so"


def save_outside(
    monitor: Monitor,
    out: str | os.PathLike[str],
    *,
    live: bool = False,
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    then: Then | None = None,
    disks: DisksWay = NO_DISKS,
    progress: ProgressCallback | None = None,
) -> VmSave:
    """Save a VM on this host, whatever its RAM, to one mapped-ram image.

    Args:
        monitor: of the VM.
        out: the image's final name.
        live: write everything once while the guest runs; it stands still only for what it changed
            since. So is a running guest saved with a rate; and none that does not run.
        options: how to write; no rate is kept while a guest stands still for us.
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
        before, healed = state_to_save(monitor)
        paced = before in LIVE and options.rate > 0 and not live
        live = before in LIVE and (live or paced)
        refuse_what_is_more(monitor)
        memory = stack.enter_context(guest_memory(monitor))
        disk_moment.prepare()
        # What cannot be written at all shows before the guest is stopped.
        blocks = [RamBlock(b.idstr, memory.memory_of(b.idstr)) for b in memory.blocks]
        writer = MappedRamWriter(
            out, blocks, options=options, configuration=configuration_of(monitor),
            section_id=RAM_SECTION_ID, live=live, progress=progress,
        )  # fmt: skip
        stack.enter_context(writer)
        save = _Save(monitor, memory, disk_moment, still, writer, live=live)
        if live:
            save.write_in_motion()
        image = save.write(facts=options.manifest, go_on=then in (None, "cont"))
        if then in ("leave", "quit"):
            still.keep()
    save.amiss += _afterwards(monitor, then, running=before in LIVE)
    state_after = None if then == "quit" and not save.amiss else _state_after(monitor)
    told = [*([_PACED] if paced else []), *save.notes(goes_on=state_after in LIVE)]
    return VmSave(
        image=replace(image, notes=(*image.notes, *told)),
        how="outside",
        passes=save.passes,
        blocks_mapped=tuple(memory.mapped),
        blocks_copied=tuple(memory.copied),
        stopped_seconds=save.stopped_seconds,
        state_before=before if live else still.found,
        state_after=state_after,
        disks=tuple(disk_moment.disks),
        notes=(*image.notes, *told, *healed, *save.amiss),
    )


@dataclass
class _Save:
    """A guest on its way into an image.

    Attributes:
        passes: how often its memory is gone over.
        amiss: what went wrong although the image is whole, one line each.
        stopped_seconds: how long the guest stood still for it; 0.0 if it did not run.
    """

    monitor: Monitor
    memory: GuestMemory
    disks: DiskMoment
    still: Standstill
    writer: MappedRamWriter
    live: bool = field(kw_only=True)
    passes: int = field(default=1, init=False)
    amiss: list[str] = field(default_factory=list, init=False)
    stopped_seconds: float = field(default=0.0, init=False)

    def write_in_motion(self) -> None:
        """The first pass of a live save, or the first few: all is written while the guest runs."""
        self.still.announce()
        try:
            self._write_while_it_pays()
        except (HostError, PeerError):
            if not self.memory.is_still(self.monitor.ram_blocks()):  # some of it was unplugged
                raise BusyError(RAM_CHANGED) from None
            raise
        # What was looked at before may be other than it was.
        check_state(self.monitor)
        refuse_what_is_more(self.monitor)
        self.disks.look_again()

    def _write_while_it_pays(self) -> None:
        """Write everything; and, after a pass that took long, what has changed since.

        Better now than when the guest stands still; as long as there is less to do each time.
        """
        written, left = 0, math.inf
        for first in itertools.chain([True], itertools.repeat(False)):
            began = time.monotonic()
            if first:
                self.writer.write_all()
            else:
                self.writer.write_changed(moving=True)
            self.passes += 1
            written, before = self.writer.written_bytes, written
            if time.monotonic() - began <= _LONG_SECONDS or written - before > left / 2:
                return
            left = written - before

    def write(self, *, facts: bool, go_on: bool) -> SaveResult:
        """Write all that belongs to one moment, have the guest go on, and make the image durable.

        With ``facts`` the manifest gets those of the machine, too.
        """
        guest: GuestFacts | None = None
        notes: tuple[str, ...] = ()
        with self._stopped() as moment:
            writer = self.writer
            for _ in writer.iter_write_changed() if self.live else writer.iter_write_all():
                if facts and guest is None:  # while the channels write
                    guest, notes = describe_guest(self.monitor)
            self.disks.take()
            moment.check()
        if go_on:
            try:
                self.still.go_on()
            except PeerError as error:
                self.amiss.append(f"{DONE_BUT} {error}")
        if self.still.live:
            self.stopped_seconds = time.monotonic() - self.still.stopped_at
        image = self.writer.finish(
            moment.state, guest=self.disks.describe(guest), stopped_seconds=self.stopped_seconds
        )
        self.disks.keep()
        told = replace(image.time, receive=moment.received_seconds)
        return replace(image, time=told, notes=(*image.notes, *notes))

    @contextmanager
    def _stopped(self) -> Iterator[Moment]:
        """Stop the guest; it goes on if the block fails, before what was written is taken back."""
        try:
            self.still.stop()
            yield Moment(self.monitor, self.memory, self.still)
        except BaseException as error:
            self.still.go_on_after(error)
            raise

    def notes(self, *, goes_on: bool) -> tuple[str, ...]:
        """What the operator should know of the guest, one line each."""
        stopped = (_STOPPED,) if self.live and not self.still.live else ()
        return (*stopped, *self.disks.notes(goes_on=goes_on))


def _afterwards(monitor: Monitor, then: Then | None, *, running: bool) -> list[str]:
    """Do what was asked for, now that the image is durable; ``running``: the guest did, before."""
    try:
        if then == "cont" and not running:
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
