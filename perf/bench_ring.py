"""What does a request cost beside the device, by engine and by how many go in one batch?

The requests are writes of a page to /dev/null, which the kernel completes at once and without a
copy; so what is left is the way there and back.
"""

from __future__ import annotations

import os
import time

import numpy as np

from perf.micro import Micro, TimeFunction
from uringmig.options import PAGE_SIZE
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.engine import Engine, EngineFactory, Operation
from uringmig.storage.enginechoice import describe_liburing
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import IoBatch
from uringmig.storage.ring import RingEngine
from uringmig.testing.engines import NullEngine

BATCHES = (1, 32, 128)
#: Batches in one loop, so that a loop is long against the clock.
ROUNDS = 256


def batches(factory: EngineFactory, fd: int, count: int) -> TimeFunction:
    """Time batches of ``count`` requests, each submitted and reaped whole."""
    memory = aligned_buffer(PAGE_SIZE)
    token = np.arange(count, dtype=np.int64)
    batch = IoBatch(
        address=np.full(count, memory.ctypes.data, np.int64),
        length=np.full(count, PAGE_SIZE, np.int64),
        file_offset=token * PAGE_SIZE,
        token=token,
    )

    def once(engine: Engine) -> None:
        engine.submit(batch)
        done = 0
        while done < count:
            done += len(engine.reap(wait_count=count - done, timeout_ns=1_000_000_000))

    def run(loops: int) -> float:
        assert memory is not None, "the batch names its memory by address alone"
        # A ring belongs to the thread that made it, so it is made here.
        engine = factory(fd, Operation.WRITE, count)
        started = time.perf_counter()
        for _ in range(loops * ROUNDS):
            once(engine)
        seconds = time.perf_counter() - started
        engine.close()
        return seconds

    return run


def main() -> None:
    micro = Micro(
        "perf.bench_ring", __doc__ or "", request_bytes=PAGE_SIZE, liburing=describe_liburing()
    )
    engines: tuple[tuple[str, EngineFactory], ...] = (
        ("io_uring", RingEngine),
        ("pwrite", PwriteEngine),
        ("none", NullEngine),
    )
    fd = os.open(os.devnull, os.O_WRONLY)
    try:
        for name, factory in engines:
            for count in BATCHES:
                micro.cost(
                    f"request: {name}, batch of {count}",
                    batches(factory, fd, count),
                    operations=count * ROUNDS,
                    of="request",
                )
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
