"""Guest memory that lies in this host's memory, as contents: no byte of it is copied to be read.

Files in /dev/shm or on hugetlbfs, with the device state that QEMU saved beside them with
x-ignore-shared (``migrate file:``, or the stream of a socket in a file). The guest stands still
meanwhile: that is the caller's promise, nothing here can see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Self

from uringmig.contents.devicestream import DeviceStream, read_device_state
from uringmig.contents.live import MemoryReader
from uringmig.contents.source import ContentsBlock, Row, WindowRead, window_of
from uringmig.errors import MismatchError, StateError
from uringmig.format.constants import CAPABILITY_MAPPED_RAM
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.image.guestfacts import GuestFacts
from uringmig.memory.array import BufferMemory
from uringmig.memory.mapping import FileMemory
from uringmig.memory.source import MemorySource
from uringmig.options import PAGE_SIZE
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.mainfile import open_for_reading


@dataclass(frozen=True, slots=True)
class MemoryFileBlock:
    """One ramblock that is (part of) a file.

    Attributes:
        idstr: QEMU's name of the block.
        path: the file.
        offset: where the memory begins in it, page aligned.
        length: bytes; None is what the device state says.
    """

    idstr: str
    path: str | os.PathLike[str]
    offset: int = 0
    length: int | None = None


class MemoryContents:
    """Memory at hand, with the device state that goes with it; see `contents.live.LiveContents`.

    Args:
        path: what the operator is told.
        stream: the device state, and the blocks that came with it.
        memories: the other blocks; closed with these contents.
        notes: what the operator should know.
        facts: of the machine, if QEMU was asked for them.
    """

    kind = "memory"
    stopped_seconds = 0.0

    def __init__(
        self,
        path: str,
        stream: DeviceStream,
        memories: Mapping[str, MemorySource],
        *,
        notes: Sequence[str] = (),
        facts: GuestFacts | None = None,
    ) -> None:
        self.path = path
        self._facts = facts
        self.notes = tuple(notes)
        self.blocks = tuple(ContentsBlock(*block) for block in stream.blocks)
        self._stream = stream
        self._closed = False
        self._owned = list(memories.values())
        self._memories = [
            memories.get(block.idstr) or BufferMemory(stream.private[block.idstr].memory)
            for block in self.blocks
        ]
        # What is in memory may change at any time, so no two openings are known to be the same.
        self._fingerprint = f"{self.kind} {os.urandom(16).hex()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def configuration(self) -> Configuration:
        """See `Contents`."""
        return replace(self._stream.configuration, capabilities=(CAPABILITY_MAPPED_RAM,))

    @property
    def section_id(self) -> int:
        """Id of the ram section."""
        return self._stream.section_id

    @property
    def memories(self) -> tuple[MemorySource, ...]:
        """Each block's memory, in their order, for whoever can write from where it lies."""
        return tuple(self._memories)

    def runs(self) -> bool:
        """Never: its guest stands still, or there is none."""
        return False

    def standstill(self) -> AbstractContextManager[None]:
        """See `LiveContents`; it stands still all the time."""
        self._check_open()
        return nullcontext()

    def device_state(self) -> DeviceState:
        """The device sections, as a mapped-ram image has them."""
        return self._stream.device_state()

    def guest(self) -> GuestFacts | None:
        """See `Contents`."""
        return self._facts

    def stored_bytes(self) -> int:
        """Bytes that are not holes of their files."""
        self._check_open()
        return sum(memory.data_bytes() for memory in self._memories)

    def fingerprint(self) -> str:
        """Text of this opening alone: nothing is ever resumed from memory."""
        return self._fingerprint

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """See `Contents`; the windows are views of the memory itself, in the order asked for."""
        reader, unused = MemoryReader(self._memories), aligned_buffer(PAGE_SIZE)
        for window in [window_of(self.blocks, row) for row in rows]:
            self._check_open()
            yield reader.read(window, unused)

    def close(self) -> None:
        """Let go of the memory; harmless when called again."""
        self._closed = True
        for memory in self._owned:
            memory.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the contents are closed")


def open_memory(
    blocks: Sequence[MemoryFileBlock], device_state: str | os.PathLike[str]
) -> MemoryContents:
    """Open memory files and the device state that goes with them.

    Args:
        blocks: the blocks that lie in files; the others come with the device state.
        device_state: file with the plain stream that QEMU saved with x-ignore-shared.

    Raises:
        StateError: no block, one named twice, or a file or range that is no memory.
        FormatError: the device state breaks a rule, or was not saved with x-ignore-shared.
        MismatchError: memory and device state do not go together; names the block.
        StorageError: a file cannot be opened, mapped or read.
    """
    shared = {block.idstr: block.length for block in blocks}
    if not blocks or len(shared) != len(blocks):
        raise StateError("memory files: give at least one block, and each once")
    with closing(open_for_reading(os.fspath(device_state))) as main:
        stream = read_device_state(main, shared)
    lengths = dict(stream.blocks)
    with ExitStack() as undo:
        memories: dict[str, MemorySource] = {}
        for block in blocks:
            if block.idstr not in lengths:
                names = ", ".join(lengths)
                raise MismatchError(
                    f"not in the device state {os.fspath(device_state)}, which has {names}",
                    block=block.idstr,
                )
            memory = FileMemory(block.path, offset=block.offset, length=lengths[block.idstr])
            undo.callback(memory.close)
            memories[block.idstr] = memory
        undo.pop_all()
    return MemoryContents(os.fspath(blocks[0].path), stream, memories)
