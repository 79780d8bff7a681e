"""The harness's clock of a process, held against the scheduler's account of each of its threads."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from perf.host import device_of
from perf.observe import process_cpu
from uringmig.errors import HostError
from uringmig.storage.engine import Operation
from uringmig.storage.requests import IoBatch
from uringmig.storage.ring import RingEngine
from uringmig.units import MiB

DEPTH = 16
ROUNDS = 32


def thread_seconds() -> dict[str, float]:
    """Processor seconds of each thread by name and id, io_uring's workers too."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        name = f"{(task / 'comm').read_text().strip()} {task.name}"
        found[name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def write_all(fd: int, memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """Write into the holes of a sized file, which ext4 has workers of io_uring do."""
    engine = RingEngine(fd, Operation.WRITE, DEPTH)
    slots = np.arange(DEPTH, dtype=np.int64)
    for number in range(ROUNDS):
        engine.submit(
            IoBatch(
                address=np.full(DEPTH, memory.ctypes.data),
                length=np.full(DEPTH, MiB),
                file_offset=(number * DEPTH + slots) * MiB,
                token=slots.copy(),
            )
        )
        left = DEPTH
        while left:
            left -= len(engine.reap(wait_count=left, timeout_ns=10**9))
    engine.close()


def test_workers_of_io_uring_are_in_the_clock_of_their_process(tmp_path: Path) -> None:
    if device_of(tmp_path) is None:
        pytest.skip("temporary files are in memory here, where writes need no worker")
    memory = np.frombuffer(mmap.mmap(-1, MiB), np.uint8)
    memory[:] = 1
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, DEPTH * ROUNDS * MiB)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        before, threads = process_cpu(os.getpid()), thread_seconds()
        write_all(fd, memory)
        spent = process_cpu(os.getpid()) - before
        after = thread_seconds()
    except HostError as error:
        pytest.skip(f"no io_uring here: {error}")
    finally:
        os.close(fd)
        path.unlink()
    by_thread = {name: after[name] - threads.get(name, 0.0) for name in after}
    # A thread's account is brought up to date by the tick, four milliseconds at most.
    assert sum(by_thread.values()) == pytest.approx(spent, rel=0.05, abs=0.005), by_thread
    workers = sum(seconds for name, seconds in by_thread.items() if name.startswith("iou-wrk"))
    assert workers > 0.005, f"no worker had anything to do: {by_thread}"
