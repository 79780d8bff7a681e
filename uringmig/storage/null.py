"""The engine that accepts and forgets: times everything above storage."""

from __future__ import annotations

from uringmig.storage.engine import Operation
from uringmig.storage.queued import Queued
from uringmig.storage.requests import Completions, IoBatch


class NullEngine(Queued):
    """Completes every request whole without moving a byte."""

    def __init__(self, fd: int, operation: Operation, depth: int) -> None:
        super().__init__(depth)

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Return all that was submitted."""
        batch: IoBatch = self.take_all()
        return Completions(token=batch.token, result=batch.length)
