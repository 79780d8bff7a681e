"""The disks that files lie on, what their queues hold, how busy they are.

A file's disks are the whole ones at the bottom: below partitions, device mapper, md and loop
devices. Memory file systems have none.  Linux: Documentation/admin-guide/iostats.rst.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from uringmig.batch.messages import Disk
from uringmig.errors import StorageError
from uringmig.storage.devices import BLOCK_DEVICES, device_name, mount_of, whole_disk

_LEVELS_MAX: Final = 8
#: What a queue is taken to hold where the kernel does not tell.
_REQUESTS_ASSUMED: Final = 64


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
        return _REQUESTS_ASSUMED
