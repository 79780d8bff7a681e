"""Worker processes of this host: orders to them, what they say, and how they end.

A worker is a process of its own with one socket to us, so that a crash, a hang or a `kill -9` ends
one attempt and nothing else. It serves one order at a time and leaves when our end of the socket
closes, which the kernel does however we end.
"""

from __future__ import annotations

import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from uringmig.batch.messages import MESSAGE_DECODER, Message, Order, Outcome, lost
from uringmig.errors import LimitError, StateError, UringmigError, explained
from uringmig.units import MiB

WORKER_COMMAND: Final = (sys.executable, "-m", "uringmig.batch")
_READ_BYTES: Final = 64 << 10
#: A message is a few KiB; a worker that sends more in one line is broken.
_LINE_BYTES_MAX: Final = MiB
_ENDING_SECONDS: Final = 5.0


class Pool(Protocol):
    """Somewhere orders are carried out; one order at a time for each worker."""

    def refusal(self, host: str | None) -> UringmigError | None:
        """Why an order for a host cannot be carried out as things are, or None."""

    def has_room(self, host: str | None) -> bool:
        """Say whether an order for a host would be begun at once."""

    def submit(self, order: Order, *, host: str | None) -> None:
        """Have an order carried out; call only after `has_room` said so."""

    def poll(self, timeout_s: float) -> list[Message]:
        """What the workers have said; waits for something at most so long."""

    def stop(self, key: str, *, at_once: bool) -> None:
        """Ask an order's worker to clean up and stop, or end it; its outcome still comes."""

    def close(self) -> None:
        """End every worker."""


class LocalPool:
    """At most ``workers`` processes of this host, started when they are first needed."""

    def __init__(self, workers: int, *, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._workers_max = workers
        self._command = command
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._unstarted: list[Message] = []

    def refusal(self, host: str | None) -> UringmigError | None:
        """Another host's jobs need a scheduler."""
        if host in (None, socket.gethostname()):
            return None
        return StateError(f"the job is for host {host!r}, which only --scheduler reaches")

    def has_room(self, host: str | None) -> bool:
        """Any host's order runs here: without a scheduler there is no other."""
        return sum(worker.key is not None for worker in self._workers) < self._workers_max

    def submit(self, order: Order, *, host: str | None) -> None:
        """Give it to an idle worker, or to a new one."""
        idle = [worker for worker in self._workers if worker.key is None]
        try:
            worker = idle[0] if idle else self._start()
        except OSError as error:
            reason = explained(error) or error
            why = f"no worker process can be started: {reason}"
            # When those that run now have ended there may be room: this may pass.
            self._unstarted.append(lost(order.key, why, kind=LimitError.__name__, may_pass=True))
        else:
            worker.give(order)

    def poll(self, timeout_s: float) -> list[Message]:
        """Messages, and an outcome for every order whose worker has died."""
        messages, self._unstarted = self._unstarted, []
        for key, _ in self._selector.select(0.0 if messages else timeout_s):
            worker: _Worker = key.data
            messages += worker.read()
            if worker.ended:
                messages += self._bury(worker)
        return messages

    def stop(self, key: str, *, at_once: bool) -> None:
        """SIGTERM or SIGKILL."""
        for worker in self._workers:
            if worker.key == key:
                worker.killed = worker.killed or at_once
                worker.process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)

    def close(self) -> None:
        """Let idle workers leave, end the others, and wait for all."""
        for worker in self._workers:
            if worker.key is not None:
                worker.process.kill()
            worker.connection.close()
        deadline = time.monotonic() + _ENDING_SECONDS
        for worker in self._workers:
            worker.wait(until=deadline)
        self._workers.clear()
        self._selector.close()

    def _start(self) -> _Worker:
        """Start a worker."""
        worker = _Worker(self._command)
        self._workers.append(worker)
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        return worker

    def _bury(self, worker: _Worker) -> list[Message]:
        """Take leave of a worker whose socket has closed."""
        self._selector.unregister(worker.connection)
        self._workers.remove(worker)
        worker.connection.close()
        code = worker.wait(until=time.monotonic() + _ENDING_SECONDS)
        return [] if worker.key is None else [_death(worker, worker.key, code)]


def _death(worker: _Worker, key: str, code: int) -> Outcome:
    """The outcome of an order whose worker has ended with an exit code, or by signal -code."""
    who = f"worker process {worker.process.pid}"
    if code == -signal.SIGKILL and not worker.killed:
        # It may also have been an operator, who knows then that it was not memory.
        why = (
            f"{who} was killed (SIGKILL), perhaps because memory ran out: see the kernel's log, "
            "and the service's MemoryMax= or the container's limit"
        )
        return lost(key, why, kind=LimitError.__name__, may_pass=True)
    if code < 0:
        why = f"{who} was ended by {signal.Signals(-code).name}"
        return lost(key, why, may_pass=True)
    if code == LimitError.exit_code:
        why = f"{who} could not begin: this host lets it have too little memory, threads or files"
        return lost(key, why, kind=LimitError.__name__, may_pass=True)
    # A traceback of ours, on standard error: the next attempt would end the same way.
    return lost(key, f"{who} ended with exit code {code}", may_pass=False)


class _Worker:
    """One process, and our end of its socket.

    Attributes:
        key: of the order in hand, or None.
        killed: by us.
        ended: its socket has closed.

    Raises:
        OSError: the host lets us have no further process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            # In a process group of its own: Ctrl-C is for us, and we tell the workers.
            try:
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,
                )
            except BaseException:
                self.connection.close()
                raise
        self.connection.setblocking(False)
        self.key: str | None = None
        self.killed = False
        self.ended = False
        self._unread = b""

    def give(self, order: Order) -> None:
        """Send an order; if the worker is already gone, its socket says so at the next read."""
        self.key = order.key
        self.connection.setblocking(True)
        try:
            self.connection.sendall(msgspec.json.encode(order) + b"\n")
        except OSError:
            return
        finally:
            self.connection.setblocking(False)

    def read(self) -> list[Message]:
        """Whole messages that have come."""
        try:
            data = self.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.ended = not data
        *lines, self._unread = (self._unread + data).split(b"\n")
        try:
            messages = [MESSAGE_DECODER.decode(line) for line in lines]
        except msgspec.DecodeError:
            messages, self.ended = [], True
        if len(self._unread) > _LINE_BYTES_MAX:
            self.ended = True
        if any(isinstance(message, Outcome) for message in messages):
            self.key = None
        return messages

    def wait(self, *, until: float) -> int:
        """Wait for the process, with force from a moment on; -N says that signal N ended it."""
        try:
            return self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
