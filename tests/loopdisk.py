"""Small real file systems on loop devices, taken away again whatever happens.  Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def needs(*commands: str) -> None:
    """Skip with the reason unless this is root and the commands are there."""
    if os.geteuid():
        pytest.skip("mounting a loop device needs root")
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed")


@contextlib.contextmanager
def loop_device(file: Path, *, size: int) -> Iterator[str]:
    """A loop device over a new sparse file."""
    file.touch()
    os.truncate(file, size)
    device = run("losetup", "--find", "--show", str(file))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        file.unlink()


@contextlib.contextmanager
def mounted(kind: str, folder: Path, *, size: int) -> Iterator[Path]:
    """A fresh file system of a kind (ext4, xfs, btrfs, tmpfs), mounted below ``folder``."""
    point = folder / f"mount-{kind}"
    point.mkdir()
    with contextlib.ExitStack() as stack:
        if kind == "tmpfs":
            needs()
            run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point))
        else:
            needs(f"mkfs.{kind}", "losetup")
            device = stack.enter_context(loop_device(folder / f"{kind}.disk", size=size))
            quiet = ["-q", "-m", "0"] if kind == "ext4" else ["-q"]
            run(f"mkfs.{kind}", *quiet, device)
            run("mount", "-t", kind, device, str(point))
        stack.callback(run, "umount", str(point))
        yield point
