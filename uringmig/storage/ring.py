"""The io_uring engine: a batch of entries by a few vector stores, one system call to submit it.

Rules: made, used and closed in one thread (SINGLE_ISSUER). Results are integers, never exceptions.
Completion entries are copied out before their slots go back to the kernel. With DEFER_TASKRUN
completions appear only when this thread enters the kernel, so `reap` always does.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import HostError, LimitError, StorageError, explained
from uringmig.storage import liburing
from uringmig.storage.engine import Operation
from uringmig.storage.requests import Completions, IoBatch

SQE_DTYPE: Final = cast("np.dtype[np.void]", np.dtype(liburing.SubmissionEntry))
CQE_DTYPE: Final = cast("np.dtype[np.void]", np.dtype(liburing.CompletionEntry))
#: Tried in this order; a kernel that does not know a flag says EINVAL (io_uring_setup(2)).
SETUP_FLAGS: Final = (
    liburing.IORING_SETUP_SINGLE_ISSUER | liburing.IORING_SETUP_DEFER_TASKRUN,
    liburing.IORING_SETUP_COOP_TASKRUN,
    0,
)
#: Not failures: nothing was ready in time, a signal came, or the kernel wants completions reaped
#: before it takes more (EBUSY, EAGAIN); what was not taken stays in the ring for the next call.
_PASSING: Final = frozenset({errno.ETIME, errno.EINTR, errno.EBUSY, errno.EAGAIN})


class RingEngine:
    """One io_uring instance on one descriptor, for one direction.

    Args:
        fd: an open descriptor; O_DIRECT asks for aligned requests, as always.
        operation: read or write.
        depth: most requests in flight.

    Raises:
        HostError: io_uring or liburing cannot be had here.
    """

    def __init__(self, fd: int, operation: Operation, depth: int) -> None:
        self.depth = depth
        self._fd = fd
        reading = operation is Operation.READ
        self._opcode = liburing.IORING_OP_READ if reading else liburing.IORING_OP_WRITE
        library = liburing.load()
        self._calls = library.handle
        self._ring = liburing.IoUring()
        self._reference = ctypes.byref(self._ring)
        self.setup_flags = self._set_up(library, entries=1 << (depth - 1).bit_length())
        sq, cq = self._ring.sq, self._ring.cq
        self._sqes = _view(sq.sqes, sq.ring_entries, SQE_DTYPE)
        self._cqes = _view(cq.cqes, cq.ring_entries, CQE_DTYPE)
        self._cq_head = ctypes.c_uint.from_address(cq.khead)
        self._count = np.arange(cq.ring_entries, dtype=np.int64)
        self._in_flight = 0

    def submit(self, batch: IoBatch) -> None:
        """Fill entries for ``batch`` and give them to the kernel."""
        self._in_flight += len(batch)
        assert self._in_flight <= self.depth, "more requests in flight than the depth"
        entries = np.zeros(len(batch), SQE_DTYPE)
        entries["opcode"] = self._opcode
        entries["fd"] = self._fd
        entries["addr"] = batch.address
        entries["len"] = batch.length
        entries["off"] = batch.file_offset
        entries["user_data"] = batch.token
        sq = self._ring.sq
        tail: int = sq.sqe_tail
        self._sqes[(tail + self._count[: len(batch)]) & sq.ring_mask] = entries
        sq.sqe_tail = (tail + len(batch)) & 0xFFFFFFFF
        self._check(self._calls.io_uring_submit(self._reference))

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Enter the kernel, wait if asked, and copy out every completion there is."""
        if wait_count > 0:
            seconds, nanoseconds = divmod(timeout_ns, 1_000_000_000)
            result = self._calls.io_uring_submit_and_wait_timeout(
                self._reference,
                ctypes.byref(ctypes.c_void_p()),
                min(wait_count, self._in_flight),
                ctypes.byref(liburing.Timespec(seconds, nanoseconds)),
                None,
            )
        else:
            result = self._calls.io_uring_get_events(self._reference)
        self._check(result)
        ready = self._calls.io_uring_cq_ready(self._reference)
        head = self._cq_head.value
        done = self._cqes[(head + self._count[:ready]) & self._ring.cq.ring_mask]
        self._calls.io_uring_cq_advance(self._reference, ready)
        self._in_flight -= ready
        return Completions(
            token=done["user_data"].astype(np.int64), result=done["res"].astype(np.int64)
        )

    def close(self) -> None:
        """Tear the ring down; nothing may be in flight, since the kernel would still use it."""
        assert self._in_flight == 0, "a ring was closed with requests in flight"
        del self._sqes, self._cqes, self._cq_head
        self._calls.io_uring_queue_exit(self._reference)

    def _set_up(self, library: liburing.Library, *, entries: int) -> int:
        """Make the ring with the best flags this kernel knows; return them."""
        reason, kind = None, HostError
        for flags in SETUP_FLAGS:
            try:
                liburing.queue_init(library, entries, self._ring, flags)
            except OSError as error:
                reason = error.strerror
                kind = LimitError if isinstance(explained(error), LimitError) else HostError
                if error.errno != errno.EINVAL:
                    break
            else:
                return flags
        raise kind(f"io_uring: a ring of {entries} entries failed: {reason}")

    @staticmethod
    def _check(result: int) -> None:
        """Raise for what io_uring_enter(2) gives only when the ring itself is unusable."""
        if result < 0 and -result not in _PASSING:
            raise StorageError(f"io_uring_enter failed ({os.strerror(-result)})", errno=-result)


def _view(address: int, count: int, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """Look at ``count`` structures at ``address``, in memory somebody else owns."""
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype)
