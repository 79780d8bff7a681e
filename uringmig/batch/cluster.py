"""Orders carried out by dask's workers: each on the host where its VM is, told to one runner.

A job for host NAME runs on a worker with the resource ``host:NAME``; one for no host, on any. The
order is one dask task, which starts a worker process of ours beside dask's and passes on what it
says; so a job's timeout, its clean end and its sudden one are the same as without a scheduler.
Archives lie on a file system that the runner and the workers share.

A dask worker that dies takes its job's process with it (whose socket closes). The scheduler would
give the task to another worker by itself; we see the death first, take the task back, and let the
runner count the attempt.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from distributed import Client, Event, Future, get_worker

from uringmig.batch.messages import (
    MESSAGE_DECODER,
    ORDER_DECODER,
    Message,
    Order,
    Outcome,
    lost,
)
from uringmig.batch.pool import LocalPool
from uringmig.errors import BusyError, PeerError, UringmigError

#: A scheduler that does not answer within this is not there.
_CONNECT_SECONDS: Final = 10.0
#: How old what we know of the cluster may be: a worker that died is noticed within this.
_LOOK_SECONDS: Final = 1.0
_RELAY_SECONDS: Final = 0.5
_RESOURCE: Final = "host:"

# Its tracebacks on standard error say of a lost connection what our one line says.
for _name in ("distributed", "distributed.client"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


@dataclass(slots=True)
class _Task:
    """One order on its way.

    Attributes:
        worker: dask's address of the worker that has begun it, or None.
    """

    future: Future
    host: str | None
    stop: Event
    worker: str | None = None


class ClusterPool:
    """The workers of a dask scheduler; see `Pool`.

    Args:
        address: of the scheduler, ``tcp://HOST:PORT``.

    Raises:
        BusyError: there is no scheduler at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            self._client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise BusyError(f"{address}: no dask scheduler: {error}") from None
        self._tasks: dict[str, _Task] = {}
        # No SimpleQueue: a signal that comes as its time runs out makes it wait for ever.
        self._heard: queue.Queue[bytes | tuple[str, str]] = queue.Queue()
        self._topic = f"uringmig-{uuid.uuid4().hex}"
        self._client.subscribe_topic(self._topic, self._hear)
        self._workers: Mapping[str, Mapping[str, Any]] = {}
        self._looked_at = float("-inf")

    def refusal(self, host: str | None) -> UringmigError | None:
        """No worker offers the host; one may still come."""
        if self._slots(host):
            return None
        wanted = (
            "dask worker" if host is None else f"dask worker with the resource {_RESOURCE}{host}"
        )
        return BusyError(f"there is no {wanted}")

    def has_room(self, host: str | None) -> bool:
        """Fewer orders than the workers of this host have slots."""
        return sum(task.host == host for task in self._tasks.values()) < self._slots(host)

    def submit(self, order: Order, *, host: str | None) -> None:
        """Make it a task of its own, which no other run's can be taken for."""
        name = f"uringmig-{uuid.uuid4().hex}"
        future = self._client.submit(
            relay,
            msgspec.json.encode(order),
            self._topic,
            name,
            key=name,
            pure=False,
            resources={} if host is None else {_RESOURCE + host: 1},
        )
        self._tasks[order.key] = _Task(future, host, Event(name, client=self._client))
        key = order.key
        future.add_done_callback(lambda _: self._heard.put(("ended", key)))

    def poll(self, timeout_s: float) -> list[Message]:
        """Progress and outcomes; an outcome for every order whose dask worker is gone."""
        messages: list[Message] = []
        deadline = time.monotonic() + timeout_s
        while not messages:
            messages += self._lost()
            left = deadline - time.monotonic()
            try:
                heard = self._heard.get(timeout=max(0.0, min(left, _LOOK_SECONDS)))
            except queue.Empty:
                if left <= 0:
                    break
                continue
            messages += self._understand(heard)
        return messages

    def stop(self, key: str, *, at_once: bool) -> None:
        """Tell the task, or take it back: its process is killed then."""
        task = self._tasks.get(key)
        if task is None:
            return
        if at_once:
            self._forget(key)
            self._heard.put(("taken", key))
        else:
            task.stop.set()

    def close(self) -> None:
        """Take every task back and leave."""
        for key in list(self._tasks):
            self._forget(key)
        self._client.close()

    def _understand(self, heard: bytes | tuple[str, str]) -> list[Message]:
        """A worker's message, or the end of a task."""
        if isinstance(heard, bytes):
            message = MESSAGE_DECODER.decode(heard)
            return [message] if message.key in self._tasks else []
        what, key = heard
        if what == "taken":
            return [lost(key, "its dask worker was told to end it", may_pass=True)]
        task = self._tasks.pop(key, None)
        if task is None:
            return []
        if task.future.status == "finished":
            message = MESSAGE_DECODER.decode(task.future.result(timeout=_CONNECT_SECONDS))
            assert isinstance(message, Outcome), "a task ends with an outcome"
            return [message]
        error = task.future.exception(timeout=_CONNECT_SECONDS)
        return [lost(key, f"its dask task failed: {error}", may_pass=True)]

    def _lost(self) -> list[Message]:
        """Outcomes of orders whose worker the scheduler no longer knows, or that have none."""
        self._look()
        messages: list[Message] = []
        for key, task in list(self._tasks.items()):
            if task.worker is not None and task.worker not in self._workers:
                self._forget(key)
                messages.append(lost(key, f"dask worker {task.worker} is gone", may_pass=True))
            elif task.worker is None and not self._slots(task.host):
                # It died before it said that it had begun: the task would wait for another one.
                self._forget(key)
                messages.append(lost(key, "the dask worker for it is gone", may_pass=True))
        return messages

    def _forget(self, key: str) -> None:
        """Take a task back; the scheduler tells whichever worker has it."""
        task = self._tasks.pop(key)
        with contextlib.suppress(OSError, TimeoutError):
            task.future.cancel()

    def _hear(self, event: tuple[float, Any]) -> None:
        """Take in an event; called in the client's own thread."""
        told = event[1]
        if "message" in told:
            self._heard.put(told["message"].encode())
        elif (task := self._tasks.get(told["key"])) is not None:
            task.worker = told["worker"]

    def _slots(self, host: str | None) -> int:
        """How many orders for a host the cluster carries out at once."""
        self._look()
        if host is None:
            return len(self._workers)
        name = _RESOURCE + host
        return int(sum(one["resources"].get(name, 0) for one in self._workers.values()))

    def _look(self) -> None:
        """Ask the scheduler for its workers, unless that was just done."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        try:
            # With a limit: while the connection is lost the client would wait for ever.
            found = self._client.sync(
                self._client.scheduler.identity, n_workers=-1, callback_timeout=_CONNECT_SECONDS
            )
        except (OSError, TimeoutError) as error:
            raise PeerError(f"the dask scheduler went away: {error}") from None
        self._workers = found["workers"]
        self._looked_at = time.monotonic()


def relay(encoded: bytes, topic: str, name: str) -> bytes:
    """Carry out one order beside a dask worker, as its task; returns the encoded outcome.

    Args:
        encoded: the order.
        topic: where progress is told.
        name: of the task, and of the event that asks it to stop.
    """
    order = ORDER_DECODER.decode(encoded)
    worker = get_worker()
    stop = Event(name)
    # Dask adds the worker's address to what is told.
    worker.log_event(topic, {"key": order.key})
    pool = LocalPool(1)
    told = False
    try:
        pool.submit(order, host=None)
        while True:
            for message in pool.poll(_RELAY_SECONDS):
                text = msgspec.json.encode(message)
                if isinstance(message, Outcome):
                    return text
                worker.log_event(topic, {"message": text.decode()})
            task = worker.state.tasks.get(name)
            if task is None or task.state == "cancelled":
                # Nobody waits for it any more: the runner took it back, or is gone.
                pool.stop(order.key, at_once=True)
            elif not told and stop.is_set():
                told = True
                pool.stop(order.key, at_once=False)
    finally:
        pool.close()
