"""Transfer: what is in flight, short results, retries and failures, against the obvious model.

The model is a file as a bytearray: whatever the engine does, in the end every byte of the plan is
in its place, and each request asked for is one a reader can foresee.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from uringmig.storage.engine import Operation
from uringmig.storage.requests import Completions, IoBatch, IoPlan
from uringmig.testing.engines import MemoryEngine
from uringmig.testing.faults import WHOLE, FaultEngine, RecordingEngine, RequestLog, random_outcomes
from uringmig.transfer.slots import RETRIES_MAX, Transfer, TransferFailure

KIB = 1024
MIB = 1024 * KIB


def ints(values: Iterable[int]) -> NDArray[np.int64]:
    return np.array(list(values), np.int64)


def plan_of(requests: list[tuple[int, int]], *, address: int = 0) -> IoPlan:
    """Requests as (file offset, length); memory mirrors the file from ``address`` on."""
    return IoPlan(
        address=ints(address + offset for offset, _ in requests),
        length=ints(length for _, length in requests),
        file_offset=ints(offset for offset, _ in requests),
    )


def completions(*pairs: tuple[int, int]) -> Completions:
    return Completions(ints(token for token, _ in pairs), ints(result for _, result in pairs))


def is_idle(transfer: Transfer) -> bool:
    """Whether it is idle now; mypy takes a property for unchanged by a call."""
    return transfer.idle


def as_pairs(batch: IoBatch) -> list[tuple[int, int]]:
    return list(zip(batch.file_offset.tolist(), batch.length.tolist(), strict=True))


class Disk:
    """Memory, a file of the same size, and an engine between them that keeps a log."""

    def __init__(
        self,
        size: int,
        script: Iterable[int] = (),
        *,
        depth: int = 8,
        seed: int | None = None,
        hold_max: int = 0,
    ) -> None:
        self.memory = np.random.default_rng(size).integers(1, 256, size, dtype=np.uint8)
        self.file = np.zeros(size, np.uint8)
        self.log = RequestLog()
        engine = MemoryEngine(self.file, Operation.WRITE, depth)
        self.engine = RecordingEngine(
            FaultEngine(engine, script, seed=seed, hold_max=hold_max), self.log
        )

    def run(
        self,
        plans: list[list[tuple[int, int]]],
        *,
        alignment: int = 512,
        bytes_max: int = 4 * MIB,
    ) -> Transfer:
        """Add each plan under its number, and go on until all is done; tags end exactly once."""
        transfer = Transfer(slots=self.engine.depth, bytes_max=bytes_max, alignment=alignment)
        for tag, plan in enumerate(plans):
            transfer.add(plan_of(plan, address=self.memory.ctypes.data), tag=tag)
        finished: list[int] = []
        while not transfer.idle:
            batch = transfer.take()
            assert (batch.length > 0).all()
            if len(batch):
                self.engine.submit(batch)
            assert transfer.in_flight_count == self.log.in_flight
            finished += transfer.complete(self.engine.reap(wait_count=1, timeout_ns=0))
        assert transfer.in_flight_count == self.log.in_flight == 0
        assert transfer.bytes_in_flight == 0
        if transfer.failure is None:
            assert sorted(finished) == list(range(len(plans)))
        self.engine.close()
        return transfer


SHORT_COUNTS = sorted(
    {0, *range(1, 64 * KIB, 509)}
    | {edge + by for edge in range(512, 64 * KIB, 512) for by in (-1, 0, 1)}
)


@pytest.mark.parametrize("alignment", [1, 512, 4096])
def test_short_write_of_any_size_resumes_at_the_last_aligned_byte(alignment: int) -> None:
    """A short count is never fatal, and what follows begins at the last aligned byte."""
    for count in SHORT_COUNTS:
        disk = Disk(64 * KIB, [count])
        transfer = disk.run([[(0, 64 * KIB)]], alignment=max(alignment, 512))
        resumed = count - count % max(alignment, 512)
        assert disk.log.requests == [(0, 64 * KIB), (resumed, 64 * KIB - resumed)], count
        assert np.array_equal(disk.file, disk.memory), count
        assert transfer.failure is None
        assert transfer.bytes_completed == 64 * KIB
        assert transfer.requests_completed == 1


def test_short_writes_in_a_row_go_on_from_where_the_last_one_stopped() -> None:
    """Any number of short counts is fine as long as each moves something."""
    disk = Disk(64 * KIB, [5000, 4096, 100, 8191])
    disk.run([[(0, 64 * KIB)]], alignment=4096)
    assert disk.log.requests == [
        (0, 65536),
        (4096, 61440),
        (8192, 57344),
        (8192, 57344),
        (12288, 53248),
    ]
    assert np.array_equal(disk.file, disk.memory)


def test_moving_by_one_sector_at_a_time_is_slow_and_not_a_failure() -> None:
    """The bound on attempts counts those that moved nothing, not those that moved little."""
    steps = 2 * RETRIES_MAX
    disk = Disk(512 * (steps + 1), [512] * steps)
    transfer = disk.run([[(0, 512 * (steps + 1))]])
    assert transfer.failure is None
    assert len(disk.log.requests) == steps + 1
    assert np.array_equal(disk.file, disk.memory)


@pytest.mark.parametrize("passing", [-errno.EAGAIN, -errno.EINTR, 0, 511])
def test_passing_refusal_is_retried_up_to_the_bound(passing: int) -> None:
    """EAGAIN, EINTR and an empty write are tried again; the last attempt allowed may succeed."""
    disk = Disk(8 * KIB, [passing] * RETRIES_MAX)
    transfer = disk.run([[(0, 8 * KIB)]])
    assert transfer.failure is None
    assert disk.log.requests == [(0, 8 * KIB)] * (RETRIES_MAX + 1)
    assert np.array_equal(disk.file, disk.memory)


@pytest.mark.parametrize("passing", [errno.EAGAIN, errno.EINTR])
def test_refusal_without_end_is_given_up_with_its_number(passing: int) -> None:
    """One attempt beyond the bound is fatal, and the number says what it was."""
    disk = Disk(8 * KIB, [-passing] * (RETRIES_MAX + 1))
    transfer = disk.run([[(4 * KIB, 4 * KIB)]])
    assert transfer.failure == TransferFailure(passing, 4 * KIB)
    assert len(disk.log.requests) == RETRIES_MAX + 1


def test_nothing_moved_without_end_is_given_up_without_a_number() -> None:
    """For a read this is the end of the file; no errno would be true."""
    disk = Disk(8 * KIB, [0] * (RETRIES_MAX + 1))
    assert disk.run([[(0, 8 * KIB)]]).failure == TransferFailure(0, 0)


def test_progress_resets_the_count_of_attempts() -> None:
    """Attempts in a row count, not all attempts of a request."""
    refused = [-errno.EAGAIN] * RETRIES_MAX
    disk = Disk(8 * KIB, [*refused, 4096, *refused])
    assert disk.run([[(0, 8 * KIB)]]).failure is None
    assert np.array_equal(disk.file, disk.memory)


def test_retries_tell_the_worst_request_that_waits() -> None:
    transfer = Transfer(slots=2, bytes_max=MIB, alignment=512)
    transfer.add(plan_of([(0, 512), (512, 512)]), tag=0)
    assert transfer.retries == 0
    for attempt in (1, 2, 3):
        tokens = transfer.take().token.tolist()
        transfer.complete(completions(*((token, -errno.EAGAIN) for token in tokens)))
        assert transfer.retries == attempt
    first, second = transfer.take().token.tolist()
    transfer.complete(completions((first, 512)))
    assert transfer.retries == 0
    transfer.complete(completions((second, 512)))
    assert is_idle(transfer)


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF]
)
def test_real_error_is_fatal_at_once_and_the_rest_drains(number: int) -> None:
    """Nothing new is taken after a failure, and it is not over until all in flight has ended."""
    transfer = Transfer(slots=3, bytes_max=MIB, alignment=512)
    transfer.add(plan_of([(index * 512, 512) for index in range(10)]), tag=0)
    batch = transfer.take()
    assert as_pairs(batch) == [(0, 512), (512, 512), (1024, 512)]
    one, two, three = batch.token.tolist()
    assert transfer.complete(completions((two, -number))) == []
    assert transfer.failure == TransferFailure(number, 512)
    assert not is_idle(transfer)
    assert transfer.in_flight_count == 2
    assert len(transfer.take()) == 0
    assert transfer.pending_count == transfer.pending_bytes == 0
    # A short result among the last ones is not tried again.
    assert transfer.complete(completions((one, 100), (three, 512))) == []
    assert len(transfer.take()) == 0
    assert is_idle(transfer)
    assert transfer.failure == TransferFailure(number, 512)


def test_first_failure_is_the_one_told() -> None:
    transfer = Transfer(slots=2, bytes_max=MIB, alignment=512)
    transfer.add(plan_of([(0, 512), (512, 512)]), tag=0)
    one, two = transfer.take().token.tolist()
    transfer.complete(completions((two, -errno.ENOSPC), (one, -errno.EIO)))
    assert transfer.failure == TransferFailure(errno.ENOSPC, 512)


def test_failure_names_the_part_that_was_not_moved() -> None:
    disk = Disk(64 * KIB, [10_000, -errno.EIO])
    transfer = disk.run([[(0, 64 * KIB)]], alignment=4096)
    assert transfer.failure == TransferFailure(errno.EIO, 8192)
    assert transfer.bytes_completed == 8192


def test_stop_takes_nothing_more_and_drains() -> None:
    transfer = Transfer(slots=2, bytes_max=MIB, alignment=512)
    transfer.add(plan_of([(index * 512, 512) for index in range(5)]), tag=0)
    one, two = transfer.take().token.tolist()
    transfer.complete(completions((one, 0)))
    transfer.stop()
    assert len(transfer.take()) == 0
    assert not is_idle(transfer)
    transfer.complete(completions((two, 512)))
    assert is_idle(transfer)
    assert transfer.failure is None


def test_bytes_in_flight_are_bounded_and_one_request_may_always_go() -> None:
    """The bound is on what is in flight before a request goes, so one of any size may."""
    disk = Disk(MIB, depth=64)
    disk.run([[(index * 4096, 4096) for index in range(256)]], bytes_max=16 * KIB)
    assert disk.log.bytes_max == 16 * KIB
    assert disk.log.count_max == 4
    disk = Disk(MIB, depth=64)
    disk.run([[(0, 512 * KIB), (512 * KIB, 512 * KIB)]], bytes_max=1)
    assert disk.log.count_max == 1
    assert np.array_equal(disk.file, disk.memory)


def test_slots_bound_the_requests_in_flight() -> None:
    disk = Disk(MIB, depth=5)
    disk.run([[(index * 512, 512) for index in range(2048)]])
    assert disk.log.count_max == 5


def test_rest_of_short_requests_goes_before_new_ones() -> None:
    """What was begun is ended first: old requests do not starve behind new ones."""
    disk = Disk(32 * KIB, [512, 512], depth=2)
    disk.run([[(index * 8192, 8192) for index in range(4)]])
    assert disk.log.requests[:4] == [(0, 8192), (8192, 8192), (512, 7680), (8704, 7680)]
    assert np.array_equal(disk.file, disk.memory)


def test_tag_ends_with_its_last_request_in_whatever_order() -> None:
    transfer = Transfer(slots=4, bytes_max=MIB, alignment=512)
    transfer.add(plan_of([(0, 512), (512, 512)]), tag=7)
    transfer.add(plan_of([(1024, 512), (1536, 512)]), tag=3)
    a, b, c, d = transfer.take().token.tolist()
    assert transfer.complete(completions((d, 512), (b, 512))) == []
    assert transfer.complete(completions((c, 512))) == [3]
    assert transfer.complete(completions((a, 512))) == [7]
    assert is_idle(transfer)


def test_tag_may_be_used_again_once_it_has_ended() -> None:
    transfer = Transfer(slots=1, bytes_max=MIB, alignment=512)
    for _ in range(3):
        transfer.add(plan_of([(0, 512)]), tag=1)
        (token,) = transfer.take().token.tolist()
        assert transfer.complete(completions((token, 512))) == [1]


def test_misuse_is_an_assertion() -> None:
    """A caller's bug is not a result: an unknown token, too long a count, a tag used twice."""
    transfer = Transfer(slots=2, bytes_max=MIB, alignment=512)
    with pytest.raises(AssertionError):
        transfer.add(plan_of([]), tag=0)
    transfer.add(plan_of([(0, 512)]), tag=0)
    with pytest.raises(AssertionError):
        transfer.add(plan_of([(0, 512)]), tag=0)
    with pytest.raises(AssertionError):
        transfer.complete(completions((0, 512)))
    (token,) = transfer.take().token.tolist()
    with pytest.raises(AssertionError):
        transfer.complete(completions((token, 513)))


