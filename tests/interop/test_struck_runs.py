"""Signals at `archive run` of a running QEMU: at its publication, and when its guest goes on.

Whatever is struck: the guest runs, QEMU has its settings, the entry is whole or there is none,
nothing half-made is left, and the run says 128+N if, and only if, it has stopped the job.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from batchjobs import check_archive, children, first_event, job, job_ends, write_jobs
from commandline import Ended, finish
from realguest import shared_path
from smallguests import left_in
from strikes import NUMBERS, slowed, strike

from uringmig.testing.machine import Machine
from uringmig.units import MiB

#: What QEMU is told when its guest is let go on, and when the note of it is taken back.
GO_ON = r'"{\"execute\": \"cont\"'
TAKE_BACK = r'"{\"execute\": \"remove-fd\"'


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A running machine with something in its RAM."""
    shared = shared_path()
    folder = tmp_path_factory.mktemp("m")
    with Machine(folder, memory_bytes=32 * MiB, shared=shared) as machine:
        with shared.open("r+b") as file:
            file.seek(16 * MiB)
            file.write(np.random.default_rng(4).bytes(8 * MiB))
        yield machine


@pytest.fixture
def jobs(machine: Machine, tmp_path: Path) -> Path:
    """A job file for it, whose entry is ``vm``."""
    one = job("vm", f"qmp = '{machine.qmp_path}'", retries=0)
    return write_jobs(tmp_path, one, defaults='entry = "{name}"')


def files(folder: Path) -> list[Path]:
    """What the entry's files are called before they have their names."""
    image = folder / "archive" / "vm.mig"
    return [Path(f"{image}.partial"), Path(f"{image}.manifest.json.partial")]


def kept(machine: Machine) -> object:
    monitor = machine.monitor
    settings = monitor.capabilities(), monitor.parameters(), monitor.descriptors()
    return monitor.run_state(), settings


@contextmanager
def given_back(machine: Machine) -> Iterator[None]:
    """See that QEMU has its guest and its settings as before."""
    before = kept(machine)
    yield
    assert kept(machine) == before


def stage_of(ended: Ended, folder: Path) -> str:
    """What became of the job; archive and exit code agree with it."""
    end = job_ends(ended)["vm"]
    stage = str(end["stage"])
    assert (stage == "stopped") == (ended.code > 128), ended.err
    assert (stage == "done") == (ended.code == 0), ended.err
    if stage == "done":
        # Told by who made it, and not found to be there by the runner.
        assert (end["archived"]["stopped_seconds"] > 0, end["warnings"]) == (True, [])
    entries = list(check_archive(folder / "archive"))
    assert entries == (["vm"] if stage == "done" else [])
    assert not [name for name in left_in(folder / "archive") if "partial" in name]
    return stage


@pytest.mark.parametrize(
    ("call", "when", "stage"),
    [("fdatasync", 1, "failed"), ("fdatasync", 2, "done"), ("rename", 1, "done"),
     ("rename", 2, "done")],
)  # fmt: skip
def test_a_worker_struck_while_it_publishes(
    machine: Machine, jobs: Path, tmp_path: Path, call: str, when: int, stage: str
) -> None:
    """It alone is: the image's sync comes before the point of no return, all else after it."""
    with given_back(machine):
        struck = strike(
            *(tmp_path, call, when, signal.SIGTERM, "archive", "run", jobs, "--json"),
            only=files(tmp_path),
        )
        assert struck.hit
    assert stage_of(struck, tmp_path) == stage


def telling(lines: tuple[str, ...], words: str) -> int:
    """Which of the worker's ``sendto`` is the last one of these words, by a run's log; from 1."""
    told = [line for line in lines if words in line][-1]
    process = told.split()[0]
    own = [line for line in lines if line.split()[0] == process and "sendto(" in line]
    return own.index(told) + 1


def test_struck_while_the_guest_is_let_go_on(machine: Machine, jobs: Path, tmp_path: Path) -> None:
    """The worker alone, just before its entry is finished: the guest goes on, and it gives up."""
    arguments = ("archive", "run", jobs, "--json")
    undisturbed = strike(tmp_path, "sendto", 1000, signal.SIGTERM, *arguments)
    assert not undisturbed.hit
    first = telling(undisturbed.lines, GO_ON)
    for later in (-1, 0, 1):
        shutil.rmtree(tmp_path / "archive")
        with given_back(machine):
            struck = strike(tmp_path, "sendto", first + later, signal.SIGTERM, *arguments)
            assert struck.hit
            assert any(GO_ON in line for line in struck.lines)
        assert stage_of(struck, tmp_path) == "failed"


def test_struck_while_a_stopped_guest_is_given_up(machine: Machine, tmp_path: Path) -> None:
    """Cleaning up is not torn apart: QEMU keeps nothing of ours, and the guest stays stopped."""
    slow = job("vm", f"qmp = '{machine.qmp_path}'", retries=0, rate="1M", timeout="1s")
    jobs = write_jobs(tmp_path, slow, defaults='entry = "{name}"')
    arguments = ("archive", "run", jobs, "--json")
    machine.monitor.execute("stop")
    try:
        undisturbed = strike(tmp_path, "sendto", 1000, signal.SIGTERM, *arguments)
        assert stage_of(undisturbed, tmp_path) == "failed"
        first = telling(undisturbed.lines, TAKE_BACK)
        for later in (-1, 0):
            shutil.rmtree(tmp_path / "archive")
            with given_back(machine):
                struck = strike(tmp_path, "sendto", first + later, signal.SIGTERM, *arguments)
                assert struck.hit
            assert stage_of(struck, tmp_path) == "failed"
    finally:
        machine.monitor.execute("cont")


@pytest.mark.parametrize(("call", "stage"), [("fdatasync", "stopped"), ("rename", "done")])
def test_a_runner_struck_while_its_worker_publishes(
    machine: Machine, jobs: Path, tmp_path: Path, call: str, stage: str
) -> None:
    """Before the point of no return the job is stopped; after it, it is done, and 0 is said."""
    number = NUMBERS[call == "rename"]
    with given_back(machine):
        process = slowed(tmp_path, call, "archive", "run", jobs, "--json", only=files(tmp_path)[:1])
        if call == "fdatasync":
            first_event(process, "progress", job="vm", phase="sync")
        while call == "rename" and not (tmp_path / "archive" / "vm.mig").exists():
            time.sleep(0.01)
        (runner,) = children(process.pid)
        os.kill(runner, number)
        ended = finish(process)
    assert stage_of(ended, tmp_path) == stage
    assert ended.code == (0 if stage == "done" else 128 + number)
