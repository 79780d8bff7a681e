"""Engines that go wrong on purpose, and one that keeps a record; they wrap any engine.

A fault is scripted: one outcome for each request in the order of submission, by hand or drawn from
a seed. Completions may be held back and come in another order. They do nothing that no
kernel does: no completion comes twice, none is lost, and none says more than was asked.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from uringmig.storage.engine import Engine, EngineFactory, Operation
from uringmig.storage.requests import Completions, IoBatch

#: An outcome: the request is left alone.
WHOLE: Final = 1 << 62
#: A device moves whole sectors. Of a short count only these reach the wrapped engine, so whoever
#: goes on beyond the last aligned byte leaves a hole behind that a test will see.
_SECTOR_BYTES: Final = 512


def random_outcomes(
    seed: int, *, short: float = 0.3, passing: float = 0.2, block_bytes: int = 1 << 20
) -> Iterator[int]:
    """Give endless outcomes none of which may be fatal: whole, short, empty, EAGAIN, EINTR.

    Args:
        seed: the same seed gives the same outcomes.
        short: share of requests cut short, to anything below ``block_bytes``.
        passing: share of requests refused with EAGAIN or EINTR, or with nothing moved.
        block_bytes: about as long as the longest request.
    """
    source = random.Random(seed)
    while True:
        dice = source.random()
        if dice < short:
            yield source.randrange(block_bytes)
        elif dice < short + passing:
            yield source.choice((-errno.EAGAIN, -errno.EINTR, 0))
        else:
            yield WHOLE


class FaultEngine:
    """Gives requests the outcomes of a script; whole ones when it has come to its end.

    An outcome is `WHOLE`, a count of bytes (short where it is below the request's length), or
    ``-errno``, with which nothing is moved.

    Args:
        inner: does what is left to be done.
        script: outcomes, in the order of submission.
        seed: completions come in a random order, each held back for up to ``hold_max`` reaps.
        hold_max: 0 is no delay.
    """

    def __init__(
        self,
        inner: Engine,
        script: Iterable[int] = (),
        *,
        seed: int | None = None,
        hold_max: int = 0,
    ) -> None:
        self.depth = inner.depth
        self._inner = inner
        self._script = iter(script)
        self._random = None if seed is None else random.Random(seed)
        self._hold_max = hold_max
        self._claimed: dict[int, int] = {}  # token -> the result to give instead of the real one
        self._held: list[tuple[int, int, int]] = []  # reaps to wait for, token, result
        self._below = 0  # requests the wrapped engine has

    def submit(self, batch: IoBatch) -> None:
        """Draw an outcome for each request, and pass on what is to be moved."""
        lengths = batch.length.copy()
        for index, (token, length) in enumerate(
            zip(batch.token.tolist(), batch.length.tolist(), strict=True)
        ):
            outcome = next(self._script, WHOLE)
            if outcome >= length:
                continue
            lengths[index] = max(outcome, 0) // _SECTOR_BYTES * _SECTOR_BYTES
            if lengths[index] > 0:
                self._claimed[token] = outcome
            else:
                self._hold(token, outcome)
        chosen = np.flatnonzero(lengths)  # cut ones go down too: a short write moves something
        self._below += len(chosen)
        if len(chosen):
            self._inner.submit(
                IoBatch(
                    batch.address[chosen],
                    lengths[chosen],
                    batch.file_offset[chosen],
                    batch.token[chosen],
                )
            )

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Reap from the wrapped engine, and let go of what has been held back long enough."""
        if self._below:
            done = self._inner.reap(wait_count=min(wait_count, self._below), timeout_ns=timeout_ns)
            self._below -= len(done)
            for token, result in zip(done.token.tolist(), done.result.tolist(), strict=True):
                claimed = self._claimed.pop(token, None)
                self._hold(token, result if claimed is None or result < 0 else claimed)
        ready = [(token, result) for wait, token, result in self._held if wait <= 0]
        self._held = [(wait - 1, token, result) for wait, token, result in self._held if wait > 0]
        if self._random is not None:
            self._random.shuffle(ready)
        return Completions(
            token=np.array([token for token, _ in ready], np.int64),
            result=np.array([result for _, result in ready], np.int64),
        )

    def close(self) -> None:
        """Close the wrapped engine."""
        assert not self._held, "closed with completions that nobody has seen"
        self._inner.close()

    def _hold(self, token: int, result: int) -> None:
        """Keep a result back for a while."""
        wait = 0 if self._random is None else self._random.randint(0, self._hold_max)
        self._held.append((wait, token, result))


class RequestLog:
    """What engines were asked for and what was in flight together; shared by several threads.

    Attributes:
        requests: (file offset, length) in the order of submission.
        results: (file offset, result) in the order of completion.
        overlaps: pairs of requests, of any engine, that overlapped in the file while in flight.
        count_max: most requests in flight at a time, over all engines.
        bytes_max: most bytes in flight at a time, over all engines.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []
        self.results: list[tuple[int, int]] = []
        self.overlaps: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.count_max = 0
        self.bytes_max = 0
        self._lock = threading.Lock()
        self._flying: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def in_flight(self) -> int:
        """Requests in flight now, over all engines."""
        return len(self._flying)

    def start(self, engine: int, token: int, request: tuple[int, int]) -> None:
        """Note a request on its way down; ``engine`` and ``token`` together name it."""
        offset, length = request
        with self._lock:
            self.requests.append(request)
            for other in self._flying.values():
                if offset < other[0] + other[1] and other[0] < offset + length:
                    self.overlaps.append((other, request))
            assert (engine, token) not in self._flying, "a token was used twice at a time"
            self._flying[engine, token] = request
            self.count_max = max(self.count_max, len(self._flying))
            flying_bytes = sum(length for _, length in self._flying.values())
            self.bytes_max = max(self.bytes_max, flying_bytes)

    def end(self, engine: int, token: int, result: int) -> None:
        """Note a completion."""
        with self._lock:
            offset, _ = self._flying.pop((engine, token))
            self.results.append((offset, result))


class RecordingEngine:
    """Passes everything on, and keeps a record of it in a log."""

    def __init__(self, inner: Engine, log: RequestLog) -> None:
        self.depth = inner.depth
        self._inner = inner
        self._log = log

    def submit(self, batch: IoBatch) -> None:
        """Note the requests, then pass them on."""
        for token, offset, length in zip(
            batch.token.tolist(), batch.file_offset.tolist(), batch.length.tolist(), strict=True
        ):
            self._log.start(id(self), token, (offset, length))
        self._inner.submit(batch)

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Reap, and note what has ended."""
        done = self._inner.reap(wait_count=wait_count, timeout_ns=timeout_ns)
        for token, result in zip(done.token.tolist(), done.result.tolist(), strict=True):
            self._log.end(id(self), token, result)
        return done

    def close(self) -> None:
        """Close the wrapped engine."""
        self._inner.close()


def recorded(factory: EngineFactory, log: RequestLog) -> EngineFactory:
    """Let every engine of ``factory`` keep its record in ``log``."""

    def make(fd: int, operation: Operation, depth: int) -> Engine:
        return RecordingEngine(factory(fd, operation, depth), log)

    return make


def faulty(
    factory: EngineFactory,
    script_of: Callable[[int], Iterable[int]],
    *,
    seed: int | None = None,
    hold_max: int = 0,
) -> EngineFactory:
    """Let every engine of ``factory`` follow a script.

    Args:
        factory: makes the engines to be wrapped.
        script_of: the script of the n-th engine made, from 0.
        seed: as for `FaultEngine`; every engine has a seed of its own derived from it.
        hold_max: as for `FaultEngine`.
    """
    lock = threading.Lock()
    made = 0

    def make(fd: int, operation: Operation, depth: int) -> Engine:
        nonlocal made
        with lock:
            number, made = made, made + 1
        return FaultEngine(
            factory(fd, operation, depth),
            script_of(number),
            seed=None if seed is None else seed + number,
            hold_max=hold_max,
        )

    return make