@st.composite
def plans(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Disjoint requests of 1 to 9 sectors in rising places, cut into plans."""
    requests = []
    sector = 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=40)
    ):
        sector += gap
        requests.append((sector * 512, length * 512))
        sector += length
    cuts = sorted(draw(st.sets(st.integers(1, len(requests)), max_size=5)) | {len(requests)})
    starts = [0, *cuts[:-1]]
    return [requests[start:end] for start, end in zip(starts, cuts, strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    plans=plans(),
    seed=st.integers(0, 1 << 32),
    depth=st.integers(1, 9),
    bytes_max=st.integers(1, 20 * KIB),
    hold_max=st.integers(0, 4),
    alignment=st.sampled_from([512, 1024, 4096]),
)
def test_every_byte_arrives_whatever_the_engine_does(
    plans: list[list[tuple[int, int]]],
    seed: int,
    depth: int,
    bytes_max: int,
    hold_max: int,
    alignment: int,
) -> None:
    """Short, empty, refused, late and out of order: none is fatal, and the file is as planned."""
    size = max(offset + length for plan in plans for offset, length in plan)
    outcomes = random_outcomes(seed, block_bytes=9 * 512)
    disk = Disk(size, outcomes, depth=depth, seed=seed, hold_max=hold_max)
    transfer = disk.run(plans, bytes_max=bytes_max, alignment=alignment)
    expected = np.zeros(size, np.uint8)
    longest = 0
    for plan in plans:
        for offset, length in plan:
            expected[offset : offset + length] = disk.memory[offset : offset + length]
            longest = max(longest, length)
    assert transfer.failure is None
    assert np.array_equal(disk.file, expected)
    assert transfer.bytes_completed == sum(length for plan in plans for _, length in plan)
    assert transfer.requests_completed == sum(map(len, plans))
    assert disk.log.overlaps == []
    assert disk.log.bytes_max <= bytes_max - 1 + longest
    asked = {request for plan in plans for request in plan}
    assert asked <= set(disk.log.requests)


@settings(max_examples=100, deadline=None)
@given(
    plans=plans(),
    seed=st.integers(0, 1 << 32),
    good=st.integers(0, 30),
    number=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EDQUOT]),
)
def test_failure_at_any_place_drains_and_names_a_planned_byte(
    plans: list[list[tuple[int, int]]], seed: int, good: int, number: int
) -> None:
    """Whenever the error comes, what was in flight ends, and nothing is written elsewhere."""
    size = max(offset + length for plan in plans for offset, length in plan)
    disk = Disk(size, [*[WHOLE] * good, *[-number] * 1000], depth=4, seed=seed, hold_max=3)
    transfer = disk.run(plans)
    count = sum(map(len, plans))
    if good >= count:
        assert transfer.failure is None
        return
    assert transfer.failure is not None
    assert transfer.failure.errno == number
    assert transfer.failure.file_offset in {offset for plan in plans for offset, _ in plan}
    assert good <= transfer.requests_completed + 4
    written = np.flatnonzero(disk.file)
    assert np.array_equal(disk.file[written], disk.memory[written])
