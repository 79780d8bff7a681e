"""The disks that files lie on, what their queues hold, how busy they are, the depth they need.

A file's disks are the whole ones at the bottom: below partitions, device mapper, md and loop
devices. Memory file systems have none.  Linux: Documentation/admin-guide/iostats.rst.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from uringmig.batch.messages import Disk, MeasuredDepth
from uringmig.errors import StorageError
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.devices import BLOCK_DEVICES, device_name, mount_of, whole_disk
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import choose_engine
from uringmig.storage.nameless import nameless_file, path_of
from uringmig.storage.requests import IoBatch
from uringmig.units import MiB

_LEVELS_MAX: Final = 8
_REQUEST_BYTES: Final = MiB
#: Read or written at each depth; a tenth of a second of a middling disk.
_MEASURED_REQUESTS: Final = 64
_DEPTHS: Final = (4, 8, 16, 32, 64)
_GOOD_SHARE: Final = 0.9
_TICK_NS: Final = 200_000_000


def disks_of(path: str | os.PathLike[str]) -> tuple[Disk, ...]:
    """The disks below a file, or below the nearest folder above it that exists; sorted by name.

    None where that cannot be looked at: whoever opens the file is told why.
    """
    at = Path(path)
    try:
        while not os.path.exists(at) and at != at.parent:
            at = at.parent
        number = at.stat().st_dev
    except OSError:
        return ()
    top = BLOCK_DEVICES / device_name(number)
    if not os.path.exists(top):
        # btrfs and overlays have numbers of their own; what is mounted names the device.
        device = _mounted_device(str(at))
        if device is None:
            return ()
        top = BLOCK_DEVICES / device
    found = {node.name: node for node in _bottoms(top.resolve(), _LEVELS_MAX)}
    return tuple(
        Disk(host=socket.gethostname(), name=name, requests_max=_tags(found[name]))
        for name in sorted(found)
    )


def measure_depth(path: str, *, depth_max: int) -> MeasuredDepth:
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
    return MeasuredDepth(depth=depth, rate=best)


class DiskUse:
    """How busy disks were between two looks."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int, int]] = {}

    def look(self, name: str) -> tuple[float, float] | None:
        """Share of the time a disk had something to do, and its bytes a second, since last time.

        None at the first look, and for a disk that is not of this host.
        """
        try:
            fields = (Path("/sys/class/block") / name / "stat").read_text().split()
        except OSError:
            return None
        now, busy_ms = time.monotonic(), int(fields[9])
        moved = (int(fields[2]) + int(fields[6])) * 512
        before = self._before.get(name)
        self._before[name] = (now, busy_ms, moved)
        if before is None or now <= before[0]:
            return None
        seconds = now - before[0]
        return min(1.0, (busy_ms - before[1]) / 1000 / seconds), (moved - before[2]) / seconds


def _mounted_device(path: str) -> str | None:
    """Number of the block device that is mounted where ``path`` is; None: none can be seen."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mount_of(fd, path).device
    except StorageError:
        return None
    finally:
        os.close(fd)


def _bottoms(node: Path, levels: int) -> Iterator[Path]:
    """The whole disks below a block device's folder in sysfs."""
    if not os.path.exists(node):
        return
    node = whole_disk(node)
    slaves = list((node / "slaves").glob("*"))
    backing = node / "loop" / "backing_file"
    if levels and slaves:
        for slave in slaves:
            yield from _bottoms(slave.resolve(), levels - 1)
    elif levels and os.path.exists(backing) and (below := _backing_device(backing)) is not None:
        yield from _bottoms(below, levels - 1)
    else:
        yield node


def _backing_device(backing: Path) -> Path | None:
    """The device below a loop device, if its file can be seen from here and lies on one."""
    try:
        number = Path(backing.read_text().rstrip("\n")).stat().st_dev
    except OSError:
        return None
    node = BLOCK_DEVICES / device_name(number)
    return node.resolve() if os.path.exists(node) else None


def _tags(node: Path) -> int:
    """Requests a disk's queue holds."""
    try:
        return max(1, int((node / "queue" / "nr_requests").read_text()))
    except (OSError, ValueError):
        return _DEPTHS[-1]


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
