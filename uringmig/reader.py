"""The story of a load: parse and check the stream, then pages by the same engines and channels.

Pages with a clear bit are zero whatever their slot holds: an earlier round's bytes may lie there,
and a gap that was read through brings them along. They are zeroed when their window has arrived.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import FormatError, StateError
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.format.layout import BlockLayout
from uringmig.image.parse import ParsedImage, parse_image, read_bitmap
from uringmig.memory.array import BufferMemory
from uringmig.memory.source import MemorySink
from uringmig.options import PAGE_SIZE, ReadOptions
from uringmig.pages import bitmap
from uringmig.pages.runs import runs_from_bits
from uringmig.progress import ChannelCounters, Phase, ProgressCallback, Snapshot, take_snapshot
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice, choose_engine
from uringmig.storage.mainfile import open_for_reading
from uringmig.storage.requests import IoPlan
from uringmig.transfer.channel import ChannelFile, Pacer, WindowWork, needs_bounce, run_round
from uringmig.transfer.plan import Window, bridge_gaps, gap_pages, plan_runs, spans_of
from uringmig.units import is_aligned


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One ramblock of an image: its name, size in bytes, place, and pages with a set bit."""

    idstr: str
    used_length: int
    layout: BlockLayout
    pages_set: int


class MappedRamReader:
    """Reads one mapped-ram image, whoever wrote it.  A context manager.

    Opening parses and checks the whole main stream and every bitmap; pages are read on demand.

    Args:
        path: the image, or a file that holds one.
        offset: where the image begins in the file, QEMU's ``offset=``.
        options: how to read.
        progress: called with a `Snapshot` about ten times a second.
        engine: an engine of the caller's instead of ``options.engine``; for tests and benches.

    Raises:
        StateError: ``offset`` is negative.
        FormatError: the file breaks a rule, also one that QEMU's loader does not check.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
        progress: ProgressCallback | None = None,
        engine: EngineChoice | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._options = options
        self._progress = progress
        self._engine = engine or choose_engine(options.engine)
        self._pacer = Pacer(options.rate)
        self.main = open_for_reading(self.path)
        self._direct = None
        try:
            self._image = parse_image(self.main, base=offset)
            self._bitmaps = [read_bitmap(self.main, block) for block in self._image.blocks]
            self.blocks = tuple(_describe(self._image, self._bitmaps))
            self._direct = open_direct(self.path, Operation.READ, options.direct)
        except BaseException:
            self.close()
            raise
        #: Fallbacks the operator should know of; one line each.
        self.notes = tuple(
            note for note in (self._engine.note, self._direct.note) if note is not None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both descriptors; harmless when called again."""
        if self._direct is not None:
            os.close(self._direct.fd)
            self._direct = None
        self.main.close()

    @property
    def image(self) -> ParsedImage:
        """The main stream, parsed: offsets, sections, base and file size."""
        return self._image

    @property
    def configuration(self) -> Configuration:
        """Machine type, capabilities and such, as the image names them."""
        return self._image.configuration

    @property
    def section_id(self) -> int:
        """Id of the ram section."""
        return self._image.section_id

    def device_state(self) -> DeviceState:
        """Everything after ram's START section, to hand to a writer or to keep."""
        return self._image.device_state

    def bitmap(self, idstr: str) -> NDArray[np.uint8]:
        """Packed bits of a block's pages: uint8, little bit order, read-only.

        Raises:
            StateError: no such block.
        """
        packed = self._bitmaps[self._find(idstr)].view()
        packed.flags.writeable = False
        return packed

    def read_into(
        self,
        idstr: str,
        buffer: object,
        *,
        start: int = 0,
        length: int | None = None,
        assume_zero: bool = False,
    ) -> None:
        """Read a block, or a page-aligned range of it, into memory.

        Args:
            idstr: the block.
            buffer: a writable C-contiguous buffer or a `MemorySink`, exactly ``length`` bytes long.
            start: first byte of the range, a multiple of the page size.
            length: bytes, whole pages; None is up to the end of the block.
            assume_zero: the memory is known to be zero, so zero pages need not be written; an
                untouched one then stays unallocated.

        Raises:
            StateError: no such block, or buffer and range do not fit.
            FormatError: the file ends inside a page that is set.
            StorageError: a read failed.
        """
        number = self._find(idstr)
        block = self._image.blocks[number]
        length = block.used_length - start if length is None else length
        if not (is_aligned(start, PAGE_SIZE) and is_aligned(length, PAGE_SIZE)):
            raise StateError(f"a range of {length} bytes at {start} is not whole pages")
        if start < 0 or length < 0 or start + length > block.used_length:
            raise StateError(
                f"ramblock {idstr!r} has {block.used_length} bytes, not {length} at {start}"
            )
        if length == 0:
            return
        sink = as_sink(buffer)
        if sink.length_bytes != length:
            raise StateError(
                f"a buffer of {sink.length_bytes} bytes for {length} bytes of {idstr!r}"
            )
        first = start // PAGE_SIZE
        windows = [
            Window(number, first + window.first_page, window.page_count)
            for window in spans_of([length // PAGE_SIZE], self._options)
        ]
        packed = self._bitmaps[number]
        shared = self.channel_file(bounce_for=sink.address)
        for _ in self.run(
            "read",
            windows,
            shared,
            lambda _: LoadWork(block, packed, sink, start, self._options, assume_zero),
        ):
            pass

    def channel_file(self, *, bounce_for: int) -> ChannelFile:
        """What channels need to read this image into memory at address ``bounce_for``."""
        if self._direct is None:
            raise StateError("the reader is closed")
        return ChannelFile(
            file=self._direct,
            path=self.path,
            operation=Operation.READ,
            engine=self._engine,
            options=self._options,
            bounce=needs_bounce(self._direct, bounce_for),
        )

    def run(
        self,
        phase: Phase,
        windows: Sequence[Window],
        shared: ChannelFile,
        make_work: Callable[[ChannelCounters], WindowWork],
    ) -> Iterator[Snapshot]:
        """Run channels over ``windows`` of this image, telling of progress."""
        counters = [ChannelCounters() for _ in range(self._options.channels)]
        total = sum(window.length_bytes for window in windows)
        started = time.monotonic()

        def tell() -> Snapshot:
            snapshot = take_snapshot(
                phase, counters, total_bytes=total, seconds=time.monotonic() - started
            )
            if self._progress is not None:
                self._progress(snapshot)
            return snapshot

        with closing(run_round(shared, windows, make_work, counters, pacer=self._pacer)) as round_:
            for _ in round_:
                yield tell()
        yield tell()

    def _find(self, idstr: str) -> int:
        """Index of a block by its name."""
        for number, block in enumerate(self._image.blocks):
            if block.idstr == idstr:
                return number
        names = ", ".join(block.idstr for block in self._image.blocks)
        raise StateError(f"no ramblock {idstr!r} in the image; there are {names}")


class LoadWork:
    """One channel's side of a load into a block-sized sink, or one for a range of it."""

    def __init__(
        self,
        block: BlockLayout,
        packed: NDArray[np.uint8],
        sink: MemorySink,
        start: int,
        options: ReadOptions,
        assume_zero: bool,
    ) -> None:
        self.windows_max = 1 << 30  # a window holds no buffer: requests and bytes are bound enough
        self._block = block
        self._packed = packed
        self._sink = sink
        # Should the engine fail with requests in flight, this keeps their memory mapped.
        self._view = sink.view
        self._start = start
        self._options = options
        self._assume_zero = assume_zero

    def plan(self, window: Window) -> IoPlan:
        """Plan the reads of the window's set pages."""
        bits = self._bits(window)
        return plan_reads(
            bits,
            address=self._sink.address + window.start_bytes - self._start,
            file_offset=self._block.pages_offset + window.start_bytes,
            options=self._options,
        )

    def submitted(self, window: Window) -> None:
        """Nothing can be done beside the device: what is read is not there yet."""

    def finished(self, window: Window) -> None:
        """Zero what is clear: it may hold old bytes of the buffer, or stale ones of the file."""
        bits = self._bits(window)
        at = window.start_bytes - self._start
        memory = self._sink.view[at : at + window.length_bytes]
        if not self._assume_zero:
            zero_clear_pages(memory, bits)
        elif bits.any():
            everything = np.ones_like(bits)
            read = bridge_gaps(
                bits, bridgeable=everything, gap_pages=gap_pages(self._options.bridge)
            )
            zero_clear_pages(memory, bits | ~read)

    def _bits(self, window: Window) -> NDArray[np.bool_]:
        """The window's bits."""
        return bitmap.unpack(
            self._packed, first_page=window.first_page, page_count=window.page_count
        )


def plan_reads(
    bits: NDArray[np.bool_], *, address: int, file_offset: int, options: ReadOptions
) -> IoPlan:
    """Plan the reads of a window's set pages, short gaps read through."""
    wanted = bridge_gaps(bits, bridgeable=np.ones_like(bits), gap_pages=gap_pages(options.bridge))
    return plan_runs(
        runs_from_bits(wanted),
        address=address,
        file_offset=file_offset,
        block_size=options.block_size,
    )


def zero_clear_pages(memory: NDArray[np.uint8], bits: NDArray[np.bool_]) -> None:
    """Zero the pages of ``memory`` (1-D uint8) whose bit is clear."""
    if not bits.all():
        memory.reshape(-1, PAGE_SIZE)[~bits] = 0


def as_sink(buffer: object) -> MemorySink:
    """Take a memory sink as it is; wrap anything else that is a writable buffer.

    Raises:
        StateError: it cannot be written.
    """
    sink = buffer if isinstance(buffer, MemorySink) else BufferMemory(buffer)
    if not sink.view.flags.writeable:
        raise StateError("the memory to read into is read-only")
    return sink


def _describe(image: ParsedImage, bitmaps: list[NDArray[np.uint8]]) -> Iterator[BlockInfo]:
    """Count the pages of each block; refuse an image without a single one."""
    counts = [bitmap.set_bit_count(packed) for packed in bitmaps]
    if not any(counts):
        # QEMU's background-snapshot with mapped-ram completes and writes no bitmap at all.
        raise FormatError(
            "every bitmap is empty: the image holds no page",
            block=image.blocks[0].idstr,
            offset=image.blocks[0].bitmap_offset,
            expected="a set bit",
            found="none",
        )
    for block, count in zip(image.blocks, counts, strict=True):
        yield BlockInfo(block.idstr, block.used_length, block, count)
