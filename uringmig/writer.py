"""The story of a save: pages, drain, bitmaps, device state, sync, publish.

    OPEN -> PAGES <-> DRAINED -> ENDING -> PUBLISHED     any -> FAILED

Everything after the pages is `image.draft`'s, which all that make images have in common.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import StateError
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.format.layout import ImageLayout, plan_layout
from uringmig.image import manifest
from uringmig.image.draft import FinishedImage, ImageDraft
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.passes import Passes
from uringmig.image.pieces import piece_table
from uringmig.image.savework import lay_out
from uringmig.memory.array import BufferMemory
from uringmig.memory.moving import MovingMemory
from uringmig.memory.source import CopiedMemory, MemorySource
from uringmig.options import WriteOptions
from uringmig.progress import (
    ChannelCounters,
    Phase,
    ProgressCallback,
    Snapshot,
    account,
    take_snapshot,
)
from uringmig.result import SaveResult, describe_seconds, describe_settings
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice, choose_engine
from uringmig.storage.imagetarget import NamedTarget, PassedTarget, Target
from uringmig.transfer.channel import ChannelFile, Round, needs_bounce
from uringmig.transfer.plan import Window, spans_of

#: For memory that is no QEMU machine's; QEMU has a machine type of this name.
MACHINE_NONE: Final = Configuration("none", ("mapped-ram",))


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One block of guest memory to save.

    Attributes:
        idstr: QEMU's name of the block, for example ``pc.ram``.
        memory: a C-contiguous buffer (numpy array, mmap, bytearray), or a `MemorySource`. It is
            written from where it lies and has to stay unchanged until the call returns. Or a
            `CopiedMemory`, which lies elsewhere and goes through buffers.
        dense: write every page, zero or not, and set every bit; None decides by size, see
            `WriteOptions.dense_up_to`.
    """

    idstr: str
    memory: object
    dense: bool | None = None


class _State(Enum):
    OPEN = auto()
    PAGES = auto()
    DRAINED = auto()
    ENDING = auto()
    PUBLISHED = auto()
    FAILED = auto()


_NEXT: Final = {
    _State.OPEN: {_State.PAGES},
    _State.PAGES: {_State.DRAINED},
    _State.DRAINED: {_State.PAGES, _State.ENDING},
    _State.ENDING: {_State.PUBLISHED},
    _State.PUBLISHED: set(),
    _State.FAILED: set(),
}


