"""What the plain migration stream of a QEMU with x-ignore-shared says: small and whole.

It holds the device state and the pages of private blocks (video RAM, ROMs); the shared blocks are
only listed. QEMU sends every page of a private block at least once. If a page never
came, QEMU took the block for a shared one, which is saved elsewhere, and its memory would be lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import FormatError, MismatchError, UringmigError
from uringmig.format.constants import QEMU_VM_SECTION_END, QEMU_VM_SECTION_START
from uringmig.format.device_state import DeviceState
from uringmig.format.events import (
    ConfigurationRead,
    DescriptionRead,
    Event,
    FullSection,
    RamBlockRead,
    RamPage,
    RamSectionEnded,
    RamStarted,
    RamZero,
)
from uringmig.format.headers import Configuration
from uringmig.format.mainstream import MainStreamReader
from uringmig.image.parse import read_description
from uringmig.options import PAGE_SIZE
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.mainfile import MainFile
from uringmig.units import MiB

#: Private blocks held in memory here, in all: video RAM is 16 MiB, a qxl card's 128 MiB.
PRIVATE_BYTES_MAX: Final = 256 * MiB
_READ_BYTES: Final = 256 * 1024


@dataclass(slots=True)
class PrivateBlock:
    """A block that is sent: its memory so far, and which pages have come at least once."""

    memory: NDArray[np.uint8]
    seen: NDArray[np.bool_]


@dataclass(slots=True)
class DeviceStream:
    """What the stream said.

    Attributes:
        blocks: (idstr, used_length in bytes) in the order of the stream.
        private: the blocks that came by the stream.
        stopped_at: when the first sign came that the guest stands still, `time.monotonic`.
    """

    configuration: Configuration = field(init=False)
    section_id: int = field(init=False)
    blocks: list[tuple[str, int]] = field(default_factory=list)
    private: dict[str, PrivateBlock] = field(default_factory=dict)
    early: list[bytes] = field(default_factory=list)
    full: list[bytes] = field(default_factory=list)
    vmdescription: bytes = b""
    stopped_at: float | None = None

    def device_state(self) -> DeviceState:
        """The device sections, as a mapped-ram file has them."""
        return DeviceState.compose(self.section_id, self.early, self.full, self.vmdescription)


def read_device_state(file: MainFile, shared: Mapping[str, int | None]) -> DeviceStream:
    """Read a stream that a QEMU with x-ignore-shared wrote to a file.

    Args:
        file: the stream, from its first byte to its last.
        shared: idstr of the blocks that are not in it, and their size in bytes if it is known.

    Raises:
        FormatError: the file breaks a rule of the format, or was not saved with x-ignore-shared.
        MismatchError: it does not go with the shared blocks.
        StorageError: it cannot be read.
    """
    collector = StreamCollector(shared, MismatchError, lambda _: None)
    reader = MainStreamReader(file_size=file.size)
    reader.set_description(read_description(file))
    while not reader.finished:
        data = file.read_at(reader.offset, _READ_BYTES)
        if data:
            reader.feed(data)
        else:
            reader.end_of_input()
        for event in reader.events():
            collector.take(event)
            if isinstance(event, ConfigurationRead) and not event.configuration.ignore_shared:
                raise FormatError(
                    f"{file.path}: device state saved without x-ignore-shared", offset=event.offset
                )
    return collector.whole()


def check_sent(sizes: Mapping[str, int], refuse: Callable[[str], UringmigError]) -> None:
    """Refuse blocks that are too large to be held here when they come by the stream.

    Args:
        sizes: bytes of each of them, by idstr.
        refuse: makes the error.
    """
    if sum(sizes.values()) > PRIVATE_BYTES_MAX:
        # Not the one that was one too many: that is a ROM, as often as not.
        largest = max(sizes, key=sizes.__getitem__)
        raise refuse(
            f"ramblock {largest!r} ({sizes[largest] >> 20} MiB) is not shared memory "
            f"(memory-backend-file,share=on); of such blocks no more than "
            f"{PRIVATE_BYTES_MAX >> 20} MiB come with the device state"
        )


class StreamCollector:
    """Makes a `DeviceStream` of events; ``refuse`` makes the error for what does not go together.

    A size of None in ``shared`` is whatever the stream says.
    """

    def __init__(
        self,
        shared: Mapping[str, int | None],
        refuse: Callable[[str], UringmigError],
        on_setup: Callable[[DeviceStream], None],
    ) -> None:
        self._shared = shared
        self._refuse = refuse
        self._on_setup = on_setup
        self._stream = DeviceStream()

    def take(self, event: Event) -> None:
        """Keep what one event brings."""
        stream = self._stream
        match event:
            case ConfigurationRead(configuration=configuration):
                stream.configuration = configuration
            case RamStarted(section_id=section_id):
                stream.section_id = section_id
            case RamBlockRead():
                self._add_block(event)
            case RamPage() | RamZero():
                self._store(event)
            case RamSectionEnded(section_type=section_type):
                if section_type == QEMU_VM_SECTION_START:
                    self._on_setup(stream)
                elif section_type == QEMU_VM_SECTION_END:
                    stream.stopped_at = time.monotonic()
            case FullSection(raw=raw):
                # Before the end of RAM come the devices with early set-up, virtio-mem for one.
                (stream.early if stream.stopped_at is None else stream.full).append(raw)
            case DescriptionRead(description=description):
                stream.vmdescription = description.raw

    def whole(self) -> DeviceStream:
        """The stream, unless a page of a private block never came."""
        for idstr, block in self._stream.private.items():
            missing = np.flatnonzero(~block.seen)
            if missing.size:
                raise self._refuse(
                    f"QEMU sent {int(block.seen.sum())} of {len(block.seen)} pages of ramblock "
                    f"{idstr!r}, and it is no shared file known here"
                )
        return self._stream

    def _store(self, event: RamPage | RamZero) -> None:
        """Put a page of a private block where it belongs."""
        block = self._stream.private.get(event.idstr)
        if block is None:
            raise self._refuse(f"QEMU sends pages of {event.idstr!r} though it is shared memory")
        place = slice(event.page_offset, event.page_offset + PAGE_SIZE)
        block.memory[place] = (
            np.frombuffer(event.data, np.uint8) if isinstance(event, RamPage) else 0
        )
        block.seen[event.page_offset // PAGE_SIZE] = True

    def _add_block(self, event: RamBlockRead) -> None:
        """Note one block, and make room for it if it comes by the stream."""
        stream = self._stream
        stream.blocks.append((event.idstr, event.used_length))
        if event.idstr in self._shared:
            size = self._shared[event.idstr]
            if size is not None and size != event.used_length:
                raise self._refuse(
                    f"ramblock {event.idstr!r} has {event.used_length} bytes in the stream, "
                    f"but its backend has {size}"
                )
            return
        sizes = {idstr: len(block.memory) for idstr, block in stream.private.items()}
        check_sent({**sizes, event.idstr: event.used_length}, self._refuse)
        stream.private[event.idstr] = PrivateBlock(
            memory=aligned_buffer(event.used_length),
            seen=np.zeros(event.used_length // PAGE_SIZE, np.bool_),
        )
