"""Engines without a disk, for tests and for timing what lies above: one forgets, one copies."""

from __future__ import annotations

import ctypes
import errno

import numpy as np
from numpy.typing import NDArray

from uringmig.storage.engine import Operation
from uringmig.storage.pwrite import Queued
from uringmig.storage.requests import Completions, IoBatch


class NullEngine(Queued):
    """Completes every request whole without moving a byte."""

    def __init__(self, fd: int, operation: Operation, depth: int) -> None:
        super().__init__(depth)

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Return all that was submitted."""
        batch: IoBatch = self.take_all()
        return Completions(token=batch.token, result=batch.length)


class MemoryEngine(Queued):
    """Copies between memory and ``storage``, a writable uint8 array that plays the file.

    A write past its end is ENOSPC; a read past its end is short, as with a file.
    """

    def __init__(self, storage: NDArray[np.uint8], operation: Operation, depth: int) -> None:
        super().__init__(depth)
        self._storage = storage
        self._operation = operation

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Copy all that was submitted."""
        batch = self.take_all()
        result = np.empty(len(batch), np.int64)
        for index in range(len(batch)):
            result[index] = self._move(
                int(batch.address[index]), int(batch.length[index]), int(batch.file_offset[index])
            )
        return Completions(token=batch.token, result=result)

    def _move(self, address: int, length: int, file_offset: int) -> int:
        """Copy one request; return the bytes moved or -errno."""
        available = max(0, len(self._storage) - file_offset)
        inside = self._storage.ctypes.data + file_offset
        if self._operation is Operation.WRITE:
            if available < length:
                return -errno.ENOSPC
            ctypes.memmove(inside, address, length)
            return length
        count = min(length, available)
        ctypes.memmove(address, inside, count)
        return count
