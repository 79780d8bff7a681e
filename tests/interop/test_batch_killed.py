"""Archive runs of a running VM, killed at any moment: it runs, and the entry is whole or not there.

Of the processes that there are (runner, worker, guardian) any may be killed, alone or with others.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batchjobs import (
    check_archive,
    children,
    first_event,
    job,
    job_ends,
    kill,
    run_jobs,
    start_jobs,
    wait_until_gone,
    write_jobs,
)
from commandline import finish
from realguest import shared_path

from uringmig.qemu.guardian import standing_still
from uringmig.qemu.guardprocess import GO_ON, NOTES
from uringmig.testing.machine import Machine
from uringmig.units import MiB


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A running machine with something in its RAM."""
    shared = shared_path()
    folder = tmp_path_factory.mktemp("m")
    with Machine(folder, memory_bytes=128 * MiB, shared=shared) as machine:
        with shared.open("r+b") as file:
            file.seek(16 * MiB)
            file.write(np.random.default_rng(4).bytes(64 * MiB))
        yield machine


def kept(machine: Machine) -> object:
    monitor = machine.monitor
    return monitor.capabilities(), monitor.parameters(), monitor.descriptors()


def wait_until_given_back(machine: Machine, before: object) -> None:
    """The guest runs, and QEMU keeps what it kept before."""
    while machine.monitor.run_state() != "running" or kept(machine) != before:
        time.sleep(0.005)


def jobs_of(machine: Machine, folder: Path, **settings: object) -> Path:
    one = job("vm", f"qmp = '{machine.qmp_path}'", **settings)
    return write_jobs(folder, one, defaults='entry = "{name}-{time}"\nlevel = 1')


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("victim", ["runner", "worker", "both"])
def test_killed_at_random_moments(victim: str, tier: str, machine: Machine, tmp_path: Path) -> None:
    """Before, in and after both passes; the next run makes its entry, and every entry is whole."""
    source = random.Random(f"{victim} {tier}")
    before = kept(machine)
    path = jobs_of(machine, tmp_path, tier=tier, retries=3)
    for _ in range(5):
        process = start_jobs(path)
        time.sleep(source.uniform(0.3, 1.6))
        workers = children(process.pid)
        if victim != "runner":
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        if victim == "worker":
            ended = finish(process)
            assert ended.code == 0, ended.err
        else:
            kill(process)
        wait_until_given_back(machine, before)
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    assert kept(machine) == before
    entries = check_archive(tmp_path / "archive")
    assert job_ends(ended)["vm"]["entry"] in entries


def caught_standing_still(machine: Machine, path: Path) -> tuple[subprocess.Popen[str], int, int]:
    """A run whose guest stands still: runner, and its stopped worker with its stopped guardian."""
    while True:
        process = start_jobs(path)
        while process.poll() is None and machine.monitor.run_state() == "running":
            pass
        workers = children(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        for worker in workers:
            guardians = children(worker)
            for guardian in guardians:
                os.kill(guardian, signal.SIGSTOP)
                if machine.monitor.run_state() == "paused":
                    return process, worker, guardian
                os.kill(guardian, signal.SIGCONT)
        for worker in workers:  # it was over a moment before
            os.kill(worker, signal.SIGCONT)
        finish(process)


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_worker_killed_while_the_guest_stands_still(
    tier: str, machine: Machine, tmp_path: Path
) -> None:
    """The guardian lets the guest go on; the next attempt makes the entry."""
    before = kept(machine)
    process, worker, guardian = caught_standing_still(
        machine, jobs_of(machine, tmp_path, tier=tier, retries=3)
    )
    os.kill(worker, signal.SIGKILL)
    os.kill(guardian, signal.SIGCONT)
    ended = finish(process)
    assert ended.code == 0, ended.err
    assert job_ends(ended)["vm"]["attempts"] > 1
    wait_until_given_back(machine, before)
    check_archive(tmp_path / "archive")


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_somebody_lets_the_guest_go_on(tier: str, machine: Machine, tmp_path: Path) -> None:
    """What was read may be of two moments: no entry is made, and the guest stays theirs."""
    path = jobs_of(machine, tmp_path, tier=tier, retries=0)
    process, worker, guardian = caught_standing_still(machine, path)
    machine.monitor.execute("cont")
    for pid in (worker, guardian):
        os.kill(pid, signal.SIGCONT)
    ended = finish(process)
    assert ended.code == 4
    assert "another client let the guest go on" in job_ends(ended)["vm"]["error"]
    assert not check_archive(tmp_path / "archive")
    assert machine.monitor.run_state() == "running"


def test_another_save_in_between(machine: Machine, tmp_path: Path) -> None:
    """It may have stopped the guest: its standstill is waited for, and the copy is not lost."""
    process = start_jobs(jobs_of(machine, tmp_path, rate="32M", retries=0))
    first_event(process, "progress", job="vm", phase="write")
    with standing_still(machine.monitor) as still:
        still.stop()
        # Much longer than the copy of some MiB takes.
        while first_event(process, "progress", job="vm", phase="write")["share"] < 0.99:
            assert machine.monitor.run_state() == "paused"
        time.sleep(1)
        still.go_on()
    ended = finish(process)
    assert ended.code == 0, ended.err
    assert job_ends(ended)["vm"]["archived"]["stopped_seconds"] > 0
    wait_until_given_back(machine, kept(machine))
    check_archive(tmp_path / "archive")


def test_guardian_killed_while_the_guest_stands_still(machine: Machine, tmp_path: Path) -> None:
    """It is not missed: the worker lets the guest go on itself."""
    before = kept(machine)
    process, worker, guardian = caught_standing_still(machine, jobs_of(machine, tmp_path))
    os.kill(guardian, signal.SIGKILL)
    os.kill(worker, signal.SIGCONT)
    ended = finish(process)
    assert ended.code == 0, ended.err
    assert job_ends(ended)["vm"]["attempts"] == 1
    wait_until_given_back(machine, before)


def test_all_of_ours_killed_while_the_guest_stands_still(machine: Machine, tmp_path: Path) -> None:
    """Runner, worker and guardian at once: the next run lets the guest go on first, and says so."""
    before = kept(machine)
    path = jobs_of(machine, tmp_path)
    process, worker, guardian = caught_standing_still(machine, path)
    for pid in (guardian, worker):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()
    for pid in (guardian, worker):
        wait_until_gone(pid)
    assert machine.monitor.run_state() == "paused"
    assert NOTES[GO_ON] in [opaque for _, opaque, _ in machine.monitor.descriptors()]
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    assert any("let go on first" in note for note in job_ends(ended)["vm"]["notes"])
    wait_until_given_back(machine, before)
    check_archive(tmp_path / "archive")
