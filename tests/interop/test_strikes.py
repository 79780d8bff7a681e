"""Signals at every step of real saves and restores: published and 0 or 1, or nothing and 128+N.

Never the one with the other's code; and QEMU has its guest and its settings as before.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batchjobs import job, run_jobs, write_jobs
from commandline import uringmig
from imagereader import read_image
from realguest import StartMachine, shared_path
from smallguests import left_in
from strikes import NUMBERS, Struck, strike, sweep

from uringmig import StorageError, verify
from uringmig.testing.machine import Machine
from uringmig.units import MiB

#: Steps of a save: what it asks of QEMU; bitmaps and device state; syncs; those of publication.
STEPS = ("sendto", "pwrite64", "fdatasync", "rename", "fsync", "unlink")


@pytest.fixture
def machine(start_machine: StartMachine) -> Machine:
    """A running machine with something in its RAM."""
    shared = shared_path()
    machine = start_machine(memory_bytes=32 * MiB, shared=shared)
    with shared.open("r+b") as file:
        file.seek(16 * MiB)
        file.write(np.random.default_rng(2).bytes(4 * MiB))
    assert machine.monitor.run_state() == "running"
    return machine


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def check_save(struck: Struck, machine: Machine, folder: Path) -> None:
    """Whole or not there, as the exit code says."""
    if struck.stopped:
        assert left_in(folder) == []
        assert struck.err == f"uringmig: stopped by {struck.number.name}\n"
    else:
        assert (struck.code, struck.err) == (0, "")
        read_image(folder / "vm.mig")
        assert not verify(folder / "vm.mig").mismatches
        assert left_in(folder) == ["vm.mig", "vm.mig.manifest.json"]
    assert settled(machine) == "running"


def settled(machine: Machine) -> str:
    """QEMU's run state once it has left the one it passes through."""
    while (state := machine.monitor.run_state()) == "finish-migrate":
        time.sleep(0.01)
    return state


@pytest.mark.parametrize("call", STEPS)
def test_a_save_struck_at_each_step(call: str, machine: Machine, tmp_path: Path) -> None:
    """First always stopped, then always published: there is one point of no return."""
    folder = tmp_path / "out"
    folder.mkdir()
    before = machine.monitor.capabilities(), machine.monitor.parameters()
    ends = []
    arguments = ("save", "--qmp", machine.qmp_path, folder / "vm.mig")
    for struck in sweep(tmp_path, call, *arguments):
        check_save(struck, machine, folder)
        assert (machine.monitor.capabilities(), machine.monitor.parameters()) == before
        ends.append(struck.stopped)
        for path in folder.iterdir():
            path.unlink()
    assert ends == sorted(ends, reverse=True), ends
    # The last words to QEMU give the guest back, and every rename but the partial file's follows.
    if call in ("sendto", "fsync"):
        assert not ends[-1]
    if call in ("sendto", "pwrite64", "fdatasync"):
        assert ends[0]


def test_a_save_that_fails_struck_at_each_command(
    machine: Machine, full_folder: Path, tmp_path: Path
) -> None:
    """A signal while the guest is given back after an error: it still is, settings included."""
    before = machine.monitor.capabilities(), machine.monitor.parameters()
    arguments = ("save", "--qmp", machine.qmp_path, full_folder / "vm.mig")
    ends = []
    for struck in sweep(
        tmp_path, "sendto", *arguments, every=2, undisturbed=StorageError.exit_code
    ):
        assert struck.stopped or struck.code == StorageError.exit_code
        assert left_in(full_folder) == []
        assert (machine.monitor.capabilities(), machine.monitor.parameters()) == before
        assert settled(machine) == "running"
        ends.append(struck.stopped)
    assert ends[0]
    assert not ends[-1]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, qemu: str) -> Path:
    """A machine's image."""
    path = tmp_path_factory.mktemp("image") / "vm.mig"
    with Machine(
        tmp_path_factory.mktemp("m"), memory_bytes=32 * MiB, shared=shared_path(), paused=True
    ) as source:
        done = uringmig("save", "--qmp", source.qmp_path, path)
    assert done.code == 0, done.err
    return path


def check_load(struck: Struck, waiting: Machine, *, loaded: str) -> None:
    """QEMU has the guest, or it still waits (or failed to load a stream that was cut)."""
    state = settled(waiting)
    status = waiting.monitor.migration().status
    if struck.stopped:
        assert struck.err == f"uringmig: stopped by {struck.number.name}\n"
        assert (state, status in ("none", "failed")) == ("inmigrate", True)
    else:
        assert struck.code == 0, struck.err
        assert (state, status) == (loaded, "completed")


@pytest.mark.parametrize("way", ["load", "restore"])
def test_a_restore_into_qemu_struck_at_each_step(
    way: str, image: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Once QEMU reads the image itself, or has the stream's end, the guest is there and it is 0."""
    archive = archive_of(image, tmp_path)

    def wait() -> Machine:
        return start_machine(memory_bytes=32 * MiB, shared=shared_path(), incoming=True)

    ends = []
    waiting = wait()
    when = 0
    while True:
        when += 1
        to = ("--qmp", waiting.qmp_path, "--then", "cont")
        arguments = (
            ("load", image, *to) if way == "load" else ("archive", "restore", archive, "vm", *to)
        )
        struck = strike(tmp_path, "sendto", when, NUMBERS[when % 3], *arguments)
        if not struck.hit:
            break
        check_load(struck, waiting, loaded="running")
        ends.append(struck.stopped)
        if waiting.monitor.migration().status != "none":
            waiting.close()
            waiting = wait()
    assert struck.code == 0
    assert ends == sorted(ends, reverse=True), ends
    assert set(ends) == {True, False}


def archive_of(image: Path, folder: Path) -> Path:
    """An archive with the image as its entry ``vm``."""
    path = write_jobs(folder, job("vm", f"image = '{image}'", entry="vm"))
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    return folder / "archive"
