"""A VM whose process we may not read, for whoever archives it: QEMU holds its guest by a migration.

Only for what `qemu.guestcontents` cannot read from outside: no right to read QEMU's process, or a
QEMU before 8.0, which does not tell where its memory is. Its RAM has to be shared files that we may
open. They are read while the guest runs; for the second look QEMU migrates to us, with its shared
memory left out, as for a save of `qemu.sharedram`, and takes its guest back afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.devicestream import DeviceStream, check_sent
from uringmig.contents.live import Memory
from uringmig.errors import BusyError, HostError, PeerError
from uringmig.format.device_state import DeviceState
from uringmig.memory.source import Extents, MemorySource, check_range
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.guardian import LIVE
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.moment import RAM_CHANGED
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.receiving import receive
from uringmig.qemu.sharedram import (
    check_listed,
    check_still_ours,
    let_go,
    mapped_memories,
    migrating,
)
from uringmig.qemu.vmcontents import VmContents
from uringmig.qemu.vmsave import state_to_save


class _SentMemory:
    """A block that is no shared file: a hole until QEMU has sent it; see `CopiedMemory`."""

    def __init__(self, length_bytes: int) -> None:
        self.length_bytes = length_bytes
        self.sent: NDArray[np.uint8] | None = None

    def data_extents(self, *, start: int, length: int) -> Extents:
        """All of it, once it is there."""
        check_range(start=start, length=length, length_bytes=self.length_bytes)
        return Extents.from_pairs([] if self.sent is None else [(start, start + length)])

    def data_bytes(self) -> int:
        """All of it: it will come."""
        return self.length_bytes

    def next_data(self, start: int) -> int:
        """All or nothing."""
        return self.length_bytes if self.sent is None else start

    def forget_holes(self) -> None:
        """Nothing is remembered."""

    def read(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        """See `CopiedMemory`."""
        pairs = zip(extents.start.tolist(), extents.length.tolist(), strict=True)
        for first, length in pairs:
            assert self.sent is not None, "a hole has no extents"
            into[first - start : first - start + length] = self.sent[first : first + length]


class HeldContents(VmContents):
    """A VM whose shared memory is mapped here.

    Args:
        monitor: of the VM.
        shared: its blocks that are mapped, by idstr.
        notes: what the operator should know.
        disks: of its guest, looked at.

    Raises:
        PeerError: QEMU would have to send more than is taken.
    """

    def __init__(
        self,
        monitor: Monitor,
        shared: Mapping[str, MemorySource],
        notes: Sequence[str],
        disks: DiskMoment,
    ) -> None:
        blocks = monitor.ram_blocks()
        sizes = {each.idstr: each.used_length for each in blocks if each.idstr not in shared}
        check_sent(sizes, PeerError)
        self._shared = dict(shared)
        self._sent = {idstr: _SentMemory(size) for idstr, size in sizes.items()}
        by_name: dict[str, Memory] = {**self._shared, **self._sent}
        super().__init__(monitor, blocks, [by_name[each.idstr] for each in blocks], notes, disks)

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """See `LiveContents`; QEMU holds the guest, and takes it back however the block ends.

        Raises:
            BusyError: QEMU is migrating, or its RAM has changed.
            PeerError: QEMU refuses, or let the guest run on meanwhile; its stream broke off.
            FormatError: the stream breaks a rule.
        """
        monitor = self._monitor
        before, healed = state_to_save(monitor)
        sizes = {idstr: memory.length_bytes for idstr, memory in self._shared.items()}
        with monitor.saved_settings(), migrating(monitor) as connection:
            stream = receive(
                connection, sizes, on_setup=lambda stream: check_listed(stream, self._shared)
            )
            self._take(stream)
            yield
            self._facts, notes = describe_guest(monitor)
            check_still_ours(monitor)
            self.notes += (*healed, *notes)
            try:
                self.warnings += let_go(monitor, connection, keep=True)
            except PeerError as error:
                self.warnings.append(f"QEMU did not take its guest back: {error}")
            if before in LIVE and stream.stopped_at is not None:
                self.stopped_seconds = time.monotonic() - stream.stopped_at

    def _take(self, stream: DeviceStream) -> None:
        """Keep what the stream brought.

        Raises:
            BusyError: these are not the blocks that were found before.
        """
        if stream.blocks != [(block.idstr, block.used_length) for block in self.blocks]:
            raise BusyError(RAM_CHANGED)
        for idstr, block in stream.private.items():
            self._sent[idstr].sent = block.memory
        self._state = DeviceState.compose(
            self.section_id, stream.early, stream.full, stream.vmdescription
        )


@contextmanager
def held_guest(
    monitor: Monitor, disks: DiskMoment, *, why: HostError | PeerError, notes: Sequence[str] = ()
) -> Iterator[HeldContents]:
    """Open a VM's shared memory by the paths that QEMU names.

    Args:
        monitor: of the VM.
        disks: of its guest, looked at; they are not kept.
        why: its process is not read; told in a note.
        notes: what else the operator should know.

    Raises:
        PeerError: its RAM is no shared file that we may open; says ``why``, too.
        HostError: likewise.
    """
    unproved: list[str] = []
    with ExitStack() as stack:
        try:
            memories = stack.enter_context(mapped_memories(monitor, unproved))
            note = f"archived by a migration that leaves shared RAM out: {why}"
            held = HeldContents(monitor, memories, [*notes, note, *unproved], disks)
        except PeerError as error:
            if error.may_pass:
                raise
            raise type(why)(f"{why}; and not by a migration: {error}") from None
        yield held
