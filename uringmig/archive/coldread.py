"""A cold image as contents: frames read ahead, checked, unpacked by several threads at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import zstandard
from numpy.typing import NDArray

from uringmig.archive.coldformat import (
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    MAGIC,
    ColdHeader,
    ColdIndex,
    read_header,
    read_index,
)
from uringmig.contents.comparing import compare_window
from uringmig.contents.source import ContentsBlock, Row, WindowRead, row_of, window_of
from uringmig.contents.sourcefile import FileVersion
from uringmig.contents.windowstream import extents_of, read_windows, zero_memory, zero_window
from uringmig.errors import FormatError, MismatchError
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.image import digest
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.sidecar import guest_of_cold
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, ReadOptions
from uringmig.pages import bitmap
from uringmig.pages.runs import PageRuns
from uringmig.reader import zero_clear_pages
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import choose_engine
from uringmig.storage.mainfile import MainFile, open_for_reading
from uringmig.storage.requests import IoPlan
from uringmig.transfer.channel import ChannelFile
from uringmig.transfer.plan import Window, plan_runs
from uringmig.units import div_ceil


def open_cold(
    path: str | os.PathLike[str],
    *,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> ColdContents:
    """Open a cold image; see `contents.source.Contents`.

    Raises:
        FormatError: the file breaks a rule of FORMAT.md.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """
    return ColdContents(path, options=options)


class ColdContents:
    """A cold image, opened.  Frames are checked when they are read, both before and after.

    `windows` raises MismatchError where a frame or its memory is not what was written.
    """

    kind = "cold"
    #: The window's memory, then the frame.
    buffer_bytes = WINDOW_BYTES + FRAME_BYTES_MAX

    def __init__(self, path: str | os.PathLike[str], *, options: ReadOptions) -> None:
        self.path = os.fspath(path)
        self._options = options
        self._engine = choose_engine(options.engine)
        self._threads = threading.local()
        self._direct = None
        self.main = open_for_reading(self.path)
        try:
            self.header, self.index = _read(self.main)
            self._direct = open_direct(self.path, Operation.READ, options.direct)
        except BaseException:
            self.close()
            raise
        self._version = FileVersion.of(self.main)
        self.blocks = tuple(ContentsBlock(*block) for block in self.index.blocks)
        frames = self.index.frames
        self._frame_of = {
            row: number
            for number, row in enumerate(
                zip(frames.block_index.tolist(), frames.row.tolist(), strict=True)
            )
        }
        self.notes = tuple(
            note for note in (self._engine.note, self._direct.note) if note is not None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def configuration(self) -> Configuration:
        """Of the machine."""
        return self.index.configuration

    @property
    def section_id(self) -> int:
        """Id of the ram section."""
        return self.index.section_id

    def device_state(self) -> DeviceState:
        """Everything after ram's START section."""
        return DeviceState(self.index.device_state)

    def guest(self) -> GuestFacts | None:
        """See `Contents`: what the image's manifest says."""
        facts, notes = guest_of_cold(self.path, self.header.index_digest.hex())
        self.notes += notes
        return facts

    def stored_bytes(self) -> int:
        """Bytes of the pages that are in frames."""
        return PAGE_SIZE * bitmap.set_bit_count(self.index.frames.bits.reshape(-1))

    def fingerprint(self) -> str:
        """The file's version, and its index's digest."""
        return f"{self.kind} {self._version} {self.header.index_digest.hex()}"

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """See `Contents`; windows without a frame cost no reading and come first.

        Raises:
            MismatchError: a frame is damaged; names block, row and offset.
        """
        windows = [window_of(self.blocks, row) for row in rows]
        zeros = zero_memory()
        stored = []
        for window in windows:
            if row_of(window) in self._frame_of:
                stored.append(window)
            else:
                yield zero_window(window, zeros)
        if self._direct is None:
            raise FormatError("the cold image is closed")
        # In the order of the file, which is nearly that of the rows.
        offsets = self.index.frames.offset
        stored.sort(key=lambda window: int(offsets[self._frame_of[row_of(window)]]))
        shared = ChannelFile(
            file=self._direct,
            path=self.path,
            operation=Operation.READ,
            engine=self._engine,
            options=self._options,
            bounce=False,
        )
        yield from read_windows(shared, self, stored)
        self._version.check(self.main)

    def memory_digest(self, row: Row) -> bytes:
        """Digest of a window's memory, as the index has it."""
        number = self._frame_of.get(row)
        if number is None:
            return digest.zero_digest(window_of(self.blocks, row).length_bytes)
        value: bytes = self.index.frames.memory_digest[number].tobytes()
        return value

    def frame_offset(self, row: Row) -> int | None:
        """Where a window's frame is in the file; None for a window of zeros, which has none."""
        number = self._frame_of.get(row)
        return None if number is None else int(self.index.frames.offset[number])

    def close(self) -> None:
        """Close both descriptors; harmless when called again."""
        if self._direct is not None:
            os.close(self._direct.fd)
            self._direct = None
        self.main.close()

    def plan(self, window: Window, buffer: NDArray[np.uint8]) -> IoPlan:
        """Plan the reads of the window's frame, whole pages of the file."""
        number = self._frame_of[row_of(window)]
        frames = self.index.frames
        # A frame ends before the index, which begins at a page: so its last page is all there.
        count = div_ceil(int(frames.length[number]), PAGE_SIZE)
        return plan_runs(
            PageRuns(np.array([0], np.int64), np.array([count], np.int64)),
            address=buffer.ctypes.data + WINDOW_BYTES,
            file_offset=int(frames.offset[number]),
            block_size=self._options.block_size,
        )

    def complete(self, window: Window, buffer: NDArray[np.uint8]) -> WindowRead:
        """Check the frame, unpack it, put its pages where they belong, check the memory."""
        row = row_of(window)
        number = self._frame_of[row]
        frames = self.index.frames
        memory = buffer[: window.length_bytes]
        frame = buffer[WINDOW_BYTES:][: int(frames.length[number])]
        if digest.window_digest(frame) != frames.frame_digest[number].tobytes():
            raise self._damaged(number, "a frame is damaged")
        bits = bitmap.unpack(frames.bits[number], first_page=0, page_count=window.page_count)
        thread = self._thread()
        pages = memory if bits.all() else thread.pages[: int(np.count_nonzero(bits)) * PAGE_SIZE]
        if not thread.unpack(frame, pages):
            raise self._damaged(number, "a frame does not hold its pages")
        if not bits.all():
            zero_clear_pages(memory, bits)
            memory.reshape(-1, PAGE_SIZE)[bits] = pages.reshape(-1, PAGE_SIZE)
        read = WindowRead(
            *row, memory, extents_of(bits), filled=True, digest=digest.window_digest(memory)
        )
        mismatch = compare_window(
            read,
            frames.memory_digest[number].tobytes().hex(),
            block=self.blocks[window.block_index].idstr,
            offset=int(frames.offset[number]),
        )
        if mismatch is not None:
            raise mismatch
        return read

    def _thread(self) -> _Unpacker:
        """What the calling thread unpacks with."""
        unpacker: _Unpacker | None = getattr(self._threads, "unpacker", None)
        if unpacker is None:
            unpacker = self._threads.unpacker = _Unpacker()
        return unpacker

    def _damaged(self, number: int, what: str) -> MismatchError:
        """Name a frame's place."""
        frames = self.index.frames
        row = int(frames.row[number])
        return MismatchError(
            f"{what}: chunk {row} (guest bytes from {row * WINDOW_BYTES:#x})",
            block=self.blocks[int(frames.block_index[number])].idstr,
            offset=int(frames.offset[number]),
        )


