"""A plain migration stream in a file as contents: QEMU's ``migrate file:``, libvirt's raw image.

Pages lie where they came, not where they belong, and one that the guest changed meanwhile comes
again: the last one counts. So opening reads the file once, for an index of each page's last place
(8 bytes a page of what is stored, see `PageIndex`), and `windows` reads it a second time; both at
the rate of the options. Neither leaves anything in the page cache where O_DIRECT can be had.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from uringmig.contents.plainlook import begin_reading, stream_fingerprint
from uringmig.contents.source import ContentsBlock, Row, WindowRead, row_of, window_of
from uringmig.contents.sourcefile import FileVersion
from uringmig.contents.windowstream import (
    extents_of,
    read_in_order,
    read_windows,
    zero_memory,
    zero_window,
)
from uringmig.errors import FormatError, StateError
from uringmig.format.constants import CAPABILITY_MAPPED_RAM
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.format.mainstream import MainStreamReader
from uringmig.format.plainrecords import ABSENT, PageIndex
from uringmig.format.plainstate import PlainState
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, ReadOptions
from uringmig.pages.runs import PageRuns
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice, choose_engine
from uringmig.storage.mainfile import open_for_reading
from uringmig.storage.requests import IoPlan
from uringmig.transfer.channel import ChannelFile
from uringmig.transfer.plan import Window, plan_runs, windows_of
from uringmig.units import GiB, align_down

_WINDOW_PAGES: Final = WINDOW_BYTES // PAGE_SIZE
#: Any 4 KiB of a file touch at most two of its 4-KiB pages.
_STAGING_BYTES: Final = 2 * WINDOW_BYTES
#: A file is indexed in stretches: how long it says it is, a hole for the most part, costs nothing.
_STRETCH_BYTES: Final = 4 * GiB


class PlainFileContents:
    """A plain stream in a file, opened; see `contents.source.Contents`.

    Args:
        path: the file.
        offset: where the stream begins; it ends with the file.
        options: how to read.
        kind: what the operator is told it is.
        notes: what the operator should know besides.
        engine: an engine of the caller's instead of ``options.engine``; for tests and benches.

    Raises:
        FormatError: it is no plain stream, or breaks a rule, or does not hold the guest's pages.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """

    buffer_bytes = _STAGING_BYTES + WINDOW_BYTES

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offset: int = 0,
        options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
        kind: str = "plain",
        notes: Sequence[str] = (),
        engine: EngineChoice | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.kind = kind
        self._base = offset
        self._options = options
        engine = engine or choose_engine(options.engine)
        with ExitStack() as undo:
            self._main = open_for_reading(self.path)
            undo.callback(self._main.close)
            self._version = FileVersion.of(self._main)
            self._direct = open_direct(self.path, Operation.READ, options.direct)
            undo.callback(os.close, self._direct.fd)
            self._shared = ChannelFile(
                file=self._direct,
                path=self.path,
                operation=Operation.READ,
                engine=engine,
                options=options,
                bounce=False,
            )
            # What lies behind the last whole page of the file cannot be read with O_DIRECT.
            self._whole_bytes = align_down(self._version.size, PAGE_SIZE)
            rest = self._main.read_at(self._whole_bytes, self._version.size - self._whole_bytes)
            self._rest = np.frombuffer(rest, np.uint8)
            self._index = PageIndex()
            self._fingerprint = stream_fingerprint(kind, self._version, self._main, offset)
            self._state = self._scan()
            self._undo = undo.pop_all()
        self.blocks = tuple(ContentsBlock(*block) for block in self._state.blocks)
        self.notes = (
            *notes,
            *(note for note in (engine.note, self._direct.note) if note is not None),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def configuration(self) -> Configuration:
        """See `Contents`."""
        return replace(self._state.configuration, capabilities=(CAPABILITY_MAPPED_RAM,))

    @property
    def section_id(self) -> int:
        """Id of the ram section."""
        return self._state.section_id

    def device_state(self) -> DeviceState:
        """The device sections, as a mapped-ram image has them."""
        return self._state.device_state()

    def guest(self) -> None:
        """Nothing: a stream does not say, and has no manifest."""

    def stored_bytes(self) -> int:
        """Bytes in pages that the stream has as data."""
        return PAGE_SIZE * self._index.page_count()

    def fingerprint(self) -> str:
        """See `Contents`."""
        return self._fingerprint

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """See `Contents`; windows without a stored page cost no reading and come first."""
        windows = [window_of(self.blocks, row) for row in rows]
        if self._main.fd < 0:
            raise StateError("the contents are closed")
        zeros = zero_memory()
        stored = []
        for window in windows:
            places = self._index.row(self.blocks[window.block_index].idstr, row_of(window)[1])
            if places is not None and places.any():
                stored.append(window)
            else:
                yield zero_window(window, zeros)
        yield from read_windows(self._shared, self, stored)
        self._version.check(self._main)

    def close(self) -> None:
        """Close the file; harmless when called again."""
        self._undo.close()

    def plan(self, window: Window, buffer: NDArray[np.uint8]) -> IoPlan:
        """Plan the reads of the file's pages that the window's pages touch, packed together."""
        pages = _touched(self._places(window))
        pages = pages[pages * PAGE_SIZE < self._whole_bytes]
        return _packed_plan(pages, buffer.ctypes.data, self._options.block_size)

    def complete(self, window: Window, buffer: NDArray[np.uint8]) -> WindowRead:
        """Put the pages where they belong."""
        places = self._places(window)
        touched = _touched(places)
        present = places != ABSENT
        staging = buffer[:_STAGING_BYTES]
        if len(touched) and int(touched[-1]) * PAGE_SIZE == self._whole_bytes:
            at = (len(touched) - 1) * PAGE_SIZE
            staging[at : at + len(self._rest)] = self._rest
        memory = buffer[_STAGING_BYTES : _STAGING_BYTES + window.length_bytes]
        memory.reshape(-1, PAGE_SIZE)[~present] = 0
        wanted = places[present]
        at = np.searchsorted(touched, wanted // PAGE_SIZE) * PAGE_SIZE + wanted % PAGE_SIZE
        anywhere = np.lib.stride_tricks.sliding_window_view(staging, PAGE_SIZE)
        memory.reshape(-1, PAGE_SIZE)[present] = anywhere[at]
        block_index, row = row_of(window)
        return WindowRead(block_index, row, memory, extents_of(present), filled=True)

    def _places(self, window: Window) -> NDArray[np.int64]:
        """Absolute offset of each of the window's pages, or `ABSENT`."""
        places = self._index.row(self.blocks[window.block_index].idstr, row_of(window)[1])
        assert places is not None, "only windows with pages are read"
        return places[: window.page_count]

    def _scan(self) -> PlainState:
        """Read the whole stream once, for its pages' places and all the rest."""
        reader, state = begin_reading(self._main, self._base, self._version.size, self._index)
        with closing(self._pieces()) as pieces:
            for piece in pieces:
                skipped = max(0, self._base - piece.row * WINDOW_BYTES)
                _feed(reader, piece.memory[skipped:].data, state)
        if not reader.finished:
            _feed(reader, self._rest[max(0, self._base - self._whole_bytes) :].data, state)
        reader.end_of_input()
        if not self._index.page_count():
            raise FormatError(
                "not a single page in it: it does not hold the guest's memory",
                offset=self._base,
            )
        return state

    def _pieces(self) -> Generator[WindowRead, None, None]:
        """The file's whole pages from the stream's first one on, in order, as rows of the file."""
        filler = _InOrder(self._options.block_size)
        first = align_down(self._base, WINDOW_BYTES)
        for start in range(first, self._whole_bytes, _STRETCH_BYTES):
            length = min(_STRETCH_BYTES, self._whole_bytes - start)
            windows = [
                structs.replace(window, first_page=window.first_page + start // PAGE_SIZE)
                for window in windows_of([length // PAGE_SIZE], window_pages=_WINDOW_PAGES)
            ]
            with closing(read_in_order(self._shared, filler, windows)) as pieces:
                yield from pieces


@dataclass(frozen=True, slots=True)
class _InOrder:
    """Fills windows of the file itself, in requests of at most ``block_size`` bytes."""

    block_size: int
    buffer_bytes: int = WINDOW_BYTES

    def plan(self, window: Window, buffer: NDArray[np.uint8]) -> IoPlan:
        """Plan the reads of the window."""
        return plan_runs(
            PageRuns(np.array([0]), np.array([window.page_count])),
            address=buffer.ctypes.data,
            file_offset=window.start_bytes,
            block_size=self.block_size,
        )

    def complete(self, window: Window, buffer: NDArray[np.uint8]) -> WindowRead:
        """Hand the bytes over as they are."""
        return WindowRead(*row_of(window), buffer[: window.length_bytes], None)


def _feed(reader: MainStreamReader, data: memoryview, state: PlainState) -> None:
    """Read a piece of the stream."""
    reader.feed(data)
    for event in reader.events():
        state.note(event)


def _touched(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the file's pages that hold a byte of a guest's page at these places, sorted."""
    first = places[places != ABSENT] // PAGE_SIZE
    return np.unique(np.concatenate([first, first + 1]))


def _packed_plan(pages: NDArray[np.int64], address: int, block_size: int) -> IoPlan:
    """Plan the reads of sorted pages of a file to ``address`` on, one after the other."""
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    counts = np.diff(starts, append=len(pages))
    # A long stretch is several requests, so that the ring has more than one of them at once.
    most = block_size // PAGE_SIZE
    pieces = -(-counts // most)
    stretch = np.repeat(np.arange(len(starts)), pieces)
    skipped = most * (np.arange(len(stretch)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    first = starts[stretch] + skipped
    return IoPlan(
        address=address + first * PAGE_SIZE,
        length=np.minimum(most, counts[stretch] - skipped) * PAGE_SIZE,
        file_offset=pages[first] * PAGE_SIZE,
    )
