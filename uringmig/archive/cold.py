"""The cold tier: each window's pages as one zstd frame, compressed by several threads at a time.

Every channel takes a window in, compresses its nonzero pages, and writes the frame with O_DIRECT to
the next free pages of the file, through its own engine: while it compresses the next window the
device writes the last one. Where a frame went, only the index at the end of the file knows. So a
window that changed while its guest ran gets another frame (`livecopy`), and the first one's place
becomes a hole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from uringmig.archive.coldformat import (
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    ColdHeader,
    ColdIndex,
    FrameTable,
    read_header,
    read_index,
)
from uringmig.archive.coldread import ColdContents, open_cold
from uringmig.archive.copied import CopiedGuest, EntryLabel, TierResult, describe_entry
from uringmig.archive.copyjournal import BITS_BYTES, Chunk
from uringmig.archive.copyrun import CopyRun
from uringmig.archive.intake import NOTHING, Intake, TakenWindow, WindowIntake
from uringmig.archive.livecopy import copy_live
from uringmig.archive.liveintake import LiveIntake
from uringmig.archive.partialcopy import PartialCopy
from uringmig.contents.live import LiveContents
from uringmig.contents.source import Contents, Row
from uringmig.errors import StateError
from uringmig.image import manifest
from uringmig.image.digest import DIGEST_BYTES, bytes_digest, window_digest
from uringmig.image.draft import Durable, make_durable
from uringmig.options import (
    COLD_LEVEL,
    COLD_LEVEL_MAX,
    COLD_WORKERS,
    PAGE_SIZE,
    WINDOW_BYTES,
    WriteOptions,
)
from uringmig.pages import bitmap
from uringmig.pages.runs import PageRuns
from uringmig.progress import ChannelCounters, ProgressCallback
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.enginechoice import EngineChoice, choose_engine
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window, plan_runs
from uringmig.units import align_up, div_ceil

__all__ = ["ColdContents", "open_cold", "write_cold"]

_WORDS_PER_PAGE: Final = PAGE_SIZE // 8
#: While a guest waits, nothing is compressed harder: 9 takes ten times as long.
_FAST_LEVEL: Final = 1


def write_cold(
    contents: Contents,
    out: Path,
    *,
    level: int = COLD_LEVEL,
    workers: int = COLD_WORKERS,
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    label: EntryLabel | None = None,
    resume: Path | None = None,
    progress: ProgressCallback | None = None,
    engine: EngineChoice | None = None,
) -> TierResult:
    """Write contents as a compressed image, published with its manifest.

    Args:
        contents: opened by the caller, and stays the caller's.
        out: the image's final name.
        level: of zstd, 1 (fast) to 22 (small); 1 for what is compressed while a guest waits.
        workers: threads that compress; each also writes what it compressed.
        options: how to write; ``workers`` stands for its ``channels``.
        label: what the entry is called; None: after the file, made here.
        resume: a journal, as for `write_hot`.
        progress: called with a `Snapshot` about ten times a second and at every phase.
        engine: an engine of the caller's instead of ``options.engine``; for tests and benches.

    Raises:
        StateError: level or workers are out of range.
        FormatError: the contents break a rule of their format.
        MismatchError: the source changed while it was read.
        StorageError: nothing is published.
        HostError: io_uring is required and cannot be had.
    """
    if not 1 <= level <= COLD_LEVEL_MAX:
        raise StateError(f"a compression level is from 1 to {COLD_LEVEL_MAX}, not {level}")
    options = replace(options, channels=workers)
    with ExitStack() as stack:
        return _ColdCopy(contents, out, level, options, resume, progress, engine, stack).run(label)


class _FramePlaces:
    """Where every row's frame is; channels append, each at its own place.

    Args:
        guest: for the number of blocks and rows.

    Attributes:
        given_up: offset and length of places whose frames nobody needs any more.
    """

    def __init__(self, guest: CopiedGuest) -> None:
        rows = [copied.block.row_count for copied in guest.blocks]
        self.offset = [np.zeros(count, np.int64) for count in rows]
        self.length = [np.zeros(count, np.int64) for count in rows]
        self.digest = [np.zeros((count, DIGEST_BYTES), np.uint8) for count in rows]
        self.end = HEADER_BYTES
        self.given_up: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def append(self, row: Row, length: int, digest: bytes) -> int:
        """Give a frame the next free pages of the file; returns their offset."""
        with self._lock:
            offset = self.end
            self.end += align_up(length, PAGE_SIZE)
        self.put(row, offset, length, digest)
        return offset

    def give_up(self, row: Row) -> None:
        """Forget a row's frame, if it has one: its memory is another by now."""
        block_index, number = row
        length = int(self.length[block_index][number])
        if length:
            place = int(self.offset[block_index][number]), align_up(length, PAGE_SIZE)
            self.given_up.append(place)
            self.length[block_index][number] = 0

    def put(self, row: Row, offset: int, length: int, digest: bytes) -> None:
        """Note where a frame is."""
        block_index, number = row
        self.offset[block_index][number] = offset
        self.length[block_index][number] = length
        self.digest[block_index][number] = np.frombuffer(digest, np.uint8)

    def table(self, guest: CopiedGuest) -> FrameTable:
        """All frames, sorted by block and row."""
        stored = [np.flatnonzero(lengths) for lengths in self.length]
        blocks = range(len(stored))
        bits = []
        for copied, rows in zip(guest.blocks, stored, strict=True):
            padded = np.zeros((copied.block.row_count, BITS_BYTES), np.uint8)
            padded.reshape(-1)[: len(copied.bitmap)] = copied.bitmap
            bits.append(padded[rows])
        return FrameTable(
            block_index=np.concatenate([np.full(len(stored[i]), i, np.int64) for i in blocks]),
            row=np.concatenate(stored),
            offset=np.concatenate([self.offset[i][stored[i]] for i in blocks]),
            length=np.concatenate([self.length[i][stored[i]] for i in blocks]),
            frame_digest=np.concatenate([self.digest[i][stored[i]] for i in blocks]),
            memory_digest=np.concatenate([guest.blocks[i].digests[stored[i]] for i in blocks]),
            bits=np.concatenate(bits),
        )


