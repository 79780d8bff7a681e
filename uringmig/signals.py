"""SIGINT, SIGTERM and SIGHUP as a number that loops look at; no exception comes out of a handler.

A handler only notes the number. Whoever waits, or goes on for long, calls `look` at least every
`LOOK_SECONDS`, and that raises `Interrupted` as any function raises: so nothing is torn apart in
its middle, and every place where a run may be stopped can be read in the code. What follows is
cleaning up: `look` raises once.

Two things hold it back. `commit` is the point of no return: it looks for the last time, and what
comes after it is a success that nothing takes back. Within `deferred` a signal waits: for cleaning
up after an error, and for whoever asks for the number itself.

All of this is about the thread that has the `Signals`; in others, and where there are none, as in
a program that only uses the library, no signal does anything here. A thread that works for another
has a flag instead, which that one sets: within `stopped_by` its `look` raises `Stopped`.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Final, Self, TypeVar

#: What a shell reports for a process that a signal ended: this plus the signal's number.
SIGNAL_EXIT_CODE: Final = 128
#: Longest that a wait lasts before it looks again.
LOOK_SECONDS: Final = 0.1
_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Item = TypeVar("Item")


class Interrupted(BaseException):
    """A signal asks to stop; no `Exception`, so that nothing takes it for an error of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class Stopped(BaseException):
    """Nobody wants any more what this thread does; whoever runs it ends it without an error."""


class Signals:
    """Handlers for the time of a ``with`` block in the main thread.

    Args:
        before_exit: called before the immediate exit of a second signal; None: a second one
            changes nothing, since whoever sends it has SIGKILL as well.
    """

    def __init__(self, before_exit: Callable[[], None] | None = None) -> None:
        self._before_exit = before_exit
        self._handlers: dict[int, Any] = {}
        self._outer: Signals | None = None
        self._thread = 0
        self._number: int | None = None
        self._raised = False
        self._committed = False
        self._deferred = 0

    def __enter__(self) -> Self:
        global _present
        self._thread = threading.get_ident()
        self._outer, _present = _present, self
        for number in _NUMBERS:
            # nohup and a shell's background jobs ignore some, and mean it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *exception: object) -> None:
        global _present
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        _present = self._outer

    @property
    def number(self) -> int | None:
        """The first signal, or None."""
        return self._number

    def settle(self) -> None:
        """No signal changes any more how this process ends: all is done, its exit code settled.

        Python takes some time to end after that, in which its own handlers would end it as if
        killed.
        """
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        self._handlers.clear()

    def _arrived(self, number: int, _: FrameType | None) -> None:
        """Note the first signal; exit at the second."""
        if self._number is None:
            self._number = number
            return
        # A terminal that is closed sends SIGHUP twice: by the kernel and by the shell.
        if self._before_exit is None or number == signal.SIGHUP == self._number:
            return
        self._before_exit()
        os._exit(SIGNAL_EXIT_CODE + number)

    def _look(self) -> None:
        """Raise for the first signal, unless this is no moment for it."""
        held_back = self._committed or self._deferred or self._raised
        if self._number is not None and not held_back:
            self._raised = True
            raise Interrupted(self._number)


#: The handlers that are in force; handlers are the process's, and so is this.
_present: Signals | None = None
#: The flag of the present thread, if it works for another.
_flag: ContextVar[threading.Event | None] = ContextVar("stopped_by", default=None)


def _mine() -> Signals | None:
    """The signals in force, if they are this thread's."""
    if _present is None or _present._thread != threading.get_ident():
        return None
    return _present


def look() -> None:
    """Stop here if a signal asks for it.

    Raises:
        Interrupted: it does, and nothing holds it back.
        Stopped: this thread is to end.
    """
    if (signals := _mine()) is not None:
        signals._look()
    if (flag := _flag.get()) is not None and flag.is_set():
        raise Stopped


@contextmanager
def stopped_by(flag: threading.Event) -> Iterator[None]:
    """Have this thread's waits in the block end once a flag is set, as `look` says."""
    token = _flag.set(flag)
    try:
        yield
    finally:
        _flag.reset(token)


def commit() -> None:
    """Stop here, or not at all: what begins now is not taken back.

    Called by whoever gives something its name, or lets QEMU have a guest, right before it does.

    Raises:
        Interrupted: a signal came before.
    """
    if (signals := _mine()) is not None:
        signals._look()
        signals._committed = True


@contextmanager
def deferred() -> Iterator[None]:
    """Let signals wait until the end of the block."""
    signals = _mine()
    if signals is None:
        yield
        return
    signals._deferred += 1
    try:
        yield
    finally:
        signals._deferred -= 1


@contextmanager
def after_commit() -> Iterator[None]:
    """Let signals stop the block again, though something was committed: it adds nothing to that.

    A signal that came since `commit` counts. Whoever uses this catches `Interrupted`: what was
    committed is a success all the same.
    """
    signals = _mine()
    if signals is None:
        yield
        return
    committed, signals._committed = signals._committed, False
    try:
        yield
    finally:
        signals._committed = committed


def wait_until_ready(fd: int, event: int, *, timeout_s: float | None) -> bool:
    """Wait until ``fd`` can be read (`select.POLLIN`) or written (``POLLOUT``); look meanwhile.

    Returns:
        False if the time is over; None is no limit.

    Raises:
        Interrupted: a signal asks to stop.
    """
    poll = select.poll()
    poll.register(fd, event)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        look()
        left_s = LOOK_SECONDS if deadline is None else deadline - time.monotonic()
        if poll.poll(1000 * max(0.0, min(left_s, LOOK_SECONDS))):
            return True
        if left_s <= 0:
            return False


def take(source: queue.Queue[Item]) -> Item:
    """Take the next item of a queue; look meanwhile.

    Not of a `SimpleQueue`: a signal that comes as its time runs out makes it wait for ever (it
    goes on with what is left, and less than nothing is no limit; CPython 3.11).

    Raises:
        Interrupted: a signal asks to stop.
        Stopped: this thread is to end.
    """
    while True:
        look()
        try:
            return source.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue
