"""Real disks that refuse: full, read-only, limited, taken; nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopdisk import mounted, run
from smallguests import (
    MIB,
    OPTIONS,
    PAGE,
    PWRITE,
    RING,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import MappedRamWriter, StateError, StorageError, WriteOptions, verify
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.testing.faults import faulty

ENGINES = pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)


def save(
    path: Path, number: int = 0, *, engine: EngineChoice = PWRITE, options: WriteOptions = OPTIONS
) -> dict[str, bytes]:
    guest = make_guest(number)
    with MappedRamWriter(path, ramblocks_of(guest), options=options, engine=engine) as writer:
        writer.write_all()
        writer.finish()
    return copy_of(guest)


def fill(folder: Path, *, leave: int) -> None:
    """Take all room but ``leave`` bytes."""
    taken, step = 0, 64 * MIB
    with (folder / "ballast").open("wb") as file:
        while step >= PAGE:
            try:
                os.posix_fallocate(file.fileno(), taken, step)
                taken += step
            except OSError:
                step //= 2
        file.truncate(max(0, taken - leave))


@ENGINES
@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
@pytest.mark.parametrize("direct", ["preferred", "off"])
def test_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, engine: EngineChoice, kind: str, direct: str
) -> None:
    """At whatever step the room ends: the former image is whole, and the next save succeeds."""
    size = (320 if kind == "xfs" else 48) * MIB
    options = WriteOptions(channels=2, depth=4, block_size=64 << 10, direct=direct)  # type: ignore[arg-type]
    with mounted(kind, tmp_path, size=size) as folder:
        former = save(folder / "vm", 1, options=options)
        before = {*left_in(folder), "ballast"}
        failures = 0
        for leave in (0, PAGE, 64 << 10, MIB, 3 * MIB, 5 * MIB):
            fill(folder, leave=leave)
            try:
                save(folder / "vm", 2, engine=engine, options=options)
            except StorageError as error:
                failures += 1
                assert error.errno == errno.ENOSPC, error  # noqa: PT017 - it need not fail
                assert set(left_in(folder)) == before
                check_image(folder / "vm", former)
                assert not verify(folder / "vm").mismatches
            else:
                check_image(folder / "vm", copy_of(make_guest(2)))
                break
            finally:
                (folder / "ballast").unlink()
        assert failures >= 3
        check_image(folder / "vm", save(folder / "vm", 3, engine=engine, options=options))


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file of this process may grow beyond 4 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, before[1]))
    yield 4 * MIB
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_limit_on_file_sizes_is_told_at_once(tmp_path: Path, small_files: int) -> None:
    """The file gets its size first, so not one page is written in vain."""
    with pytest.raises(StorageError, match="cannot make the file") as caught:
        save(tmp_path / "vm")
    assert caught.value.errno == errno.EFBIG
    assert left_in(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, size=MIB) as folder:
        run("mount", "-o", "remount,ro", str(folder))
        with pytest.raises(StorageError) as caught:
            save(folder / "vm")
        assert caught.value.errno == errno.EROFS


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing/vm") as caught:
        save(tmp_path / "missing" / "vm")
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        save(tmp_path / "file" / "vm")
    assert caught.value.errno == errno.ENOTDIR


@pytest.mark.parametrize("name", ["folder", "fifo", "device"])
def test_name_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "vm"
    match name:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
    with pytest.raises(StateError, match="not a regular file"):
        save(path)
    assert left_in(tmp_path) == ["vm"]


def test_second_writer_of_a_name_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    guest = make_guest(1)
    with MappedRamWriter(tmp_path / "vm", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        with pytest.raises(StorageError, match="another save"):
            save(tmp_path / "vm", 2)
        writer.finish()
    check_image(tmp_path / "vm", copy_of(guest))


def test_partial_file_of_a_dead_writer_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "vm.partial").write_bytes(b"old" * MIB * 10)
    (tmp_path / "vm.manifest.json.partial").write_bytes(b"old")
    contents = save(tmp_path / "vm")
    check_image(tmp_path / "vm", contents)
    assert left_in(tmp_path) == ["vm", "vm.manifest.json"]
    assert (tmp_path / "vm").stat().st_mode & 0o777 == 0o600


def test_partial_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "vm.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError):
        save(tmp_path / "vm")
    assert (tmp_path / "precious").read_text() == "mine"


def test_former_content_is_there_until_the_rename(tmp_path: Path) -> None:
    former = save(tmp_path / "vm", 1)
    guest = make_guest(2)
    with MappedRamWriter(tmp_path / "vm", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        check_image(tmp_path / "vm", former)
        assert not verify(tmp_path / "vm").mismatches
        writer.finish()
    check_image(tmp_path / "vm", copy_of(guest))


def test_interrupt_by_signal_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C, and once more while it drains: a real signal to a real process."""
    script = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from smallguests import *
from uringmig import MappedRamWriter, WriteOptions
def progress(snapshot):
    if snapshot.completed_bytes or snapshot.in_flight_bytes:
        for delay in (0.01, 0.02, 0.03):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
options = WriteOptions(rate=4 << 20, block_size=64 << 10)
with MappedRamWriter({str(tmp_path / "vm")!r}, ramblocks_of(make_guest()), options=options,
                     progress=progress) as writer:
    writer.write_all()
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == -signal.SIGINT, child.stderr
    assert left_in(tmp_path) == []


def test_the_disks_error_is_told_where_clean_up_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that goes read-only at its first error lets nothing be removed any more."""
    factory = faulty(PwriteEngine, lambda _: [-errno.EIO])
    before = len(list(Path("/proc/self/fd").iterdir()))

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StorageError) as caught:
        save(tmp_path / "vm", engine=EngineChoice("faulty", factory))
    monkeypatch.undo()
    assert caught.value.errno == errno.EIO
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert left_in(tmp_path) == ["vm.partial"]
    check_image(tmp_path / "vm", save(tmp_path / "vm"))
    assert left_in(tmp_path) == ["vm", "vm.manifest.json"]
