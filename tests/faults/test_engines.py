"""One conformance suite for every engine; what is set up and checked goes by os.pread and numpy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uringmig.storage.bounce import BounceEngine
from uringmig.storage.engine import Engine, Operation
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import Completions, IoBatch
from uringmig.storage.ring import RingEngine
from uringmig.testing.engines import MemoryEngine, NullEngine
from uringmig.testing.faults import FaultEngine, RecordingEngine, RequestLog

SIZE = 1 << 20
SECOND = 1_000_000_000
DEPTH = 8


@dataclass
class Case:
    """An engine's maker, and a file it works on, seen without it.

    ``moves`` is False for the engine that accepts and forgets.
    """

    make: Callable[[Operation, int], Engine]
    read_file: Callable[[], bytes]
    moves: bool = True
    has_fd: bool = True


def in_memory(wrap: Callable[[Engine], Engine]) -> Case:
    file = np.frombuffer(os.urandom(SIZE), np.uint8).copy()
    return Case(
        lambda operation, depth: wrap(MemoryEngine(file, operation, depth)),
        file.tobytes,
        has_fd=False,
    )


@pytest.fixture(
    params=["io_uring", "pwrite", "null", "memory", "bounce", "bounced ring", "late", "recording"]
)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDWR)

    def on_file(make: Callable[[int, Operation, int], Engine]) -> Case:
        return Case(lambda operation, depth: make(fd, operation, depth), path.read_bytes)

    match request.param:
        case "io_uring":
            yield on_file(RingEngine)
        case "pwrite":
            yield on_file(PwriteEngine)
        case "null":
            yield Case(lambda operation, depth: NullEngine(fd, operation, depth), path.read_bytes,
                       moves=False, has_fd=False)  # fmt: skip
        case "memory":
            yield in_memory(lambda engine: engine)
        case "bounce":
            yield on_file(lambda fd, op, depth: BounceEngine(PwriteEngine(fd, op, depth), op, SIZE))
        case "bounced ring":
            yield on_file(lambda fd, op, depth: BounceEngine(RingEngine(fd, op, depth), op, SIZE))
        case "late":
            yield in_memory(lambda engine: FaultEngine(engine, seed=5, hold_max=3))
        case "recording":
            yield in_memory(lambda engine: RecordingEngine(engine, RequestLog()))
    os.close(fd)


def batch_of(memory: NDArray[np.uint8], requests: list[tuple[int, int, int, int]]) -> IoBatch:
    """Requests as (token, place in memory, length, file offset)."""
    columns = np.array(requests, np.int64).reshape(-1, 4)
    return IoBatch(
        address=columns[:, 1] + memory.ctypes.data,
        length=columns[:, 2].copy(),
        file_offset=columns[:, 3].copy(),
        token=columns[:, 0].copy(),
    )


def reap_all(engine: Engine, count: int) -> dict[int, int]:
    """Results by token; each comes once."""
    results: dict[int, int] = {}
    while len(results) < count:
        done = engine.reap(wait_count=1, timeout_ns=SECOND)
        for token, result in pairs(done):
            assert token not in results, "a completion came twice"
            results[token] = result
    assert pairs(engine.reap(wait_count=0, timeout_ns=0)) == []
    return results


def pairs(done: Completions) -> list[tuple[int, int]]:
    assert done.token.dtype == done.result.dtype == np.int64
    return list(zip(done.token.tolist(), done.result.tolist(), strict=True))


def buffer(seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def test_writes_land_where_they_were_told(case: Case) -> None:
    memory, expected = buffer(), bytearray(case.read_file())
    engine = case.make(Operation.WRITE, DEPTH)
    requests = [(7, 0, 4096, 8192), (3, 5000, 1, 0), (0, 9999, 70_001, 300_000)]
    engine.submit(batch_of(memory, requests))
    assert reap_all(engine, 3) == {7: 4096, 3: 1, 0: 70_001}
    engine.close()
    for _, start, length, offset in requests:
        expected[offset : offset + length] = memory[start : start + length].tobytes()
    assert case.read_file() == (bytes(expected) if case.moves else case.read_file())


def test_reads_fill_what_was_asked_and_nothing_else(case: Case) -> None:
    memory, file = buffer(), case.read_file()
    expected = memory.copy()
    engine = case.make(Operation.READ, DEPTH)
    requests = [(1, 4096, 4096, 4096), (2, 20_000, 33_333, 777)]
    engine.submit(batch_of(memory, requests))
    assert reap_all(engine, 2) == {1: 4096, 2: 33_333}
    engine.close()
    if case.moves:
        for _, start, length, offset in requests:
            expected[start : start + length] = np.frombuffer(file[offset : offset + length], "u1")
    assert np.array_equal(memory, expected)


def test_many_times_the_depth_go_through(case: Case) -> None:
    """More requests than entries in any ring, so that its indexes wrap; tokens are used again."""
    memory = buffer()
    engine = case.make(Operation.WRITE, DEPTH)
    free, sent, ended = list(range(DEPTH)), 0, 0
    while ended < 256:
        count = min(len(free), 256 - sent)
        batch = [
            (free.pop(), (sent + n) * 4096, 4096, (255 - sent - n) * 4096) for n in range(count)
        ]
        if batch:
            engine.submit(batch_of(memory, batch))
            sent += count
        for token, result in pairs(engine.reap(wait_count=1, timeout_ns=SECOND)):
            assert result == 4096
            free.append(token)
            ended += 1
    engine.close()
    if case.moves:
        assert case.read_file() == memory.reshape(256, 4096)[::-1].tobytes()


def test_waiting_for_all_gives_all(case: Case) -> None:
    engine = case.make(Operation.WRITE, DEPTH)
    engine.submit(batch_of(buffer(), [(n, 0, 512, n * 512) for n in range(DEPTH)]))
    results: list[tuple[int, int]] = []
    while len(results) < DEPTH:
        results += pairs(engine.reap(wait_count=DEPTH - len(results), timeout_ns=SECOND))
    assert sorted(results) == [(n, 512) for n in range(DEPTH)]
    engine.close()


def test_nothing_in_flight_is_not_waited_for(case: Case) -> None:
    """Whatever is asked, the call returns; else a channel without requests would hang."""
    engine = case.make(Operation.WRITE, DEPTH)
    for wait_count in (0, 1, DEPTH):
        assert pairs(engine.reap(wait_count=wait_count, timeout_ns=0)) == []
    engine.close()


def test_more_than_the_depth_is_refused(case: Case) -> None:
    engine = case.make(Operation.WRITE, 2)
    assert engine.depth == 2
    memory = buffer()
    with pytest.raises((AssertionError, IndexError)):
        engine.submit(batch_of(memory, [(n, 0, 512, n * 512) for n in range(3)]))


def test_read_at_the_end_of_the_file_is_short(case: Case) -> None:
    if not case.moves:  # it has no file, so no end of one
        return
    engine = case.make(Operation.READ, DEPTH)
    requests = [(0, 0, 8192, SIZE - 100), (1, 8192, 512, SIZE), (2, 16384, 512, SIZE + 4096)]
    memory = buffer()
    after = memory[100:8192].copy()
    engine.submit(batch_of(memory, requests))
    assert reap_all(engine, 3) == {0: 100, 1: 0, 2: 0}
    assert memory[:100].tobytes() == case.read_file()[-100:]
    assert np.array_equal(memory[100:8192], after)
    engine.close()


def test_error_is_a_result_and_the_others_go_on(case: Case) -> None:
    """A request that fails is a negative number in its place, never an exception."""
    if not case.has_fd:  # there is no kernel to refuse a request
        return
    engine = case.make(Operation.WRITE, DEPTH)
    memory = buffer()
    engine.submit(
        batch_of(memory, [(0, 0, 512, 0), (1, 0, 512, (1 << 63) - 512), (2, 0, 512, 512)])
    )
    results = reap_all(engine, 3)
    assert results[0] == results[2] == 512
    assert -results[1] in (errno.EFBIG, errno.EINVAL)
    engine.close()


@pytest.mark.parametrize("make", [RingEngine, PwriteEngine])
def test_bad_descriptor_and_bad_address_are_results(
    make: Callable[[int, Operation, int], Engine], tmp_path: Path
) -> None:
    fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    engine = make(fd, Operation.WRITE, DEPTH)
    engine.submit(batch_of(buffer(), [(0, 0, 512, 0)]))
    assert reap_all(engine, 1) == {0: -errno.EBADF}
    engine.close()
    os.close(fd)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    engine = make(fd, Operation.WRITE, DEPTH)
    one = np.array([512], np.int64)
    engine.submit(IoBatch(np.array([8], np.int64), one, one, one))
    assert reap_all(engine, 1) == {512: -errno.EFAULT}
    engine.close()
    os.close(fd)


def test_memory_file_that_is_full_says_so() -> None:
    engine = MemoryEngine(np.zeros(4096, np.uint8), Operation.WRITE, 2)
    engine.submit(batch_of(buffer(), [(0, 0, 4096, 0), (1, 0, 4096, 1)]))
    assert reap_all(engine, 2) == {0: 4096, 1: -errno.ENOSPC}


def test_bounced_memory_may_change_as_soon_as_it_is_submitted() -> None:
    """What is written is what was there at submit."""
    file, memory = np.zeros(4096, np.uint8), buffer()[1:4097]
    engine = BounceEngine(MemoryEngine(file, Operation.WRITE, 2), Operation.WRITE, 4096)
    expected = memory.copy()
    engine.submit(batch_of(memory, [(0, 0, 4096, 0)]))
    memory[:] = 0
    assert reap_all(engine, 1) == {0: 4096}
    assert np.array_equal(file, expected)


def test_bounce_copies_only_what_was_read() -> None:
    file, memory = np.full(100, 7, np.uint8), np.zeros(512, np.uint8)
    engine = BounceEngine(MemoryEngine(file, Operation.READ, 1), Operation.READ, 512)
    for _ in range(3):  # the one buffer is used again
        memory[:] = 1
        engine.submit(batch_of(memory, [(0, 0, 512, 0)]))
        assert reap_all(engine, 1) == {0: 100}
        assert memory.tobytes() == b"\7" * 100 + b"\1" * 412


def test_fault_engine_gives_what_its_script_says() -> None:
    file, memory = np.zeros(64 << 10, np.uint8), buffer()[: 64 << 10] | np.uint8(1)
    engine = FaultEngine(
        MemoryEngine(file, Operation.WRITE, 8), [5000, -errno.EIO, 0, 1 << 40, 100]
    )
    engine.submit(batch_of(memory, [(n, n * 8192, 8192, n * 8192) for n in range(6)]))
    assert reap_all(engine, 6) == {0: 5000, 1: -errno.EIO, 2: 0, 3: 8192, 4: 100, 5: 8192}
    # Only whole sectors of a short count have arrived.
    arrived = [int(np.count_nonzero(part)) for part in file.reshape(8, 8192)]
    assert arrived == [4608, 0, 0, 8192, 0, 8192, 0, 0]
    engine.close()


def test_log_sees_what_overlaps_and_how_much_flies() -> None:
    log = RequestLog()
    file = np.zeros(8192, np.uint8)
    one = RecordingEngine(MemoryEngine(file, Operation.WRITE, 4), log)
    other = RecordingEngine(MemoryEngine(file, Operation.WRITE, 4), log)
    one.submit(batch_of(buffer(), [(0, 0, 1024, 0), (1, 0, 1024, 1024)]))
    assert log.overlaps == []
    other.submit(batch_of(buffer(), [(0, 0, 512, 1536)]))
    assert log.overlaps == [((1024, 1024), (1536, 512))]
    assert (log.in_flight, log.count_max, log.bytes_max) == (3, 3, 2560)
    reap_all(one, 2)
    other.reap(wait_count=1, timeout_ns=0)
    assert log.in_flight == 0
    assert sorted(log.results) == [(0, 1024), (1024, 1024), (1536, 512)]
