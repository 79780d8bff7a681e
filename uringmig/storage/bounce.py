"""An engine for memory that O_DIRECT cannot use where it lies: every request goes by a copy.

Only for buffers whose address is not aligned as the file asks (a plain numpy array starts 16 bytes
into its page). Aligned memory never passes here.
"""

from __future__ import annotations

import ctypes

import numpy as np

from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.engine import Engine, Operation
from uringmig.storage.requests import Completions, IoBatch


class BounceEngine:
    """Wraps an engine; requests of at most ``request_bytes_max`` go through ``depth`` buffers.

    The buffers are made once. Each is a request's own from its submission to its completion.
    """

    def __init__(self, inner: Engine, operation: Operation, request_bytes_max: int) -> None:
        self.depth = inner.depth
        self._inner = inner
        self._writing = operation is Operation.WRITE
        self._memory = aligned_buffer(inner.depth * request_bytes_max)
        starts = np.arange(inner.depth, dtype=np.int64) * request_bytes_max
        self._slots = (starts + self._memory.ctypes.data).tolist()
        self._busy: dict[int, tuple[int, int]] = {}  # token -> (slot address, caller's address)

    def submit(self, batch: IoBatch) -> None:
        """Copy what is to be written into free buffers and submit those instead."""
        addresses = np.empty(len(batch), np.int64)
        for index in range(len(batch)):
            slot = self._slots.pop()
            address = int(batch.address[index])
            self._busy[int(batch.token[index])] = (slot, address)
            if self._writing:
                ctypes.memmove(slot, address, int(batch.length[index]))
            addresses[index] = slot
        self._inner.submit(IoBatch(addresses, batch.length, batch.file_offset, batch.token))

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Reap from the wrapped engine; copy out what was read."""
        done = self._inner.reap(wait_count=wait_count, timeout_ns=timeout_ns)
        for token, result in zip(done.token.tolist(), done.result.tolist(), strict=True):
            slot, address = self._busy.pop(token)
            if result > 0 and not self._writing:
                ctypes.memmove(address, slot, result)
            self._slots.append(slot)
        return done

    def close(self) -> None:
        """Close the wrapped engine."""
        self._inner.close()
