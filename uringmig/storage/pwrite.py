"""The engine of plain system calls: fallback, honest baseline, and QEMU's way.

QEMU's multifd channel does one synchronous ``pwritev`` at a time (migration/multifd-nocomp.c,
file_write_ramblock_iov in migration/file.c); so does this. More in flight needs more channels.

Nothing asynchronous lies below such an engine, and ``submit`` may not block: `Queued` keeps what
was submitted, in order, until ``reap`` does it.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

from uringmig.storage.engine import Operation
from uringmig.storage.requests import Completions, IoBatch

_EMPTY = np.empty(0, np.int64)


class Queued:
    """What synchronous engines stand on: a queue, in order, of at most ``depth`` requests."""

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


class PwriteEngine(Queued):
    """``pwritev`` or ``preadv``, one request after the other, in the calling thread.

    Short counts and errors are passed on as they are: retrying is the transfer's business.
    """

    def __init__(self, fd: int, operation: Operation, depth: int) -> None:
        super().__init__(depth)
        self._fd = fd
        self._call = os.pwritev if operation is Operation.WRITE else os.preadv

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Do as many requests as are waited for, one at least; nothing is cut short by time."""
        batch = self.take(max(1, wait_count))
        result = np.empty(len(batch), np.int64)
        for index in range(len(batch)):
            # The address stays valid until the completion, by the contract of Engine.
            memory = (ctypes.c_char * int(batch.length[index])).from_address(
                int(batch.address[index])
            )
            try:
                result[index] = self._call(self._fd, [memory], int(batch.file_offset[index]))
            except OSError as error:
                result[index] = -(error.errno or 0)
        return Completions(token=batch.token, result=result)