class _ColdCopy:
    """The story of one copy; its partial file and buffers end with ``stack``."""

    def __init__(
        self,
        contents: Contents,
        out: Path,
        level: int,
        options: WriteOptions,
        resume: Path | None,
        progress: ProgressCallback | None,
        engine: EngineChoice | None,
        stack: ExitStack,
    ) -> None:
        started = time.monotonic()
        engine = engine or choose_engine(options.engine)  # before anything is made
        self._contents = contents
        self._out = out
        self._level = level
        self._options = options
        self._guest = CopiedGuest(contents)
        self._places = _FramePlaces(self._guest)
        self._partial = PartialCopy(
            out,
            tier="cold",
            source=None if isinstance(contents, LiveContents) else contents.fingerprint(),
            shape=_shape(contents, level),
            direct=options.direct,
            journal=resume,
        )
        stack.enter_context(self._partial)
        self._target = self._partial.target
        self._rows = self._take_over()
        self._copy = CopyRun(
            self._guest,
            self._partial,
            options=options,
            engine=engine,
            progress=progress,
            started=started,
        )

    def run(self, label: EntryLabel | None) -> TierResult:
        """Copy, finish, publish."""
        if isinstance(contents := self._contents, LiveContents):
            copy_live(contents, self._guest, frozenset(), self._go_over)
        else:
            intake = Intake(contents, self._rows, gap_bytes=self._options.bridge)
            self._take_all(intake, self._rows, level=self._level)
        return self._finish(label)

    def _go_over(self, rows: Sequence[Row], *, again: bool, running: bool) -> None:
        """See `LivePass`."""
        contents = self._contents
        assert isinstance(contents, LiveContents), "there is one pass over a file"
        intake = LiveIntake(contents, rows, copies=running)
        waiting = again and not running  # a guest that ran stands still for it
        level = _FAST_LEVEL if waiting else self._level
        self._take_all(intake, rows, level=level, again=again, paced=not waiting)
        if running:
            self._free_places()

    def _take_all(
        self,
        intake: WindowIntake,
        rows: Sequence[Row],
        *,
        level: int,
        again: bool = False,
        paced: bool = True,
    ) -> None:
        """Copy rows and drain; see `CopyRun.copy`."""
        self._copy.copy(
            intake,
            rows,
            lambda counters: _ColdWork(
                intake,
                self._guest,
                self._places,
                level,
                self._options,
                self._copy,
                counters,
                again=again,
            ),
            self._chunk,
            again=again,
            paced=paced,
        )

    def _take_over(self) -> list[Row]:
        """Keep the frames that a killed copy left durable; free what else it wrote."""
        rows = self._guest.take_over(self._partial.taken_over)
        kept: list[tuple[int, int]] = []
        for chunk in self._partial.taken_over:
            if chunk.frame_length:
                row = (chunk.block_index, chunk.row)
                self._places.put(row, chunk.frame_offset, chunk.frame_length, chunk.frame_digest)
                end = chunk.frame_offset + align_up(chunk.frame_length, PAGE_SIZE)
                kept.append((chunk.frame_offset, end))
                self._places.end = max(self._places.end, end)
        main = self._target.main
        main.set_size(self._places.end)
        at = HEADER_BYTES
        for start, end in sorted(kept):
            if start > at:
                main.punch_hole(at, start - at)
            at = max(at, end)
        return rows

    def _free_places(self) -> None:
        """Make holes of places that nobody needs any more; where that cannot be, they take room."""
        places = self._places.given_up
        while places:
            self._target.main.punch_hole(*places.pop())

    def _chunk(self, row: Row) -> Chunk:
        """What the journal keeps of a row."""
        block_index, number = row
        return Chunk(
            block_index,
            number,
            bitmap.pack(self._guest.bits(row)).tobytes().ljust(BITS_BYTES, b"\0"),
            self._guest.digest(row),
            int(self._places.offset[block_index][number]),
            int(self._places.length[block_index][number]),
            self._places.digest[block_index][number].tobytes(),
        )

    def _finish(self, label: EntryLabel | None) -> TierResult:
        """Write index and header, make it all durable, give it its name."""
        main = self._target.main
        self._free_places()
        self._copy.tell("devices")
        tail = self._contents.device_state().tail
        index = ColdIndex(
            configuration=self._contents.configuration,
            section_id=self._contents.section_id,
            device_state=tail,
            blocks=tuple((block.idstr, block.used_length) for block in self._contents.blocks),
            frames=self._places.table(self._guest),
        )
        packed = index.pack()
        header = ColdHeader(self._level, self._places.end, len(packed), bytes_digest(packed))
        main.set_size(self._places.end)
        main.write_at(self._places.end, packed)
        # What we could not read back ourselves, nobody is told to be safe.
        read_index(packed, read_header(header.pack(), file_size=main.size))
        main.write_at(0, header.pack())
        durable = make_durable(main, self._copy.tell, self._partial.publish)
        fields = describe_entry(
            self._guest, self._out, "cold", label, self._guest.content_digest(tail)
        )
        described = self._describe(index, header, durable, fields)
        ratio = fields.stored_bytes / described.frame_bytes if described.frame_bytes else 1.0
        return self._copy.publish(durable, described, fields, shared_bytes=0, ratio=ratio)

    def _describe(
        self,
        index: ColdIndex,
        header: ColdHeader,
        durable: Durable,
        fields: manifest.ArchiveFields,
    ) -> manifest.ColdManifest:
        """Describe the durable image."""
        guest = self._contents.guest()
        return manifest.ColdManifest(
            version=manifest.version_of(guest),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            writer=manifest.WRITER,
            machine=self._contents.configuration.machine,
            file_size=self._target.main.size,
            index_digest=header.index_digest.hex(),
            level=self._level,
            frames=len(index.frames),
            frame_bytes=int(index.frames.length.sum()),
            settings=self._copy.settings,
            seconds=self._copy.seconds(durable),
            notes=self._copy.notes,
            archive=fields,
            guest=msgspec.UNSET if guest is None else guest,
        )


