"""Archive jobs of VMs whose process may not be read: held by a migration, in two passes as well."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from batchjobs import check_archive, job, job_ends, write_jobs
from commandline import Ended
from otheruser import NOBODY, as_nobody, shared_folder
from realguest import put_to_sleep, shared_path

from uringmig.testing.machine import Machine
from uringmig.units import MiB


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder of another user's."""
    with shared_folder() as folder:
        (folder / "theirs").mkdir()
        (folder / "theirs").chmod(0o777)
        yield folder


def machine_in(room: Path, **arguments: object) -> Machine:
    """A running machine that everybody may talk to, and whose RAM everybody may map."""
    shared = arguments.get("shared")
    machine = Machine(room / "m", **arguments)  # type: ignore[arg-type]
    machine.qmp_path.chmod(0o777)
    if isinstance(shared, Path):
        with shared.open("r+b") as file:
            file.seek(16 * MiB)
            file.write(np.random.default_rng(4).bytes(24 * MiB))
        shared.chmod(0o644)
    return machine


def run_as_nobody(room: Path, machine: Machine, **settings: object) -> Ended:
    one = job("vm", f"qmp = '{machine.qmp_path}'", retries=0, **settings)
    path = write_jobs(room / "theirs", one, defaults='entry = "{name}"\nlevel = 1')
    return as_nobody(room, "archive", "run", path, "--json")


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("state", ["running", "paused", "suspended"])
def test_shared_files_without_the_right_to_read_the_process(
    state: str, tier: str, room: Path
) -> None:
    """A note says why; the rate does not prolong the standstill; all is as it was found."""
    with machine_in(room, memory_bytes=64 * MiB, shared=shared_path()) as machine:
        if state == "paused":
            machine.monitor.execute("stop")
        elif state == "suspended":
            put_to_sleep(machine)
        monitor = machine.monitor
        before = monitor.capabilities(), monitor.parameters(), monitor.descriptors()
        ended = run_as_nobody(room, machine, rate="5M", tier=tier)
        assert ended.code == 0, ended.err
        end = job_ends(ended)["vm"]
        [note] = [one for one in end["notes"] if "by a migration" in one]
        assert f"no right to read the memory of process {machine.process.pid}" in note
        stopped, seconds = (end["archived"][name] for name in ("stopped_seconds", "seconds"))
        if state == "paused":
            assert stopped == 0
        else:
            assert 0 < stopped < seconds / 2
        while monitor.run_state() == "finish-migrate":
            time.sleep(0.01)
        assert monitor.run_state() == state
        assert (monitor.capabilities(), monitor.parameters(), monitor.descriptors()) == before
        check_archive(room / "theirs/archive")


def test_private_memory_that_may_not_be_read(room: Path) -> None:
    """Neither way: 6, and one line that says who is who and both reasons; nothing was stopped."""
    with machine_in(room, memory_bytes=64 * MiB, backend="memory-backend-ram") as machine:
        ended = run_as_nobody(room, machine)
        assert ended.code == 6
        error = job_ends(ended)["vm"]["error"]
        assert f"this is user {NOBODY}, QEMU is user 0" in error
        assert "and not by a migration: " in error
        assert machine.monitor.run_state() == "running"
        assert "STOP" not in machine.monitor.run_events()