class MappedRamWriter:
    """Writes one mapped-ram image that stock QEMU loads (QEMU: migration/ram.c, mapped-ram).

    A context manager: leaving it without `finish` publishes nothing and removes the partial file.

    Args:
        path: final name; written as ``path.partial`` until it is whole and durable.
        blocks: guest memory, in the order of the image.
        options: how to write.
        configuration: machine type and such; its capabilities must be exactly ``mapped-ram``.
        section_id: id of the ram section; device sections copied from a stream keep theirs, so it
            must be the id that stream used.
        base: where the image begins in the file, QEMU's ``offset=``; bytes before it stay a hole.
        live: the memory goes on changing, and is written in two passes at least: by `write_all`,
            which makes copies, whatever memory it is; and by `write_changed`, when it stands still.
        progress: called with a `Snapshot` about ten times a second and at every phase.
        engine: an engine of the caller's instead of ``options.engine``; for tests and benches.

    Raises:
        StateError: blocks or arguments that no image can be made of.
        StorageError: the file cannot be made, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        blocks: Sequence[RamBlock],
        *,
        options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
        configuration: Configuration = MACHINE_NONE,
        section_id: int = 1,
        base: int = 0,
        live: bool = False,
        progress: ProgressCallback | None = None,
        engine: EngineChoice | None = None,
    ) -> None:
        self._set_up(blocks, options, configuration, section_id, base, progress, engine, live=live)
        self._open(NamedTarget(path, mode=options.direct, sidecar_suffix=manifest.SUFFIX))

    @classmethod
    def on_descriptors(
        cls,
        direct_fd: int,
        main_fd: int,
        blocks: Sequence[RamBlock],
        *,
        options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
        configuration: Configuration = MACHINE_NONE,
        section_id: int = 1,
        base: int = 0,
        progress: ProgressCallback | None = None,
        engine: EngineChoice | None = None,
    ) -> Self:
        """Write through two descriptors the caller opened, as a QEMU fdset holds them.

        Exactly the first must have O_DIRECT, both must be open for writing on one file. `finish`
        makes the file durable; its name, and what becomes of it after a failure, stay the caller's,
        and no manifest is written. Bytes below ``base`` are kept.

        Raises:
            StateError: the descriptors are not such a pair; or as for the class.
        """
        writer = cls.__new__(cls)
        writer._set_up(blocks, options, configuration, section_id, base, progress, engine)
        writer._open(PassedTarget(direct_fd, main_fd))
        return writer

    def _set_up(
        self,
        blocks: Sequence[RamBlock],
        options: WriteOptions,
        configuration: Configuration,
        section_id: int,
        base: int,
        progress: ProgressCallback | None,
        engine: EngineChoice | None,
        *,
        live: bool = False,
    ) -> None:
        """Check the arguments and lay the image out; nothing is opened yet."""
        self._started = time.monotonic()
        self._state = _State.OPEN
        self._options = options
        self._configuration = configuration
        self._section_id = section_id
        self._progress = progress
        self._engine = engine or choose_engine(options.engine)
        self._live = live
        self._memories = [_as_source(block.memory) for block in blocks]
        self._blocks, self._layout = lay_out(
            [
                (block.idstr, _copied(memory) if live else memory, block.dense)
                for block, memory in zip(blocks, self._memories, strict=True)
            ],
            options.dense_up_to,
            lambda sizes: plan_layout(configuration, sizes, section_id=section_id, base=base),
        )
        self._counters = [ChannelCounters() for _ in range(options.channels)]
        self._total_bytes = 0
        self._passed_bytes, self._passed_seconds = 0, 0.0
        self._channels: Round | None = None
        self._all_written = False

    def _open(self, target: Target) -> None:
        """Give the file its length."""
        self._target = target
        self._draft = ImageDraft(
            target.main, self._configuration, self._layout, section_id=self._section_id
        )
        try:
            self._draft.begin()
        except BaseException:
            self._fail()
            raise
        self._shared = shared = ChannelFile(
            file=target.direct,
            path=target.path,
            operation=Operation.WRITE,
            engine=self._engine,
            options=self._options,
            bounce=any(
                needs_bounce(target.direct, memory.address)
                for memory in self._memories
                if isinstance(memory, MemorySource)
            ),
        )
        self._passes = Passes(shared, self._blocks, self._options, self._counters)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Discard what was not published; harmless when called again."""
        self._fail()

    @property
    def layout(self) -> ImageLayout:
        """Where everything lies in the file."""
        return self._layout

    @property
    def written_bytes(self) -> int:
        """Bytes moved to the page areas so far, bridged gaps included."""
        return sum(item.completed_bytes for item in self._counters)

    def write_all(self) -> None:
        """Write every page of every block, and drain.

        Raises:
            StorageError: a write failed; nothing is published.
        """
        for _ in self.iter_write_all():
            pass

    def iter_write_all(self) -> Iterator[Snapshot]:
        """As `write_all`, yielding a `Snapshot` about ten times a second while it goes on."""
        # Again: a page that was written before and is a hole now has to be looked at as well.
        again = self._state is not _State.OPEN
        for block in self._blocks:
            block.selected = np.full_like(block.bitmap, 0xFF) if again else None
        counts = [block.layout.page_count for block in self._blocks]
        copied = [n for n, b in enumerate(self._blocks) if isinstance(b.memory, CopiedMemory)]
        windows = spans_of(counts, self._options, copied=copied)
        yield from self._write(windows, first=not again)
        self._all_written = True

    def write_pages(self, idstr: str, page_index: NDArray[np.int64]) -> None:
        """Write some pages again, as they are now: a later round of a live save.

        A page that changed is overwritten in place; one that became zero has its bit cleared.
        Everything earlier has drained before, and this has when it returns.

        Args:
            idstr: the block.
            page_index: pages of the block, 1-D int64, in any order.

        Raises:
            StateError: no such block, or a page outside it; or a live save, before `write_changed`.
            StorageError: a write failed; nothing is published.
        """
        if self._live:
            raise StateError("write_pages() in a live save: write_changed() finds what changed")
        names = [block.layout.idstr for block in self._blocks]
        if idstr not in names:
            raise StateError(f"no ramblock {idstr!r}; there are {', '.join(names)}")
        number = names.index(idstr)
        block = self._blocks[number]
        windows = [Window(number, first, count) for first, count in block.select(page_index)]
        try:
            for _ in self._write(windows):
                pass
        finally:
            block.selected = None

    def write_changed(self, *, moving: bool = False) -> None:
        """Write what is not as it was written before, in a live save.

        Memory is read once more, as fast as it can be, and compared by digests of 64 KiB. What
        changed is overwritten in place; a page that became zero has its bit cleared.

        Args:
            moving: the memory goes on changing still, and copies are made, at the rate that is set.
                Otherwise it stands still: this is the last time, and no rate holds it up.

        Raises:
            StateError: it is no live save, or `write_all` has not run.
            StorageError: a write failed; nothing is published.
        """
        for _ in self.iter_write_changed(moving=moving):
            pass

    def iter_write_changed(self, *, moving: bool = False) -> Iterator[Snapshot]:
        """As `write_changed`, yielding a `Snapshot` about ten times a second while it goes on."""
        if not (self._live and self._all_written):
            raise StateError("write_changed() is for a live save, after write_all()")
        for block, memory in zip(self._blocks, self._memories, strict=True):
            memory.forget_holes()
            # Of a dense block holes are written too, so it stays with copies.
            if not (moving or block.dense):
                block.memory = memory
        self._passed_bytes = self._total_bytes
        self._passed_seconds = time.monotonic() - self._started
        self._total_bytes += sum(block.layout.used_length for block in self._blocks)
        phase: Phase = "write" if moving else "catch-up"
        yield from self._round(lambda: self._passes.catch_up(paced=moving), phase)
        self._live = moving

    def finish(
        self,
        device_state: DeviceState | None = None,
        *,
        guest: GuestFacts | None = None,
        stopped_seconds: float = 0.0,
    ) -> SaveResult:
        """Write bitmaps and device state, make the file durable, and give it its name.

        Args:
            device_state: all that follows the ram setup in the stream; None is a machine without
                devices.
            guest: the machine whose memory it is, for the manifest.
            stopped_seconds: how long it stood still for this, likewise.

        Raises:
            StateError: `write_all` has not run, or `write_changed` of a live save.
            FormatError: the device state does not make a readable stream.
            StorageError: nothing is published.
        """
        if not self._all_written:
            raise StateError("finish() before write_all(): no page has been written")
        if self._live:
            raise StateError("finish() before write_changed(): pages may have changed since")
        try:
            state = device_state or DeviceState.empty(self._section_id)
            return self._finish(state, guest, stopped_seconds)
        except BaseException:
            self._fail()
            raise

    def _finish(
        self, device_state: DeviceState, guest: GuestFacts | None, stopped_seconds: float
    ) -> SaveResult:
        """Do what comes after the pages."""
        self._enter(_State.ENDING)
        finished = self._draft.finish(
            [block.bitmap for block in self._blocks],
            device_state.tail,
            tell=self._tell,
            publish=self._target.publish,
        )
        synced = time.monotonic()
        result = self._result(finished)
        described = None
        if self._options.manifest:
            described = self._draft.describe(
                finished,
                [block.digests for block in self._blocks],
                settings=describe_settings(
                    self._options, engine=result.engine, direct=result.direct
                ),
                seconds=describe_seconds(result.time, stopped=stopped_seconds),
                notes=result.notes,
                pieces=[
                    piece_table(block.pieces, block.bitmap, block.layout.used_length)
                    for block in self._blocks
                ],
                guest=guest,
            )
        manifest_path = finished.durable.publish(described)
        published = time.monotonic()
        # Nobody is told any more: what a callback raises could not undo it.
        self._state = _State.PUBLISHED
        self._release()
        return replace(
            result,
            manifest_path=manifest_path,
            notes=self._notes(),
            time=replace(
                result.time, elapsed=published - self._started, publish=published - synced
            ),
        )

    def _result(self, finished: FinishedImage) -> SaveResult:
        """What there is to say before the image has its name."""
        return SaveResult(
            path=self._target.path,
            manifest_path=None,
            file_size=self._target.main.size,
            memory_bytes=sum(block.layout.used_length for block in self._blocks),
            pages_set=sum(finished.pages_set),
            zero_bytes=sum(item.zero_bytes for item in self._counters),
            written_bytes=self.written_bytes,
            requests=sum(item.requests for item in self._counters),
            engine=self._engine.name,
            direct=self._target.direct.direct,
            bounced=self._shared.bounce,
            block_size=self._options.block_size,
            channels=self._options.channels,
            time=account(
                self._counters,
                elapsed=time.monotonic() - self._started,
                sync=finished.durable.sync_seconds,
            ),
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        """What the engine and the file system could not do."""
        return (*([] if self._engine.note is None else [self._engine.note]), *self._target.notes)

    def _write(self, windows: Sequence[Window], *, first: bool = False) -> Iterator[Snapshot]:
        """Write the pages of ``windows`` that their blocks have selected."""
        self._total_bytes += sum(window.length_bytes for window in windows)
        return self._round(
            lambda: self._passes.write(windows, first=first, live=self._live), "write"
        )

    def _round(self, begin: Callable[[], Round], phase: Phase) -> Iterator[Snapshot]:
        """Run all channels until drained; on any exception the save has failed."""
        self._enter(_State.PAGES)
        self._tell(phase)
        try:
            channels = self._channels = begin()
            for _ in channels:
                yield self._tell(phase)
            self._enter(_State.DRAINED)
            self._tell(phase)
        except BaseException:
            self._fail()
            raise

    def _enter(self, state: _State) -> None:
        """Go to ``state`` if that follows the present one."""
        if state not in _NEXT[self._state]:
            raise StateError(f"cannot go on from {self._state.name} to {state.name}")
        self._state = state

    def _tell(self, phase: Phase) -> Snapshot:
        """Take a snapshot and hand it to whoever looks on."""
        snapshot = take_snapshot(
            phase,
            self._counters,
            total_bytes=self._total_bytes,
            seconds=time.monotonic() - self._started,
            passed_bytes=self._passed_bytes,
            passed_seconds=self._passed_seconds,
        )
        if self._progress is not None:
            self._progress(snapshot)
        return snapshot

    def _fail(self) -> None:
        """Give everything back and leave nothing half-made."""
        if self._state not in (_State.PUBLISHED, _State.FAILED):
            if self._channels is not None:
                # Whoever holds a half-used iterator holds running channels: they end first. Failed
                # only then: an interrupt while they end leaves the rest to the next call.
                self._channels.close()
            self._state = _State.FAILED
            self._release()

    def _release(self) -> None:
        """Close the target (which discards an unpublished file) and let go of the memory."""
        self._target.close()
        for memory in self._memories:
            if isinstance(memory, BufferMemory):
                memory.close()


def _as_source(memory: object) -> MemorySource | CopiedMemory:
    """Take a memory source as it is; wrap anything else that is a buffer."""
    if isinstance(memory, MemorySource | CopiedMemory):
        return memory
    return BufferMemory(memory)


def _copied(memory: MemorySource | CopiedMemory) -> CopiedMemory:
    """Memory that changes is only looked at in copies."""
    return MovingMemory(memory) if isinstance(memory, MemorySource) else memory
