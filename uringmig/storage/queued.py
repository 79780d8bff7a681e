"""Requests that wait for their engine to get round to them: the floor of the synchronous engines.

An engine that has nothing asynchronous below it does its work in ``reap``, since ``submit`` may
not block; this keeps what was submitted until then, in order.
"""

from __future__ import annotations

import numpy as np

from uringmig.storage.requests import IoBatch

_EMPTY = np.empty(0, np.int64)


class Queued:
    """A first-in, first-out queue of at most ``depth`` requests."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._batch = IoBatch(_EMPTY, _EMPTY, _EMPTY, _EMPTY)

    def submit(self, batch: IoBatch) -> None:
        """Append the requests of ``batch``."""
        old = self._batch
        self._batch = IoBatch(
            address=np.concatenate((old.address, batch.address)),
            length=np.concatenate((old.length, batch.length)),
            file_offset=np.concatenate((old.file_offset, batch.file_offset)),
            token=np.concatenate((old.token, batch.token)),
        )
        assert len(self._batch) <= self.depth, "more requests in flight than the depth"

    def take(self, count: int) -> IoBatch:
        """Remove and return the oldest ``count`` requests, or all if there are fewer."""
        old = self._batch
        self._batch = IoBatch(
            old.address[count:], old.length[count:], old.file_offset[count:], old.token[count:]
        )
        return IoBatch(
            old.address[:count], old.length[:count], old.file_offset[:count], old.token[:count]
        )

    def take_all(self) -> IoBatch:
        """Remove and return everything queued."""
        return self.take(len(self._batch))

    def close(self) -> None:
        """Nothing is held."""
