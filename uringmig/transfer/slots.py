"""Which requests are in flight, and what each result means.

Rules: no fd, no clock, no thread here. A slot is busy from take() until the complete() that ends
its request. After the first failure nothing new is taken, and what is in flight is drained. A
short result is never a failure: the rest is issued again, from the last aligned byte.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from msgspec import Struct

from uringmig.storage.requests import Completions, IoBatch, IoPlan
from uringmig.units import align_down

#: Attempts in a row without a byte moved before EAGAIN, EINTR or an empty write is given up. The
#: channel pauses between them, some four seconds in all: longer than any passing shortage of tags.
RETRIES_MAX: Final = 40
_RETRIED: Final = frozenset({errno.EAGAIN, errno.EINTR})


class TransferFailure(Struct, frozen=True):
    """The first request that could not be completed.

    Attributes:
        errno: the kernel's number; 0 when attempt after attempt moved nothing: for a read, the end
            of the file.
        file_offset: in bytes, of the part that was not moved.
    """

    errno: int
    file_offset: int


@dataclass(slots=True)
class _Pending:
    """A plan not yet wholly taken: the index of its next request."""

    plan: IoPlan
    tag: int
    taken: int = 0


class Transfer:
    """The requests of one channel, grouped by tag (a tag is one window of memory).

    Args:
        slots: most requests in flight.
        bytes_max: most bytes in flight; one request may always go.
        alignment: a resumed request starts at a multiple of this file offset, in bytes.
    """

    def __init__(self, *, slots: int, bytes_max: int, alignment: int) -> None:
        self.slots = slots
        self.failure: TransferFailure | None = None
        self.bytes_completed = 0
        self.bytes_in_flight = 0
        self.pending_bytes = 0  # queued and never issued yet
        self.requests_completed = 0
        self._bytes_max = bytes_max
        self._alignment = alignment
        self._pending: deque[_Pending] = deque()
        self._pending_count = 0
        self._unfinished: dict[int, int] = {}  # tag -> requests not ended
        self._free = list(range(slots))
        self._resume: list[int] = []
        self._address = np.zeros(slots, np.int64)
        self._length = np.zeros(slots, np.int64)
        self._file_offset = np.zeros(slots, np.int64)
        self._tries = np.zeros(slots, np.int64)
        self._tag = np.zeros(slots, np.int64)
        self._issued = np.zeros(slots, np.bool_)

    def add(self, plan: IoPlan, *, tag: int) -> None:
        """Queue the requests of ``plan``; ``tag`` must not be in use and the plan not empty."""
        assert len(plan) > 0, "an empty plan has no completion to wait for"
        assert tag not in self._unfinished, tag
        self._pending.append(_Pending(plan, tag))
        self._pending_count += len(plan)
        self.pending_bytes += plan.total_bytes
        self._unfinished[tag] = len(plan)

    @property
    def pending_count(self) -> int:
        """Requests queued and never issued yet."""
        return self._pending_count

    @property
    def in_flight_count(self) -> int:
        """Requests an engine has now."""
        return int(np.count_nonzero(self._issued))

    @property
    def retries(self) -> int:
        """Most attempts in a row that any request waiting to go again has made; 0 if none has."""
        return max((int(self._tries[slot]) for slot in self._resume), default=0)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing more will be."""
        if self.in_flight_count:
            return False
        return self.failure is not None or not (self._pending_count or self._resume)

    def stop(self) -> None:
        """Take nothing more, without a failure of our own; what is in flight still drains."""
        self._pending.clear()
        self._pending_count = 0
        self.pending_bytes = 0
        self._resume.clear()

    def take(self) -> IoBatch:
        """Move what fits into flight: the rest of short requests first, then new ones."""
        slots: list[int] = []
        if self.failure is None:
            slots, self._resume = self._resume, []
            self.bytes_in_flight += int(self._length[slots].sum())
            while self._pending and self._free and self.bytes_in_flight < self._bytes_max:
                slots += self._fill(self._pending[0])
        index = np.array(slots, np.int64)
        self._issued[index] = True
        return IoBatch(
            address=self._address[index],
            length=self._length[index],
            file_offset=self._file_offset[index],
            token=index,
        )

    def complete(self, done: Completions) -> list[int]:
        """Account for results; return the tags whose last request ended now."""
        token, result = done.token, done.result
        assert self._issued[token].all(), "a completion for a request that is not in flight"
        self._issued[token] = False
        asked = self._length[token]
        self.bytes_in_flight -= int(asked.sum())
        whole = result == asked
        finished = self._end(token[whole])
        self.bytes_completed += int(asked[whole].sum())
        for slot, outcome in zip(token[~whole].tolist(), result[~whole].tolist(), strict=True):
            self._partial(slot, outcome)
        return finished

    def _fill(self, pending: _Pending) -> list[int]:
        """Put requests of one plan into free slots, as many as slots and bytes allow."""
        plan, first = pending.plan, pending.taken
        lengths = plan.length[first : first + len(self._free)]
        before = np.cumsum(lengths) - lengths  # bytes of this plan taken before each request
        count = int(np.count_nonzero(before < self._bytes_max - self.bytes_in_flight))
        part = slice(first, first + count)
        slots = self._free[-count:]
        del self._free[-count:]
        self._address[slots] = plan.address[part]
        self._length[slots] = plan.length[part]
        self._file_offset[slots] = plan.file_offset[part]
        self._tries[slots] = 0
        self._tag[slots] = pending.tag
        self.bytes_in_flight += int(lengths[:count].sum())
        self._pending_count -= count
        self.pending_bytes -= int(lengths[:count].sum())
        pending.taken += count
        if pending.taken == len(plan):
            self._pending.popleft()
        return slots

    def _end(self, slots: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
        """Free slots whose request ended whole; return the tags that are finished with that."""
        self._free.extend(slots.tolist())
        self.requests_completed += len(slots)
        finished = []
        for tag in self._tag[slots].tolist():
            self._unfinished[tag] -= 1
            if self._unfinished[tag] == 0:
                del self._unfinished[tag]
                finished.append(tag)
        return finished

    def _partial(self, slot: int, outcome: int) -> None:
        """Handle one result that is not the whole request: go on, try again, or fail."""
        assert outcome < self._length[slot], "more bytes moved than asked for"
        if outcome < 0 and -outcome not in _RETRIED:
            self._fail(-outcome, slot)
            return
        moved = align_down(max(outcome, 0), self._alignment)
        self.bytes_completed += moved
        self._address[slot] += moved
        self._length[slot] -= moved
        self._file_offset[slot] += moved
        self._tries[slot] = 0 if moved else self._tries[slot] + 1
        if self._tries[slot] > RETRIES_MAX:
            self._fail(max(-outcome, 0), slot)
        else:
            self._resume.append(slot)

    def _fail(self, number: int, slot: int) -> None:
        """Remember the first failure and forget what has not been issued."""
        if self.failure is None:
            self.failure = TransferFailure(number, int(self._file_offset[slot]))
            self.stop()