class _ColdWork:
    """One channel's side: takes a window in, compresses its pages, writes the frame.

    ``again``: the windows have frames; those that differ get another one.
    """

    def __init__(
        self,
        intake: WindowIntake,
        guest: CopiedGuest,
        places: _FramePlaces,
        level: int,
        options: WriteOptions,
        copy: CopyRun,
        counters: ChannelCounters,
        *,
        again: bool,
    ) -> None:
        self._again = again
        # So many frames can have requests in flight, and one more is being made.
        self.windows_max = options.windows_held
        self._intake = intake
        self._guest = guest
        self._places = places
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._block_size = options.block_size
        self._done = copy.done
        self._counters = counters
        self._buffer = aligned_buffer(WINDOW_BYTES)
        self._pages = aligned_buffer(WINDOW_BYTES)
        self._free = [aligned_buffer(FRAME_BYTES_MAX) for _ in range(self.windows_max)]
        self._open: dict[Window, tuple[Row, NDArray[np.uint8] | None]] = {}

    def plan(self, window: Window) -> IoPlan:
        """Take in whichever window comes next, make its frame, and plan its writes."""
        held = self._intake.take(self._buffer)
        self._buffer = held.buffer
        self._open[window] = (held.row, None)
        found = held.digest()
        if self._again:
            if found == self._guest.digest(held.row):
                return NOTHING
            self._places.give_up(held.row)
        bits = held.nonzero()
        self._guest.note(held.row, bits)
        self._guest.note_digest(held.row, found)
        stored = int(np.count_nonzero(bits))
        if not self._again:
            self._counters.zero_bytes += PAGE_SIZE * (len(bits) - stored)
        if not stored:
            return NOTHING
        frame = self._free.pop()
        self._open[window] = (held.row, frame)
        length = self._compress(self._gather(held, bits, stored), frame)
        offset = self._places.append(held.row, length, window_digest(frame[:length]))
        count = div_ceil(length, PAGE_SIZE)
        frame[length : count * PAGE_SIZE] = 0
        return plan_runs(
            PageRuns(np.array([0], np.int64), np.array([count], np.int64)),
            address=frame.ctypes.data,
            file_offset=offset,
            block_size=self._block_size,
        )

    def submitted(self, window: Window) -> None:
        """Nothing: the digest was made before the frame."""

    def finished(self, window: Window) -> None:
        """Note that the frame is where it belongs."""
        row, frame = self._open.pop(window)
        self._done.append(row)
        if frame is not None:
            self._free.append(frame)

    def _gather(self, held: TakenWindow, bits: NDArray[np.bool_], stored: int) -> NDArray[np.uint8]:
        """The window's nonzero pages, one after the other."""
        if stored == len(bits):
            return held.memory
        pages = self._pages[: stored * PAGE_SIZE]
        np.compress(
            bits,
            held.memory.view(np.uint64).reshape(-1, _WORDS_PER_PAGE),
            axis=0,
            out=pages.view(np.uint64).reshape(-1, _WORDS_PER_PAGE),
        )
        return pages

    def _compress(self, pages: NDArray[np.uint8], frame: NDArray[np.uint8]) -> int:
        """Compress into ``frame``; returns the frame's length."""
        reader = self._compressor.stream_reader(pages.data, size=len(pages))
        length = 0
        while count := reader.readinto(frame[length:].data):
            length += count
        return length


def _shape(contents: Contents, level: int) -> str:
    """Digest of all that decides what the frames look like."""
    text = msgspec.json.encode(
        [
            contents.configuration.pack().hex(),
            contents.section_id,
            [[block.idstr, block.used_length] for block in contents.blocks],
            level,
        ]
    )
    return bytes_digest(text).hex()
