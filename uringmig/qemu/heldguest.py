"""A VM whose memory is read while QEMU holds it, for whoever archives it; nothing is written here.

QEMU holds the guest as for a save of `qemu.sharedram`, and takes it back when the block ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uringmig.contents.devicestream import DeviceStream
from uringmig.contents.memoryfiles import MemoryContents
from uringmig.contents.source import Row, WindowRead
from uringmig.memory.source import MemorySource
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.receiving import receive
from uringmig.qemu.sharedram import (
    check_listed,
    check_still_ours,
    let_go,
    mapped_memories,
    migrating,
)
from uringmig.qemu.vmsave import state_to_save


@dataclass(slots=True)
class HeldGuest:
    """A VM whose memory may be read as long as QEMU holds it.

    Attributes:
        contents: its memory, mapped, and its device state.
        stopped_seconds: how long it stood still; known afterwards, 0.0 if it did not run before.
        notes: what the operator should know; known afterwards.
    """

    contents: HeldContents
    stopped_seconds: float = 0.0
    notes: tuple[str, ...] = ()


class HeldContents(MemoryContents):
    """Memory that is only known to be one moment's if QEMU still holds the guest at the end."""

    def __init__(
        self, monitor: Monitor, stream: DeviceStream, memories: dict[str, MemorySource]
    ) -> None:
        facts, notes = describe_guest(monitor)
        super().__init__(monitor.path, stream, memories, notes=notes, facts=facts)
        self._monitor = monitor

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """See `Contents`.

        Raises:
            PeerError: QEMU let the guest run on meanwhile.
        """
        yield from super().windows(rows)
        check_still_ours(self._monitor)


@contextlib.contextmanager
def hold_guest(monitor: Monitor) -> Iterator[HeldGuest]:
    """Have QEMU hold a VM with shared RAM while its memory is read, as `save_shared` does.

    Afterwards the guest is as it was found, running if it ran, whatever happened in between.

    Args:
        monitor: of the VM.

    Raises:
        BusyError: QEMU is migrating.
        PeerError: as for `save_shared`; on leaving, QEMU did not take the guest back in time.
        FormatError: QEMU's stream breaks a rule.
    """
    before, healed = state_to_save(monitor)
    unproved: list[str] = []
    with (
        mapped_memories(monitor, unproved) as memories,
        monitor.saved_settings(),
        migrating(monitor) as connection,
    ):
        sizes = {idstr: memory.length_bytes for idstr, memory in memories.items()}
        stream = receive(connection, sizes, on_setup=lambda stream: check_listed(stream, memories))
        held = HeldGuest(HeldContents(monitor, stream, memories))
        held.contents.notes += (*healed, *unproved)
        yield held
        held.notes = tuple(let_go(monitor, connection, keep=True))
        let_go_at = time.monotonic()
    if before == "running" and stream.stopped_at is not None:
        held.stopped_seconds = let_go_at - stream.stopped_at
