"""Windows read ahead by channels and handed to one consumer, from any file.

Every channel has a few buffers of its own: one for each window that its requests can fill, one for
the consumer and one more, so that it reads on while the consumer looks. When the consumer is slower
than the disk the channel waits for a buffer: memory is bounded by options alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from uringmig import signals
from uringmig.contents.source import Row, WindowRead, row_of
from uringmig.memory.source import Extents
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.pages.runs import runs_from_bits
from uringmig.progress import ChannelCounters
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.requests import NOTHING, IoPlan
from uringmig.transfer.channel import ChannelFile, join_all, run_round
from uringmig.transfer.plan import Window

#: Buffers of a channel beside those that requests fill.
_SPARE_BUFFERS: Final = 2

NO_DATA: Final = Extents(np.empty(0, np.int64), np.empty(0, np.int64))


class WindowFiller(Protocol):
    """How a window of some file format is filled; used by several channels at the same time."""

    @property
    def buffer_bytes(self) -> int:
        """Length of the buffers, page aligned, that `plan` and `complete` get."""

    def plan(self, window: Window, buffer: NDArray[np.uint8]) -> IoPlan:
        """Decide what to read into the buffer; may be empty."""

    def complete(self, window: Window, buffer: NDArray[np.uint8]) -> WindowRead:
        """Make the window of what has been read; its memory lies in the buffer, or is empty."""


@dataclass(slots=True)
class _Filled:
    """A window for the consumer, and where its buffer goes afterwards, if it has one."""

    read: WindowRead
    buffer: NDArray[np.uint8]
    home: queue.LifoQueue[NDArray[np.uint8] | None] | None

    def exchange(self, buffer: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """See `WindowRead`: a buffer fits if it is as long and as well aligned."""
        if len(buffer) != len(self.buffer) or buffer.ctypes.data % PAGE_SIZE:
            return None
        kept, self.buffer = self.buffer, buffer
        return kept

    def let_go(self) -> None:
        """Give the buffer back: the consumer has done with the window."""
        if self.home is not None:
            self.home.put(self.buffer)


class _ReadWork:
    """One channel's side: a window's buffer is its own from `plan` until the consumer is done."""

    def __init__(
        self,
        filler: WindowFiller,
        shared: ChannelFile,
        ready: queue.Queue[_Filled | BaseException | None],
        stopping: threading.Event,
    ) -> None:
        options = shared.options
        self.windows_max = options.windows_held
        # The buffer given back last is taken first: it is the one still in the cache, and of those
        # that are never needed no page is ever touched.
        self.free: queue.LifoQueue[NDArray[np.uint8] | None] = queue.LifoQueue()
        for _ in range(self.windows_max + _SPARE_BUFFERS):
            self.free.put(aligned_buffer(filler.buffer_bytes))
        self._filler = filler
        self._ready = ready
        self._stopping = stopping
        self._used: dict[Window, NDArray[np.uint8]] = {}

    def plan(self, window: Window) -> IoPlan:
        """Plan the reads of the window into a free buffer, waiting for one if need be."""
        buffer = None if self._stopping.is_set() else self.free.get()
        if buffer is None:
            return NOTHING
        self._used[window] = buffer
        return self._filler.plan(window, buffer)

    def submitted(self, window: Window) -> None:
        """Nothing can be done beside the device: what is read is not there yet."""

    def finished(self, window: Window) -> None:
        """Hand the window over."""
        buffer = self._used.pop(window, None)
        if buffer is None:
            return
        read = self._filler.complete(window, buffer)
        if len(read.memory):
            self._ready.put(_Filled(read, buffer, self.free))
        else:
            self.free.put(buffer)
            self._ready.put(_Filled(read, read.memory, None))


def read_windows(
    shared: ChannelFile, filler: WindowFiller, windows: Sequence[Window]
) -> Iterator[WindowRead]:
    """Read windows by channels in threads of their own, and yield each when it is there.

    Raises:
        UringmigError: the first failure of any channel; the others have stopped and drained.
    """
    with closing(_fill(shared, filler, windows)) as filled:
        for item in filled:
            yield replace(item.read, exchange=item.exchange)
            item.let_go()


def read_in_order(
    shared: ChannelFile, filler: WindowFiller, windows: Sequence[Window]
) -> Generator[WindowRead, None, None]:
    """As `read_windows`, but in the order of ``windows``; those that come early are held.

    One channel reads them: with more, one that failed would leave the others without buffers, all
    of them held here for the sake of a window that never comes.
    """
    shared = structs.replace(shared, options=replace(shared.options, channels=1))
    early: dict[Row, _Filled] = {}
    order = iter(windows)
    awaited = next(order, None)
    with closing(_fill(shared, filler, windows)) as filled:
        for item in filled:
            early[item.read.block_index, item.read.row] = item
            while awaited is not None and (found := early.pop(row_of(awaited), None)) is not None:
                yield found.read
                found.let_go()
                awaited = next(order, None)


def _fill(
    shared: ChannelFile, filler: WindowFiller, windows: Sequence[Window]
) -> Generator[_Filled, None, None]:
    """Run the channels in a thread; whoever takes an item gives its buffer back afterwards."""
    ready: queue.Queue[_Filled | BaseException | None] = queue.Queue()
    stopping = threading.Event()
    works: list[_ReadWork] = []

    def make_work(_: ChannelCounters) -> _ReadWork:
        works.append(_ReadWork(filler, shared, ready, stopping))
        return works[-1]

    def drive() -> None:
        counters = [ChannelCounters() for _ in range(min(shared.options.channels, len(windows)))]
        try:
            with closing(run_round(shared, windows, make_work, counters)) as round_:
                for _ in round_:
                    if stopping.is_set():
                        break
        except BaseException as error:
            ready.put(error)
        else:
            ready.put(None)

    driver = threading.Thread(target=drive, name="read-ahead", daemon=True)
    driver.start()
    try:
        while (item := signals.take(ready)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopping.set()
        for work in works:
            work.free.put(None)
        # Whoever closed this closes the file next, which the channels still read.
        join_all([driver])


def zero_window(window: Window, zeros: NDArray[np.uint8]) -> WindowRead:
    """A window of zeros: a view of ``zeros``, which is never written."""
    block_index, row = row_of(window)
    return WindowRead(block_index, row, zeros[: window.length_bytes], NO_DATA)


def zero_memory() -> NDArray[np.uint8]:
    """Memory for `zero_window`; read-only, and nobody allocates it by reading."""
    zeros = aligned_buffer(WINDOW_BYTES)
    zeros.flags.writeable = False
    return zeros


def extents_of(bits: NDArray[np.bool_]) -> Extents | None:
    """The data of a window whose pages have these bits; None where all are set."""
    if bits.all():
        return None
    runs = runs_from_bits(bits)
    return Extents(runs.first_page * PAGE_SIZE, runs.page_count * PAGE_SIZE)
