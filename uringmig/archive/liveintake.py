"""Windows of memory at hand, for the channels that write: each channel looks at its own.

Unlike a file, memory can be asked from several threads, so nothing is read ahead and no lock is
held while a window is looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from uringmig.archive.intake import TakenWindow
from uringmig.contents.live import LiveContents, MemoryReader
from uringmig.contents.source import Row, row_of, window_of
from uringmig.errors import StateError


class LiveIntake:
    """The windows of some rows, for several channels, as an `Intake` of files.

    Args:
        contents: of memory.
        rows: what is to be looked at.
        filled: blocks, by index, whose windows get zeros where they have no data, so that all of
            their memory may be read.
        copies: copy also what is mapped: of a guest that runs, the digest is to be that of the very
            bytes that are written.
    """

    def __init__(
        self,
        contents: LiveContents,
        rows: Sequence[Row],
        *,
        filled: frozenset[int] = frozenset(),
        copies: bool = False,
    ) -> None:
        every = range(len(contents.memories))
        self._reader = MemoryReader(contents.memories, copied=every if copies else filled)
        self._windows = deque(window_of(contents.blocks, row) for row in rows)
        self._filled = filled

    def take(self, buffer: NDArray[np.uint8]) -> TakenWindow:
        """Take any window that nobody has yet.

        Args:
            buffer: a window long, for its memory.

        Raises:
            UringmigError: its memory cannot be looked at.
        """
        try:
            window = self._windows.popleft()
        except IndexError:
            raise StateError("more windows are asked for than there are") from None
        fill_up = window.block_index in self._filled
        if fill_up:
            buffer[: window.length_bytes] = 0
        read = self._reader.read(window, buffer)
        if read.data is None or fill_up:
            start, length = [0], [len(read.memory)]
        else:
            start, length = read.data.start.tolist(), read.data.length.tolist()
        return TakenWindow(row_of(window), read.memory, start, length, buffer)

    def finish(self) -> None:
        """Nothing: whether the guest stood still is for the contents to say."""

    def close(self) -> None:
        """Nothing is read ahead."""
