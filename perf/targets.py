"""Folders of known speed: a disk's, tmpfs, and xfs on a loop device over tmpfs; always taken away.

Root mounts what is not there; whatever happens it is unmounted again.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from perf.programme import TargetName
from perf.workloads import SHM
from uringmig.errors import HostError, StorageError


@contextmanager
def opened(name: TargetName, folder: Path, *, size_bytes: int) -> Iterator[Path]:
    """An empty folder on a target.

    Args:
        name: which one.
        folder: of the disk; the folder is made in it.
        size_bytes: of the largest image, for a target that is made here.

    Raises:
        StorageError: the disk's folder cannot be made.
        HostError: the target cannot be made here, with the cause.
    """
    with ExitStack() as stack:
        if name == "disk":
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    "no folder for images", errno=error.errno, path=str(folder)
                ) from None
            yield _temporary(stack, folder)
        elif name == "tmpfs":
            yield _temporary(stack, SHM)
        else:
            if os.geteuid():
                raise HostError("target xfs-loop mounts a loop device, which needs root")
            yield _xfs_loop(stack, size_bytes)


def _temporary(stack: ExitStack, parent: Path) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-", dir=parent)))


def _xfs_loop(stack: ExitStack, size_bytes: int) -> Path:
    """A fresh xfs over a file in memory; the loop device reads and writes it without a cache."""
    folder = _temporary(stack, SHM)
    disk, point = folder / "disk", folder / "mount"
    point.mkdir()
    disk.touch(mode=0o600)
    # xfs has a log and refuses to be smaller than 300 MiB.
    os.truncate(disk, size_bytes + (1 << 30))
    device = _run("losetup", "--find", "--show", "--direct-io=on", str(disk))
    stack.callback(_run, "losetup", "--detach", device)
    _run("mkfs.xfs", "-q", device)
    _run("mount", "-t", "xfs", device, str(point))
    stack.callback(_run, "umount", str(point))
    return point


def _run(*command: str) -> str:
    """Run a command of the system's.

    Raises:
        HostError: it is missing, or failed, with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HostError(f"{command[0]} is not installed") from None
    if done.returncode:
        raise HostError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