class _Unpacker:
    """One thread's decompressor, and a buffer for pages before they go where they belong."""

    def __init__(self) -> None:
        self.pages = aligned_buffer(WINDOW_BYTES)
        self._zstd = zstandard.ZstdDecompressor(max_window_size=2 * WINDOW_BYTES)

    def unpack(self, frame: NDArray[np.uint8], pages: NDArray[np.uint8]) -> bool:
        """Decompress exactly ``pages`` from the frame; False where it holds anything else."""
        try:
            reader = self._zstd.stream_reader(frame.data)
            length = 0
            while length < len(pages) and (count := reader.readinto(pages[length:].data)):
                length += count
            return length == len(pages) and not reader.read(1)
        except zstandard.ZstdError:
            return False


def _read(main: MainFile) -> tuple[ColdHeader, ColdIndex]:
    """Read and check everything but the frames."""
    size = main.size
    header = read_header(main.read_at(0, HEADER_BYTES), file_size=size)
    data = main.read_at(header.index_offset, header.index_length)
    main.drop_cache()
    return header, read_index(data, header)


def is_cold(path: str | os.PathLike[str]) -> bool:
    """Say whether a file begins like a cold image.

    Raises:
        StorageError: it cannot be read.
    """
    main = open_for_reading(os.fspath(Path(path)))
    try:
        return main.read_at(0, len(MAGIC)) == MAGIC
    finally:
        main.close()
