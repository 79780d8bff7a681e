"""The ring on real files: O_DIRECT, depth, one thread, and calls that only partly succeed."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from smallguests import aligned

from uringmig.errors import StorageError
from uringmig.storage.engine import Operation
from uringmig.storage.requests import IoBatch
from uringmig.storage.ring import RingEngine

SECOND = 1_000_000_000


def batch(address: int, count: int, size: int) -> IoBatch:
    index = np.arange(count, dtype=np.int64)
    return IoBatch(address + index * size, np.full(count, size, np.int64), index * size, index)


def test_direct_writes_at_depth_arrive(tmp_path: Path) -> None:
    memory = aligned(8 << 20)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, dtype=np.uint8)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    engine = RingEngine(fd, Operation.WRITE, 64)
    engine.submit(batch(memory.ctypes.data, 64, 128 << 10))
    count = 0
    while count < 64:
        done = engine.reap(wait_count=64 - count, timeout_ns=SECOND)
        assert (done.result == 128 << 10).all()
        count += len(done)
    engine.close()
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == memory.tobytes()


def test_unaligned_direct_request_is_einval(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    engine = RingEngine(fd, Operation.WRITE, 1)
    memory = aligned(8192)
    engine.submit(batch(memory.ctypes.data + 1, 1, 4096))
    assert engine.reap(wait_count=1, timeout_ns=SECOND).result.tolist() == [-errno.EINVAL]
    engine.close()
    os.close(fd)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8, 100, 256])
def test_any_depth_has_its_entries(tmp_path: Path, depth: int) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    engine = RingEngine(fd, Operation.WRITE, depth)
    memory = aligned(depth * 512)
    for _ in range(3):
        engine.submit(batch(memory.ctypes.data, depth, 512))
        seen: list[int] = []
        while len(seen) < depth:
            done = engine.reap(wait_count=depth - len(seen), timeout_ns=SECOND)
            seen += done.token.tolist()
        assert sorted(seen) == list(range(depth))
    engine.close()
    os.close(fd)


def test_ring_belongs_to_the_thread_that_made_it(tmp_path: Path) -> None:
    """SINGLE_ISSUER: the kernel tells the wrong thread EEXIST, and it comes out as an error."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    engine = RingEngine(fd, Operation.WRITE, 1)
    memory = aligned(4096)
    errors: list[StorageError] = []

    def use() -> None:
        try:
            engine.submit(batch(memory.ctypes.data, 1, 512))
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert [error.errno for error in errors] == [errno.EEXIST]
    # What the kernel did not take then, it takes from the right thread.
    assert engine.reap(wait_count=1, timeout_ns=SECOND).result.tolist() == [512]
    engine.close()
    os.close(fd)


def test_close_with_requests_in_flight_is_a_bug() -> None:
    reader, writer = os.pipe()
    engine = RingEngine(reader, Operation.READ, 1)
    memory = aligned(4096)
    engine.submit(batch(memory.ctypes.data, 1, 8))
    with pytest.raises(AssertionError):
        engine.close()
    os.write(writer, b"x")
    assert engine.reap(wait_count=1, timeout_ns=SECOND).result.tolist() == [1]
    engine.close()
    os.close(reader)
    os.close(writer)


class Calls:
    """The library, with one function that answers by a list before it goes on as usual."""

    def __init__(self, real: Any, name: str, answers: list[int]) -> None:
        self._real, self._name, self._answers = real, name, answers

    def __getattr__(self, name: str) -> Any:
        if name == self._name and self._answers:
            return lambda *_: self._answers.pop(0)
        return getattr(self._real, name)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EINTR])
def test_submission_the_kernel_puts_off_is_not_lost(tmp_path: Path, number: int) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    engine = RingEngine(fd, Operation.WRITE, 4)
    engine._calls = Calls(engine._calls, "io_uring_submit", [-number])  # type: ignore[assignment]
    memory = aligned(4096)
    memory[:] = 7
    engine.submit(batch(memory.ctypes.data, 4, 1024))
    count = 0
    while count < 4:
        count += len(engine.reap(wait_count=1, timeout_ns=SECOND))
    engine.close()
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == bytes([7]) * 4096


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENXIO, errno.EFAULT])
def test_unusable_ring_is_a_storage_error(tmp_path: Path, number: int) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    engine = RingEngine(fd, Operation.WRITE, 1)
    real = engine._calls
    engine._calls = Calls(real, "io_uring_get_events", [-number])  # type: ignore[assignment]
    with pytest.raises(StorageError, match="io_uring_enter") as caught:
        engine.reap(wait_count=0, timeout_ns=0)
    assert caught.value.errno == number
    engine.close()
    os.close(fd)
