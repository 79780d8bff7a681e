"""Copies into an archive on disks that refuse, and on engines that fail: nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopdisk import mounted
from smallguests import (
    MIB,
    OPTIONS,
    PWRITE,
    RING,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import MappedRamWriter, StorageError, WriteOptions
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.hot import write_hot
from uringmig.contents.mappedram import MappedRamContents
from uringmig.progress import Snapshot
from uringmig.storage.enginechoice import EngineChoice
from uringmig.testing.faults import FaultEngine, random_outcomes

WRITERS = pytest.mark.parametrize("write", [write_hot, write_cold])
Write = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of about 20 MiB."""
    path = tmp_path_factory.mktemp("source") / "a.mig"
    with MappedRamWriter(path, ramblocks_of(guest()), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    return path


def guest() -> dict[str, Any]:
    return make_guest(ram_bytes=37 * MIB)


def check(path: Path, folder: Path) -> None:
    """The image is whole, whichever tier."""
    if path.suffix == ".cold":
        with open_cold(path) as contents:
            write_hot(contents, folder / "back.mig", options=OPTIONS)
        path = folder / "back.mig"
    check_image(path, copy_of(guest()))


@WRITERS
@pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)
@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_disk_that_gets_full(
    tmp_path: Path, source: Path, write: Write, engine: EngineChoice, kind: str
) -> None:
    with mounted(kind, tmp_path, size=(115 if kind == "btrfs" else 14) * MIB) as disk:
        ballast = disk / "ballast"
        if kind == "btrfs":  # its smallest file system has more room than the image needs
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(range(256)) * 4096)
            os.sync()
            os.truncate(ballast, max(0, ballast.stat().st_size - 6 * MIB))
            os.sync()
        with (
            MappedRamContents(source) as contents,
            pytest.raises(StorageError) as caught,
        ):
            write(
                contents,
                disk / "vm.mig",
                options=OPTIONS,
                resume=disk / "vm.journal",
                engine=engine,
            )
        assert caught.value.errno == errno.ENOSPC
        assert set(left_in(disk)) <= {"lost+found", "ballast"}


def faulty(outcomes: Callable[[], Any]) -> EngineChoice:
    """An engine whose requests have these outcomes."""
    return EngineChoice(
        "faulty",
        lambda fd, operation, depth: FaultEngine(
            PWRITE.factory(fd, operation, depth), outcomes(), seed=1, hold_max=2
        ),
    )


@WRITERS
def test_faults_that_pass(tmp_path: Path, source: Path, write: Write) -> None:
    """Short writes, EAGAIN and EINTR in any order: not one is fatal."""
    suffix = ".mig" if write is write_hot else ".cold"
    lock, seeds = threading.Lock(), iter(range(100))

    def outcomes() -> Any:
        with lock:
            return random_outcomes(next(seeds), block_bytes=OPTIONS.block_size)

    with MappedRamContents(source) as contents:
        write(contents, tmp_path / f"vm{suffix}", options=OPTIONS, engine=faulty(outcomes))
    check(tmp_path / f"vm{suffix}", tmp_path)


@WRITERS
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_faults_that_do_not(tmp_path: Path, source: Path, write: Write, number: int) -> None:
    """The tenth write fails: the number is told, nothing is left."""
    choice = faulty(lambda: iter([1 << 62] * 9 + [-number]))
    with (
        MappedRamContents(source) as contents,
        pytest.raises(StorageError) as caught,
    ):
        write(
            contents,
            tmp_path / "vm",
            options=OPTIONS,
            resume=tmp_path / "vm.journal",
            engine=choice,
        )
    assert caught.value.errno == number
    assert left_in(tmp_path) == []


@WRITERS
def test_interrupt_in_the_middle(tmp_path: Path, source: Path, write: Write) -> None:
    """Whatever the progress callback raises ends the copy, and nothing is left."""
    threads = threading.active_count()

    def stop(snapshot: Snapshot) -> None:
        if snapshot.finished_bytes > 8 * MIB:
            raise KeyboardInterrupt

    slow = WriteOptions(channels=2, depth=4, block_size=64 << 10, rate=32 * MIB)
    with MappedRamContents(source) as contents, pytest.raises(KeyboardInterrupt):
        write(
            contents,
            tmp_path / "vm",
            options=slow,
            resume=tmp_path / "vm.journal",
            progress=stop,
        )
    assert left_in(tmp_path) == []
    assert threading.active_count() == threads
    with MappedRamContents(source) as contents:
        assert contents.blocks, "the contents stay usable"


@WRITERS
def test_second_copy_to_a_name_is_refused_and_the_first_goes_on(
    tmp_path: Path, source: Path, write: Write
) -> None:
    suffix = ".mig" if write is write_hot else ".cold"
    path = tmp_path / f"vm{suffix}"
    refused = []

    def meddle(snapshot: Snapshot) -> None:
        if snapshot.phase == "sync":
            with MappedRamContents(source) as other, pytest.raises(StorageError, match="another"):
                write(other, path, options=OPTIONS, resume=tmp_path / "vm.journal")
            refused.append(True)

    with MappedRamContents(source) as contents:
        write(contents, path, options=OPTIONS, resume=tmp_path / "vm.journal", progress=meddle)
    assert refused
    check(path, tmp_path)


@WRITERS
def test_progress_counts_to_the_end(tmp_path: Path, source: Path, write: Write) -> None:
    seen: list[Snapshot] = []
    with MappedRamContents(source) as contents:
        result = write(contents, tmp_path / "vm", options=OPTIONS, progress=seen.append)
    assert seen[-1].phase == "publish"
    assert seen[-1].finished_bytes == seen[-1].total_bytes == result.memory_bytes
    assert seen[-1].completed_bytes == result.written_bytes
    assert [s.finished_bytes for s in seen] == sorted(s.finished_bytes for s in seen)
