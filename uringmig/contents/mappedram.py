"""A mapped-ram image as contents: QEMU's or ours, at any offset of its file."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.source import ContentsBlock, Row, WindowRead, row_of, window_of
from uringmig.contents.sourcefile import FileVersion, digest_of
from uringmig.contents.windowstream import (
    extents_of,
    read_windows,
    zero_memory,
    zero_window,
)
from uringmig.format.constants import CAPABILITY_MAPPED_RAM
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.image.digest import piecewise_digest
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.sidecar import guest_of_image
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, ReadOptions
from uringmig.pages import bitmap
from uringmig.reader import MappedRamReader, plan_reads, zero_clear_pages
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window


class MappedRamContents:
    """A mapped-ram image, opened; see `contents.source.Contents`.

    Args:
        path: the image, or a file that holds one.
        offset: where the image begins in the file, QEMU's ``offset=``.
        options: how to read.
        kind: what the operator is told it is.
        notes: what the operator should know besides.
        compared: windows are only compared: where one was read it comes with its digest, and
            without memory, so that no channel waits for whoever compares.
        engine: an engine of the caller's instead of ``options.engine``; for tests and benches.

    Raises:
        FormatError: the file breaks a rule, also one that QEMU's loader does not check.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """

    buffer_bytes = WINDOW_BYTES

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
        kind: str = "mapped-ram",
        notes: Sequence[str] = (),
        compared: bool = False,
        engine: EngineChoice | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.kind = kind
        self._options = options
        self._compared = compared
        self._reader = MappedRamReader(path, offset=offset, options=options, engine=engine)
        self._version = FileVersion.of(self._reader.main)
        self._bitmaps = [self._reader.bitmap(block.idstr) for block in self._reader.blocks]
        self.blocks = tuple(
            ContentsBlock(block.idstr, block.used_length) for block in self._reader.blocks
        )
        self.notes = (*notes, *self._reader.notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def reader(self) -> MappedRamReader:
        """The image itself, for what only a mapped-ram image has: places and bitmaps."""
        return self._reader

    @property
    def configuration(self) -> Configuration:
        """See `Contents`."""
        return replace(self._reader.configuration, capabilities=(CAPABILITY_MAPPED_RAM,))

    @property
    def section_id(self) -> int:
        """Id of the ram section."""
        return self._reader.section_id

    def device_state(self) -> DeviceState:
        """Everything after ram's START section."""
        return self._reader.device_state()

    def guest(self) -> GuestFacts | None:
        """See `Contents`: what the image's manifest says."""
        image = self._reader.image
        facts, notes = guest_of_image(
            self.path, self._reader.main, base=image.base, blocks=image.blocks
        )
        self.notes += notes
        return facts

    def stored_bytes(self) -> int:
        """Bytes in pages with a set bit."""
        return PAGE_SIZE * sum(block.pages_set for block in self._reader.blocks)

    def stored_rows(self) -> Iterator[Row]:
        """Rows with any bit set, in the order of blocks and rows."""
        row_bytes = WINDOW_BYTES // PAGE_SIZE // 8
        for number, packed in enumerate(self._bitmaps):
            starts = np.arange(0, len(packed), row_bytes)
            rows = np.flatnonzero(np.bitwise_or.reduceat(packed, starts))
            yield from ((number, row) for row in rows.tolist())

    def fingerprint(self) -> str:
        """See `Contents`: the file's version, and its device state and bitmaps."""
        stream = digest_of(self.device_state().tail, *(packed.data for packed in self._bitmaps))
        return f"{self.kind} {self._version} {self._reader.image.base:x} {stream}"

    def windows(self, rows: Sequence[Row]) -> Generator[WindowRead, None, None]:
        """See `Contents`; windows without a set bit cost no reading and come first."""
        windows = [window_of(self.blocks, row) for row in rows]
        shared = self._reader.channel_file(bounce_for=0)
        zeros = zero_memory()
        stored = []
        for window in windows:
            if self._any_set(window):
                stored.append(window)
            else:
                yield zero_window(window, zeros)
        yield from read_windows(shared, self, stored)
        self._version.check(self._reader.main)

    def close(self) -> None:
        """Close the file; harmless when called again."""
        self._reader.close()

    def plan(self, window: Window, buffer: NDArray[np.uint8]) -> IoPlan:
        """Plan the reads of the window's set pages."""
        block = self._reader.image.blocks[window.block_index]
        return plan_reads(
            self._bits(window),
            address=buffer.ctypes.data,
            file_offset=block.pages_offset + window.start_bytes,
            options=self._options,
        )

    def complete(self, window: Window, buffer: NDArray[np.uint8]) -> WindowRead:
        """Zero what is clear: the buffer holds another window's bytes there."""
        bits = self._bits(window)
        memory = buffer[: window.length_bytes]
        zero_clear_pages(memory, bits)
        if self._compared:
            found, pieces = piecewise_digest(memory, [0], [len(memory)])
            return WindowRead(
                *row_of(window), memory[:0], extents_of(bits), digest=found, pieces=pieces
            )
        return WindowRead(*row_of(window), memory, extents_of(bits), filled=True)

    def _bits(self, window: Window) -> NDArray[np.bool_]:
        """The window's bits."""
        return bitmap.unpack(
            self._bitmaps[window.block_index],
            first_page=window.first_page,
            page_count=window.page_count,
        )

    def _any_set(self, window: Window) -> bool:
        """Say whether any page of the window has its bit set; windows begin at whole bytes."""
        first = window.first_page // 8
        packed = self._bitmaps[window.block_index]
        return bool(packed[first : first + -(-window.page_count // 8)].any())
