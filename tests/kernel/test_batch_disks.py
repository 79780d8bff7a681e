"""Disks: found below real file systems, measured, and watched."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from loopdisk import mounted

from uringmig.batch.disks import DiskUse, disks_of
from uringmig.bench.depth import measure_depth
from uringmig.errors import StorageError
from uringmig.units import MiB


def test_memory_has_no_disk() -> None:
    assert disks_of("/dev/shm") == ()


def test_what_does_not_exist_yet_lies_where_its_folder_does(tmp_path: Path) -> None:
    assert disks_of(tmp_path / "a" / "b") == disks_of(tmp_path)


@pytest.mark.parametrize(("kind", "size"), [("ext4", 64 * MiB), ("btrfs", 256 * MiB)])
def test_a_loop_device_lies_on_the_disk_of_its_file(tmp_path: Path, kind: str, size: int) -> None:
    """Btrfs has device numbers of its own; both end at the disk that does the work."""
    with mounted(kind, tmp_path, size=size) as folder:
        (disk,) = disks_of(folder)
        assert (disk,) == disks_of(tmp_path)
        assert disk.requests_max >= 1


def test_measured_in_a_folder_and_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(8 * MiB))
    for path in (tmp_path, tmp_path / "image"):
        found = measure_depth(str(path), depth_max=16)
        assert found.depth in (4, 8, 16)
        assert found.rate > 0
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_a_measurement_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """Its file has no name at any moment, so there is none to be left."""
    pid = os.fork()
    if not pid:
        while True:
            measure_depth(str(tmp_path), depth_max=64)
    # Until a good part of the file is there it is nowhere to be seen, and then neither.
    while not any(size >= 16 * MiB for size in open_sizes(pid, tmp_path)):
        assert not list(tmp_path.iterdir())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not list(tmp_path.iterdir())


def open_sizes(pid: int, folder: Path) -> list[int]:
    """Lengths of what a process holds open of a folder's."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(link.readlink()).startswith(f"{folder}/"):
                found.append(link.stat().st_size)
    return found


def test_a_disk_that_is_too_small_to_measure_says_so(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, size=16 * MiB) as folder:
        with pytest.raises(StorageError, match="ENOSPC"):
            measure_depth(str(folder), depth_max=16)
        assert not list(folder.glob(".depth*"))


def test_a_file_that_is_too_short_to_measure_says_so(tmp_path: Path) -> None:
    """Nothing was moved at any depth, and the least is no answer."""
    (tmp_path / "image").write_bytes(bytes(MiB - 1))
    with pytest.raises(StorageError, match="too short"):
        measure_depth(str(tmp_path / "image"), depth_max=16)


def test_use_of_a_disk(tmp_path: Path) -> None:
    (disk,) = disks_of(tmp_path)
    use = DiskUse()
    assert use.look(disk.name) is None
    assert use.look("no-such-disk") is None
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(8 * MiB))
        os.fsync(file.fileno())
    seen = use.look(disk.name)
    assert seen is not None
    share, rate = seen
    assert 0 <= share <= 1
    assert rate > 0
