"""A worker process: takes orders from its socket, one after the other, and says how they end.

Run as ``python -m uringmig.batch FD``. SIGTERM stops the order in hand cleanly, after which
the process ends. If the socket closes, whoever gave the order is gone: the process ends at once,
as if it had been killed; what it was writing has no final name, and QEMU, whose stream closes, lets
its guest run on.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Final, NoReturn

import msgspec

from uringmig.batch.attempt import carry_out
from uringmig.batch.memory import OwnMemory
from uringmig.batch.messages import (
    ORDER_DECODER,
    Message,
    Order,
    OrderResult,
    Outcome,
    Progress,
    failure,
)
from uringmig.errors import UringmigError, explained
from uringmig.progress import Snapshot
from uringmig.signals import Interrupted, Signals, look
from uringmig.units import KiB

CarryOut = Callable[[Order, Callable[[Snapshot], None]], OrderResult]

_READ_BYTES: Final = 64 * KiB


def serve(connection: socket.socket, work: CarryOut) -> None:
    """Carry out orders until the other side closes or an order is stopped.

    Raises:
        RuntimeError: this host gives no thread to listen with.
    """
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    while True:
        order = orders.get()
        # A second SIGTERM is no request to hurry: a service manager and the runner send one each.
        with Signals() as signals:
            _send(connection, attempt(order, work, lambda message: _send(connection, message)))
        if signals.number is not None:
            return


def attempt(order: Order, work: CarryOut, say: Callable[[Message], None]) -> Outcome:
    """Carry out one order; errors, and signals if there are handlers, become outcomes.

    Args:
        order: what to do.
        work: does it, and returns the outcome's result.
        say: called with progress.
    """
    memory = OwnMemory()

    def tell(snapshot: Snapshot) -> None:
        look()
        memory.look()
        say(Progress(key=order.key, snapshot=snapshot))

    try:
        outcome = Outcome(key=order.key, ending="done", result=work(order, tell))
    except UringmigError as error:
        outcome = failure(order.key, error)
    except Interrupted as interrupted:
        outcome = Outcome(
            key=order.key, ending="stopped", kind="Interrupted", error=str(interrupted)
        )
    except Exception as error:
        reason = explained(error)
        if reason is None:
            raise
        outcome = failure(order.key, reason)
    memory.look()
    worker = f"{socket.gethostname()}:{os.getpid()}"
    return msgspec.structs.replace(outcome, peak_bytes=memory.peak_bytes, worker=worker)


def _listen(connection: socket.socket, orders: queue.SimpleQueue[Order]) -> None:
    """Put orders into the queue; end the process when there can be no more."""
    unread = b""
    while True:
        try:
            data = connection.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            os._exit(1)
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            orders.put(ORDER_DECODER.decode(line))


def _send(connection: socket.socket, message: Message) -> None:
    """Send a message; if nobody is there any more, `_listen` notices."""
    try:
        connection.sendall(msgspec.json.encode(message) + b"\n")
    except OSError:
        return


def main() -> NoReturn:
    """Serve on the socket whose descriptor is the argument, and exit."""
    # Ctrl-C is the runner's business; it tells us by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])), carry_out)
    sys.exit()
