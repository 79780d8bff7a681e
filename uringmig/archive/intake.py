"""Windows of a file's contents, taken in by the channels that write: read ahead there, held here.

The contents' memory is good until the next window is asked for, and several channels ask. So a
channel gives a buffer of its own in exchange for the one the memory lies in; where that cannot be
it copies what may be nonzero, under the lock that also orders the asking.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.source import Contents, Row, WindowRead
from uringmig.errors import StateError
from uringmig.image import digest
from uringmig.memory.source import Extents
from uringmig.options import PAGE_SIZE
from uringmig.pages.zero import nonzero_pages
from uringmig.storage.requests import IoPlan

_EMPTY: Final = np.empty(0, np.int64)
#: The plan of a window with nothing to write.
NOTHING: Final = IoPlan(_EMPTY, _EMPTY, _EMPTY)


@dataclass(frozen=True, slots=True)
class TakenWindow:
    """One window in a channel's hands.

    Attributes:
        memory: as long as the window; only what ``start`` and ``length`` say may be read.
        start: of what may be nonzero, in bytes, sorted.
        length: of each.
        buffer: the channel's from now on: the one it gave, or another for it.
    """

    row: Row
    memory: NDArray[np.uint8]
    start: list[int]
    length: list[int]
    buffer: NDArray[np.uint8]

    def nonzero(self) -> NDArray[np.bool_]:
        """Which pages are not zero, one bool each."""
        bits = np.zeros(len(self.memory) // PAGE_SIZE, np.bool_)
        for start, length in zip(self.start, self.length, strict=True):
            first, count = start // PAGE_SIZE, length // PAGE_SIZE
            bits[first : first + count] = nonzero_pages(self.memory[start : start + length])
        return bits

    def readable(self) -> NDArray[np.bool_]:
        """Which pages may be read, one bool each."""
        bits = np.zeros(len(self.memory) // PAGE_SIZE, np.bool_)
        for start, length in zip(self.start, self.length, strict=True):
            bits[start // PAGE_SIZE : (start + length) // PAGE_SIZE] = True
        return bits

    def digest(self) -> bytes:
        """Digest of the window, zeros included."""
        return digest.sparse_digest(self.memory, self.start, self.length)

    def digests(self) -> tuple[bytes, NDArray[np.uint8]]:
        """As `digest`, and those of the window's pieces."""
        return digest.piecewise_digest(self.memory, self.start, self.length)


class WindowIntake(Protocol):
    """Where channels get windows from."""

    def take(self, buffer: NDArray[np.uint8]) -> TakenWindow:
        """Take any window that nobody has yet, into a buffer or in exchange for it."""

    def finish(self) -> None:
        """All windows have been taken: make sure that the source is still what it was."""

    def close(self) -> None:
        """End; harmless when called again. No channel may be at work."""


class Intake:
    """The windows of some rows, for several channels; each window goes to one of them.

    Args:
        contents: read from by this alone until `close`.
        rows: what is to be read.
        filled: blocks, by index, whose windows get zeros where they have no data, so that all of
            their memory may be read.
        gap_bytes: shorter gaps between what may be nonzero are taken in too, as zeros.
    """

    def __init__(
        self,
        contents: Contents,
        rows: Sequence[Row],
        *,
        filled: frozenset[int] = frozenset(),
        gap_bytes: int = 0,
    ) -> None:
        self._windows: Iterator[WindowRead] = contents.windows(rows)
        self._filled = filled
        self._gap_bytes = gap_bytes
        self._lock = threading.Lock()
        self._failure: BaseException | None = None

    def take(self, buffer: NDArray[np.uint8]) -> TakenWindow:
        """Take any window that nobody has yet.

        Args:
            buffer: a window long, for its memory or in exchange for it.

        Raises:
            UringmigError: as `Contents.windows`; the same to every channel that asks afterwards.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                read = next(self._windows)
            except StopIteration:
                self._failure = StateError("the contents ended before all rows were read")
                raise self._failure from None
            except BaseException as error:
                self._failure = error
                raise
            return self._hold(read, buffer)

    def finish(self) -> None:
        """Let the contents end: they check then that the source is still what it was.

        Raises:
            MismatchError: it changed meanwhile.
        """
        left = next(self._windows, None)
        if left is not None:
            raise StateError(f"the contents gave row {left.row} that nobody asked for")

    def close(self) -> None:
        """End the reading ahead; harmless when called again. No channel may be at work."""
        close = getattr(self._windows, "close", None)
        if close is not None:
            close()

    def _hold(self, read: WindowRead, buffer: NDArray[np.uint8]) -> TakenWindow:
        """Keep the buffer that a window lies in, or copy its data."""
        row = (read.block_index, read.row)
        data = read.data
        if data is None:
            start, length = [0], [len(read.memory)]
        else:
            start, length = _joined(data, self._gap_bytes)
        fill_up = read.block_index in self._filled
        if not fill_up and read.exchange is not None:
            kept = read.exchange(buffer)
            if kept is not None:
                return TakenWindow(row, read.memory, start, length, kept)
        memory = buffer[: len(read.memory)]
        if fill_up:
            memory[:] = 0
        for first, count in zip(start, length, strict=True):
            memory[first : first + count] = read.memory[first : first + count]
        if fill_up:
            start, length = [0], [len(memory)]
        return TakenWindow(row, memory, start, length, buffer)


def _joined(data: Extents, gap_bytes: int) -> tuple[list[int], list[int]]:
    """Join extents that are less than ``gap_bytes`` apart: fewer and longer copies."""
    if len(data) <= 1:
        return data.start.tolist(), data.length.tolist()
    end = data.start + data.length
    splits = np.flatnonzero(data.start[1:] - end[:-1] >= gap_bytes)
    start = data.start[np.concatenate([[0], splits + 1])]
    end = end[np.concatenate([splits, [-1]])]
    return start.tolist(), (end - start).tolist()
