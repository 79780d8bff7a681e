"""SIGINT, SIGTERM and SIGHUP as an exception in the main thread, so that cleaning up happens.

The first signal raises `Interrupted`; context managers then remove the partial file and give the
guest back. It is not raised where it would be lost or would tear a clean-up apart: inside a
clean-up, or inside a callback of the event loop, whose background tasks would swallow it. It then
waits until that is over. A second signal exits at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Self

#: What a shell reports for a process that a signal ended: this plus the signal's number.
SIGNAL_EXIT_CODE: Final = 128
_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Functions within which nothing is raised: clean-ups, `Thread.join` in one, `Handle._run` of
#: asyncio, and finalizers, which swallow exceptions.
_SHIELDED: Final = frozenset({"__exit__", "close", "_fail", "join", "_join", "_run", "__del__"})
#: How soon to try again after a shielded moment.
_AGAIN_SECONDS: Final = 0.02


class Interrupted(BaseException):
    """A signal asks to stop; no `Exception`, so that nothing takes it for an error of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


class Signals:
    """Handlers for the time of a ``with`` block in the main thread; SIGALRM is used too.

    Args:
        before_exit: called before the immediate exit of a second signal.
    """

    def __init__(self, before_exit: Callable[[], None] = lambda: None) -> None:
        self._before_exit = before_exit
        self._previous: dict[int, Any] = {}
        self._number: int | None = None
        self._held = False

    def __enter__(self) -> Self:
        for number in _NUMBERS:
            # nohup and a shell's background jobs ignore some, and mean it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._arrived)
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._again)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int | None:
        """The first signal, or None; for whoever has it held and asks by itself."""
        return self._number

    def hold(self) -> None:
        """From now on only note a first signal: what goes on is past the point of return."""
        self._held = True

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        """Raise for the first signal, exit for the second."""
        if self._number is not None:
            # A terminal that is closed sends SIGHUP twice: by the kernel and by the shell.
            if number == signal.SIGHUP == self._number:
                return
            self._before_exit()
            os._exit(SIGNAL_EXIT_CODE + number)
        self._number = number
        self._again(number, frame)

    def _again(self, _: int, frame: FrameType | None) -> None:
        """Raise, unless this is no moment for it."""
        if self._held or self._number is None:
            return
        if _is_shielded(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
            return
        raise Interrupted(self._number)


def ignore() -> None:
    """No signal changes any more how this process ends: all is done, and its exit code is settled.

    Python takes some time to end after that, in which its own handlers would end it as if killed.
    """
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _is_shielded(frame: FrameType | None) -> bool:
    """Say whether a frame or a caller of it must not be torn apart."""
    while frame is not None:
        if frame.f_code.co_name in _SHIELDED:
            return True
        frame = frame.f_back
    return False
