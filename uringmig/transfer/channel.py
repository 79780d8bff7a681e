"""One multifd channel: a thread, its engine, its share of the windows; and a round of them.

A channel takes the next window from the shared queue, plans it (for a save: finds its zero
pages), submits to its own engine and reaps its own completions: the reaper is a role in the
channel, not a thread, since io_uring's SINGLE_ISSUER wants the submitter to reap. While requests
are in flight it looks at the next window.

A round ends when every channel has drained: no two rounds ever have requests in flight together,
so a page of the next round cannot overtake the same page of this one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, Self

from msgspec import Struct

from uringmig.errors import FormatError, LimitError, StorageError
from uringmig.options import TransferOptions
from uringmig.progress import ChannelCounters
from uringmig.signals import Stopped, stopped_by
from uringmig.storage.bounce import BounceEngine
from uringmig.storage.directfile import DirectFile
from uringmig.storage.engine import Engine, Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window
from uringmig.transfer.slots import Transfer
from uringmig.units import MiB

#: Small requests may be more than ``depth``, as long as they are no more bytes: 4-KiB writes need
#: about a hundred in flight to keep a disk busy, so 256 are enough.
_SLOTS_PER_DEPTH: Final = 16
_SLOTS_MAX: Final = 256
#: Memory that O_DIRECT cannot take where it lies is copied to buffers, one block for each slot. A
#: channel gets as many slots as fit into this many bytes, but never fewer than its depth.
_BOUNCE_BYTES: Final = 16 * MiB
#: How long one wait lasts before the channel looks whether it should stop.
_WAIT_NS: Final = 200_000_000
#: A channel sleeps until this share of what is in flight has completed: seldom enough that waking
#: up costs little, often enough that the device never runs dry.
_WAKE_SHARE: Final = 4
#: How often whoever waits for a round is told of its progress.
_INTERVAL_SECONDS: Final = 0.1
_BACKOFF_SECONDS_MAX: Final = 0.128

#: Engines that failed while requests were in flight, with what the kernel may still be using.
_ABANDONED: Final[list[Any]] = []


class WindowWork(Protocol):
    """What a channel does with its windows; one object for each channel, used in its thread."""

    @property
    def windows_max(self) -> int:
        """Most windows planned and not finished; may change from one to the next."""

    def plan(self, window: Window) -> IoPlan:
        """Decide what to move; may be empty."""

    def submitted(self, window: Window) -> None:
        """Do what can be done beside the device, such as digesting what is in the cache."""

    def finished(self, window: Window) -> None:
        """Note that the last request of the window has completed."""


class ChannelFile(Struct, frozen=True):
    """What every channel of a round shares: the file, the direction, the settings.

    ``bounce`` is set where memory is not aligned as the file's O_DIRECT asks.
    """

    file: DirectFile
    path: str
    operation: Operation
    engine: EngineChoice
    options: TransferOptions
    bounce: bool

    def make_engine(self, slots: int) -> Engine:
        """Make a channel's engine, in the channel's thread."""
        engine = self.engine.factory(self.file.fd, self.operation, slots)
        if not self.bounce:
            return engine
        try:
            return BounceEngine(engine, self.operation, self.options.block_size)
        except BaseException:
            engine.close()
            raise

    @property
    def slots(self) -> int:
        """Requests a channel may have in flight."""
        depth = self.options.depth
        slots = min(depth * _SLOTS_PER_DEPTH, _SLOTS_MAX)
        if self.bounce:
            slots = min(slots, _BOUNCE_BYTES // self.options.block_size)
        return max(depth, slots)


class Pacer:
    """Spreads bytes over time: ``rate`` bytes a second over all channels; 0 is no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def delay(self, count_bytes: int) -> float:
        """Book ``count_bytes`` and return the seconds to wait before they may go."""
        if self._rate == 0:
            return 0.0
        now = time.monotonic()
        with self._lock:
            starts_at = max(self._free_at, now)
            self._free_at = starts_at + count_bytes / self._rate
        return starts_at - now


class Channel:
    """The loop of one channel; made in one thread, run in another."""

    def __init__(
        self,
        shared: ChannelFile,
        windows: deque[Window],
        work: WindowWork,
        counters: ChannelCounters,
        pacer: Pacer,
        stopping: threading.Event,
    ) -> None:
        options = shared.options
        self._shared = shared
        self._windows = windows
        self._work = work
        self._counters = counters
        self._pacer = pacer
        self._stopping = stopping
        self._bytes_max = options.depth * options.block_size
        alignment = shared.file.alignment
        self._transfer = Transfer(
            slots=shared.slots,
            bytes_max=self._bytes_max,
            alignment=max(alignment.offset, alignment.memory),
        )
        self._open: dict[int, Window] = {}
        self._next_tag = 0
        self._completed_before = counters.completed_bytes
        self._requests_before = counters.requests

    def run(self) -> None:
        """Go through windows until none is left and everything has completed.

        Raises:
            StorageError: a request failed; everything in flight was drained first.
            FormatError: the file ended before what was to be read.
        """
        if self._stopping.is_set():
            return  # nobody waits for a thread that was still being started; its file may be closed
        started = time.thread_time()
        engine = self._shared.make_engine(self._shared.slots)
        try:
            # What is to be moved may have to be waited for, as long as its own rate says.
            with suppress(Stopped), stopped_by(self._stopping):
                self._loop(engine)
        finally:
            self._drain(engine)
            self._counters.cpu_seconds += time.thread_time() - started
        failure = self._transfer.failure
        if failure is None:
            return
        verb = self._shared.operation.value
        if failure.errno == 0 and self._shared.operation is Operation.READ:
            raise FormatError("the file ends inside a page area", offset=failure.file_offset)
        raise StorageError(
            f"{verb} failed" if failure.errno else "attempt after attempt wrote nothing",
            errno=failure.errno or None,
            path=self._shared.path,
            offset=failure.file_offset,
        )

    def _loop(self, engine: Engine) -> None:
        """Plan, submit, reap; look ahead only as far as the device can use."""
        transfer = self._transfer
        while not self._stopping.is_set():
            window = self._next_window()
            if window is not None:
                self._plan(window)
            elif transfer.idle:
                return
            self._submit(engine)
            if window is not None:
                self._digest(window)
            wait_count = (
                0 if self._wants_window() else max(1, transfer.in_flight_count // _WAKE_SHARE)
            )
            self._reap(engine, wait_count=wait_count)

    def _wants_window(self) -> bool:
        """Say whether there is a window and room to look at it now."""
        transfer = self._transfer
        return (
            bool(self._windows)
            and transfer.failure is None
            and len(self._open) < self._work.windows_max
            and transfer.pending_count < transfer.slots
            and transfer.pending_bytes < self._bytes_max
        )

    def _next_window(self) -> Window | None:
        """Take a window from the shared queue, if there is one and room for it."""
        if not self._wants_window():
            return None
        try:
            return self._windows.popleft()
        except IndexError:  # another channel was quicker
            return None

    def _plan(self, window: Window) -> None:
        """Plan one window and queue its requests."""
        started = time.perf_counter()
        plan = self._work.plan(window)
        if len(plan):
            self._open[self._next_tag] = window
            self._transfer.add(plan, tag=self._next_tag)
            self._next_tag += 1
        else:
            self._finish(window)
        self._counters.scanned_bytes += window.length_bytes
        self._counters.scan_seconds += time.perf_counter() - started

    def _submit(self, engine: Engine) -> None:
        """Give the engine what fits, at the allowed rate."""
        pause = 0.0
        if self._transfer.retries:
            pause = min(0.001 * 2**self._transfer.retries, _BACKOFF_SECONDS_MAX)
        batch = self._transfer.take()
        if not len(batch):
            return
        pause = max(pause, self._pacer.delay(int(batch.length.sum())))
        if pause > 0:
            self._stopping.wait(pause)
            self._counters.wait_seconds += pause
        started = time.perf_counter()
        engine.submit(batch)
        self._counters.in_flight_bytes = self._transfer.bytes_in_flight
        self._counters.submit_seconds += time.perf_counter() - started

    def _digest(self, window: Window) -> None:
        """Let the work use the time the device needs."""
        started = time.perf_counter()
        self._work.submitted(window)
        self._counters.digest_seconds += time.perf_counter() - started

    def _reap(self, engine: Engine, *, wait_count: int) -> None:
        """Collect completions, then act on them."""
        transfer, counters = self._transfer, self._counters
        started = time.perf_counter()
        done = engine.reap(wait_count=wait_count, timeout_ns=_WAIT_NS)
        counters.wait_seconds += time.perf_counter() - started
        finished = transfer.complete(done)
        counters.completed_bytes = self._completed_before + transfer.bytes_completed
        counters.requests = self._requests_before + transfer.requests_completed
        counters.in_flight_bytes = transfer.bytes_in_flight
        for tag in finished:
            self._finish(self._open.pop(tag))

    def _finish(self, window: Window) -> None:
        """Note the end of a window."""
        self._work.finished(window)
        self._counters.finished_bytes += window.length_bytes

    def _drain(self, engine: Engine) -> None:
        """Wait for all that is in flight, whatever happened, and close the engine."""
        transfer = self._transfer
        try:
            transfer.stop()
            while transfer.in_flight_count:
                transfer.complete(engine.reap(wait_count=1, timeout_ns=_WAIT_NS))
                transfer.stop()  # a short or refused request is not tried again now
            engine.close()
        except BaseException:
            # The kernel may still use the memory: keep it, and all that owns it, for good.
            _ABANDONED.append((self, engine))
            raise


class Round:
    """Channels on their way over some windows: iterate to wait for them, `close` to stop them.

    Each step lasts a moment; the last one comes when all have drained. Threads are started by the
    first, so that whoever has to close the round has it in hand by then, and can do something else
    meanwhile however short the round is.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        stopping: threading.Event,
    ) -> None:
        self._stopping = stopping
        # No SimpleQueue: a signal that comes as its time runs out makes it wait for ever.
        self._ended: queue.Queue[BaseException | None] = queue.Queue()
        self._threads = [
            threading.Thread(
                target=self._run, args=(channel,), name=f"multifd-{number}", daemon=True
            )
            for number, channel in enumerate(channels)
        ]
        self._started = False
        self._running = 0
        self._first_error: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> None:
        """Wait for a moment.

        Raises:
            StopIteration: all have drained, and none has failed.
            UringmigError: all have drained; this is the first failure of any.
            LimitError: this machine gives no thread for one of them.
        """
        try:
            if not self._started:
                self._started = True
                for thread in self._threads:
                    _start(thread)
                    self._running += 1
                return
            while self._running:
                try:
                    error = self._ended.get(timeout=_INTERVAL_SECONDS)
                except queue.Empty:
                    return
                self._running -= 1
                self._first_error = self._first_error or error
        except BaseException:
            self.close()
            raise
        self.close()
        if self._first_error is not None:
            raise self._first_error
        raise StopIteration

    def close(self) -> None:
        """Stop the channels, and wait until each has drained and ended.

        A signal that comes meanwhile is raised only afterwards, since requests in flight still use
        memory and a descriptor. If this is cut short all the same, calling it again finishes what
        is left; so whoever frees memory and descriptor calls it first in any case.
        """
        self._stopping.set()
        join_all(self._threads)

    def _run(self, channel: Channel) -> None:
        """One channel's thread."""
        try:
            channel.run()
        except BaseException as error:
            self._stopping.set()
            self._ended.put(error)
        else:
            self._ended.put(None)


def run_round(
    shared: ChannelFile,
    windows: Sequence[Window],
    make_work: Callable[[ChannelCounters], WindowWork],
    counters: Sequence[ChannelCounters],
    *,
    pacer: Pacer | None = None,
) -> Round:
    """Have one channel per counter go over ``windows``; see `Round`.

    Rounds that are to keep to one rate together share a ``pacer``; None is one for this round.
    """
    remaining = deque(windows)
    pacer = pacer or Pacer(shared.options.rate)
    stopping = threading.Event()
    channels = [
        Channel(shared, remaining, make_work(counter), counter, pacer, stopping)
        for counter in counters
    ]
    return Round(channels, stopping)


def _start(thread: threading.Thread) -> None:
    """Start a channel.

    Raises:
        LimitError: no more threads may be had here, as in a container with a limit on tasks.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise LimitError(f"{thread.name}: {error}; fewer channels need fewer threads") from None


def needs_bounce(file: DirectFile, address: int) -> bool:
    """Say whether memory at ``address`` must be copied to be written with O_DIRECT."""
    return file.direct and address % file.alignment.memory != 0


def join_all(threads: Sequence[threading.Thread]) -> None:
    """Wait until all threads have ended, whatever comes meanwhile.

    Raises:
        KeyboardInterrupt: it came while they were waited for; they have ended all the same.
    """
    interrupt = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt
