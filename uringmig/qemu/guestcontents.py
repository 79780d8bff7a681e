"""A VM's memory and state, for whoever archives it; nothing is written here.

From outside, as `qemu.outside` saves a VM: its memory is mapped or read in QEMU's process, whatever
kind it is, and nothing of QEMU's is changed. Where we may not do that, QEMU holds the guest by a
migration (`qemu.heldguest`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from uringmig import signals
from uringmig.errors import BusyError, HostError, PeerError, StorageError
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.guardian import standing_still
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.guestmemory import GuestMemory, guest_memory, why_unreadable
from uringmig.qemu.heldguest import held_guest
from uringmig.qemu.moment import RAM_CHANGED, Moment, refuse_what_is_more
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.vmcontents import VmContents
from uringmig.qemu.vmsave import state_to_save

#: Another save's standstill is over within moments; one that takes longer is waited for by retries.
_PATIENCE_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.05


class GuestContents(VmContents):
    """A VM read from outside.

    Args:
        monitor: of the VM.
        memory: of the VM.
        notes: what the operator should know.
        disks: of its guest, looked at.
    """

    def __init__(
        self, monitor: Monitor, memory: GuestMemory, notes: Sequence[str], disks: DiskMoment
    ) -> None:
        memories = [memory.memory_of(block.idstr) for block in memory.blocks]
        super().__init__(monitor, memory.blocks, memories, notes, disks)
        self._memory = memory

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """See `LiveContents`; a guest that was found stopped stays as it is.

        Raises:
            BusyError: another save of this guest is under way, or its RAM has changed.
            PeerError: QEMU refuses, went away, or another client let the guest go on; a disk cannot
                be kept any more.
            HostError: this host cannot start the guardian of a guest that is stopped.
            FormatError: QEMU's device state is not as expected.
        """
        healed = self._wait_until_free()
        # Asked for the state of a device that has come since, and cannot be saved, QEMU dies.
        refuse_what_is_more(self._monitor)
        self._disks.prepare()
        with standing_still(self._monitor) as still:
            still.stop()
            moment = Moment(self._monitor, self._memory, still)
            yield
            self._disks.take()
            facts, notes = describe_guest(self._monitor)
            moment.check()
            self._state = moment.state
            self.notes += (*healed, *notes)
            try:
                still.go_on()
            except PeerError as error:
                self.warnings.append(f"the guest was not let go on: {error}")
            if still.live:
                self.stopped_seconds = time.monotonic() - still.stopped_at
        self._facts = self._disks.describe(facts)

    def _wait_until_free(self) -> tuple[str, ...]:
        """Wait for another save, begun since this was opened: it may have stopped the guest.

        Returns:
            What the operator should know.

        Raises:
            BusyError: it takes too long.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return state_to_save(self._monitor)[1]
            except BusyError:
                if time.monotonic() > deadline:
                    raise
            signals.look()
            time.sleep(_PAUSE_SECONDS)


@contextmanager
def open_guest(
    monitor: Monitor, *, disks: DiskMoment | None = None, notes: Sequence[str] = ()
) -> Iterator[VmContents]:
    """Open a VM of this host for being archived; nothing of it is changed before it has to be.

    Args:
        monitor: of the VM.
        disks: of its guest, for whoever decides whether they stay kept; None: they are not kept.
        notes: what the operator should know of it already.

    Raises:
        PeerError: the VM has something that cannot be saved, or its memory cannot be reached; or
            a disk cannot be kept.
        HostError: no right to read QEMU's process.
    """
    disks = disks or DiskMoment(monitor)
    reason = why_unreadable(monitor)
    if reason is not None:
        if disks.way.kind != "none":
            raise reason
        disks.look()
        with held_guest(monitor, disks, why=reason, notes=notes) as held:
            yield held
        return
    refuse_what_is_more(monitor)
    disks.look()
    with guest_memory(monitor) as memory:
        try:
            yield GuestContents(monitor, memory, notes, disks)
        except (HostError, PeerError, StorageError):
            if _has_changed(monitor, memory):  # some of it was unplugged, perhaps
                raise BusyError(RAM_CHANGED) from None
            raise


def _has_changed(monitor: Monitor, memory: GuestMemory) -> bool:
    """Whether QEMU has other memory than was opened, if that can still be found out."""
    try:
        return not memory.is_still(monitor.ram_blocks())
    except (HostError, PeerError):
        return False
