"""How many requests at a time a disk needs, found in half a second.

Raw requests of one buffer are timed. A trial (`bench.trial`) is no measure of this: it times a
whole save, with its digests and its sync, and it cannot read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from uringmig.errors import StorageError
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import choose_engine
from uringmig.storage.nameless import nameless_file, path_of
from uringmig.storage.requests import IoBatch
from uringmig.units import MiB

_REQUEST_BYTES: Final = MiB
#: Read or written at each depth; a tenth of a second of a middling disk.
_MEASURED_REQUESTS: Final = 64
_DEPTHS: Final = (4, 8, 16, 32, 64)
_GOOD_SHARE: Final = 0.9
_TICK_NS: Final = 200_000_000


class DepthFound(NamedTuple):
    """Requests at a time, and the bytes a second of the best depth."""

    depth: int
    rate: float


def measure_depth(path: str, *, depth_max: int) -> DepthFound:
    """Measure the least depth that reaches nine tenths of a disk's best speed.

    Args:
        path: a folder, in which a nameless file is written, or a file, which is read.
        depth_max: no deeper than this.

    Raises:
        StorageError: the disk cannot be read or written, or the file is too short to tell.
    """
    with _measurable(path) as (name, operation):
        file = open_direct(name, operation, "preferred")
        try:
            # Once beforehand: the first to write a file has its blocks allocated, too.
            _rate(file.fd, operation, _DEPTHS[0])
            rates = {
                depth: _rate(file.fd, operation, depth)
                for depth in _DEPTHS
                if depth <= max(depth_max, _DEPTHS[0])
            }
        finally:
            os.close(file.fd)
    best = max(rates.values())
    if best == 0:
        raise StorageError(f"shorter than {_REQUEST_BYTES} bytes, too short to measure", path=path)
    depth = next(depth for depth, rate in rates.items() if rate >= _GOOD_SHARE * best)
    return DepthFound(depth, best)


@contextlib.contextmanager
def _measurable(path: str) -> Iterator[tuple[str, Operation]]:
    """A file to measure with, and how; in a folder it is one to write, gone afterwards."""
    if not os.path.isdir(path):
        yield path, Operation.READ
        return
    with nameless_file(path) as scratch:
        yield path_of(scratch), Operation.WRITE


def _rate(fd: int, operation: Operation, depth: int) -> float:
    """Bytes a second of one short run at a depth."""
    buffer = aligned_buffer(_REQUEST_BYTES)
    # Some disks compress, and make zeros look fast.
    buffer[:] = np.random.Generator(np.random.SFC64(0)).integers(0, 256, len(buffer), np.uint8)
    count = _MEASURED_REQUESTS
    if operation is Operation.READ:
        count = min(count, os.fstat(fd).st_size // _REQUEST_BYTES)
    engine = choose_engine("auto").factory(fd, operation, depth)
    moved, sent, in_flight, failed = 0, 0, 0, 0
    began = time.monotonic()
    try:
        # Once a request has failed none follows, but those in flight still own the buffer.
        while (sent < count and not failed) or in_flight:
            wanted = 0 if failed else min(count - sent, depth - in_flight)
            if wanted:
                engine.submit(_requests(sent, wanted, buffer.ctypes.data))
                sent, in_flight = sent + wanted, in_flight + wanted
            done = engine.reap(wait_count=1, timeout_ns=_TICK_NS)
            in_flight -= len(done)
            moved += int(done.result[done.result > 0].sum())
            failed = min(failed, *done.result.tolist(), 0)
    finally:
        engine.close()
    if failed:
        raise StorageError("the disk cannot be measured", errno=-failed)
    return moved / max(time.monotonic() - began, 1e-6)


def _requests(first: int, count: int, address: int) -> IoBatch:
    """Requests one behind the other in the file, all from or to one buffer."""
    index = np.arange(first, first + count, dtype=np.int64)
    return IoBatch(
        address=np.full(count, address, np.int64),
        length=np.full(count, _REQUEST_BYTES, np.int64),
        file_offset=index * _REQUEST_BYTES,
        token=index,
    )
