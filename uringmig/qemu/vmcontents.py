"""What a VM's contents have in common, whichever way its memory is reached."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, Self

from uringmig.contents.live import Memory, MemoryReader
from uringmig.contents.source import ContentsBlock, Row, WindowRead, window_of
from uringmig.errors import StateError
from uringmig.format.device_state import DeviceState
from uringmig.image.guestfacts import GuestFacts
from uringmig.options import WINDOW_BYTES
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.guardian import LIVE
from uringmig.qemu.moment import RAM_SECTION_ID, configuration_of
from uringmig.qemu.monitor import HostBlock, Monitor
from uringmig.storage.buffers import aligned_buffer


class VmContents:
    """A VM's memory and state, see `contents.live.LiveContents`; its memory is its opener's.

    Args:
        monitor: of the VM.
        blocks: of its RAM.
        memories: of each of them.
        notes: what the operator should know.
        disks: of its guest, looked at.

    Attributes:
        stopped_seconds: how long its guest stood still for it; 0.0 if it did not run before.
        warnings: what went amiss with the guest although all of it was read.
    """

    kind: Final = "memory"
    section_id: Final = RAM_SECTION_ID

    def __init__(
        self,
        monitor: Monitor,
        blocks: Sequence[HostBlock],
        memories: Sequence[Memory],
        notes: Sequence[str],
        disks: DiskMoment,
    ) -> None:
        self.path = monitor.path
        self.configuration = configuration_of(monitor)
        self.blocks = tuple(ContentsBlock(block.idstr, block.used_length) for block in blocks)
        self.memories = tuple(memories)
        self.notes = tuple(notes)
        self.warnings: list[str] = []
        self.stopped_seconds = 0.0
        self._monitor = monitor
        self._disks = disks
        self._state: DeviceState | None = None
        self._facts: GuestFacts | None = None
        # Memory may change at any time, so no two openings are known to be the same.
        self._fingerprint = f"{self.kind} {os.urandom(16).hex()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def runs(self) -> bool:
        """See `LiveContents`."""
        return self._monitor.run_state() in LIVE

    @abstractmethod
    def standstill(self) -> AbstractContextManager[None]:
        """See `LiveContents`."""

    def device_state(self) -> DeviceState:
        """See `Contents`; known after `standstill`."""
        if self._state is None:
            raise StateError("a guest's device state is that of the moment when it stands still")
        return self._state

    def guest(self) -> GuestFacts | None:
        """See `Contents`; known after `standstill`."""
        return self._facts

    def stored_bytes(self) -> int:
        """Bytes that are there, and not known to be zero."""
        return sum(memory.data_bytes() for memory in self.memories)

    def fingerprint(self) -> str:
        """Text of this opening alone: nothing is ever resumed from memory."""
        return self._fingerprint

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """See `Contents`; of one moment only within `standstill`."""
        reader, buffer = MemoryReader(self.memories), aligned_buffer(WINDOW_BYTES)
        for row in rows:
            yield reader.read(window_of(self.blocks, row), buffer)

    def close(self) -> None:
        """Nothing: the memory is closed by whoever opened it."""
