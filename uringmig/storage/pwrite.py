"""The engine of plain system calls: fallback, honest baseline, and QEMU's way.

QEMU's multifd channel does one synchronous ``pwritev`` at a time (migration/multifd-nocomp.c,
file_write_ramblock_iov in migration/file.c); so does this. More in flight needs more channels.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

from uringmig.storage.engine import Operation
from uringmig.storage.queued import Queued
from uringmig.storage.requests import Completions


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
