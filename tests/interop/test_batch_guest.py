"""A running guest archived by jobs: whole in both tiers, and never left stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

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
    write_jobs,
)
from commandline import finish, uringmig
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on, shared_path

from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine


@pytest.fixture(scope="module")
def live(
    guest: GuestImage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, str]]:
    """One booted guest for all tests here, and its digest."""
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=GUEST_BYTES,
        shared=shared_path(),
        guest=guest,
        fill_bytes=FILL_BYTES,
    ) as machine:
        yield machine, machine.console.wait_until_ready()


def assert_runs(machine: Machine) -> None:
    assert machine.monitor.run_state() == "running"
    assert_goes_on(machine)


def test_a_running_guest_in_both_tiers_restored_from_the_cold_one(
    live: tuple[Machine, str], guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    machine, digest = live
    path = write_jobs(
        tmp_path,
        job("hot", f"qmp = '{machine.qmp_path}'", vm="guest", verify=True),
        job("cold", f"qmp = '{machine.qmp_path}'", vm="guest", tier="cold", level=1),
        defaults='entry = "{name}"\nretries = 5',
    )
    plan = run_jobs(path, "--dry-run").result()["plan"]["rows"]
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    assert_runs(machine)
    ends = job_ends(ended)
    for row, one in zip(plan, ends.values(), strict=True):
        archived = one["archived"]
        assert archived["kind"] == row["kind"] == "qmp"
        assert archived["memory_bytes"] > GUEST_BYTES
        assert archived["allocated_bytes"] <= 1.2 * row["file_bytes"]
        assert archived["stopped_seconds"] > 0
    assert ends["cold"]["archived"]["ratio"] > 1.2
    entries = check_archive(tmp_path / "archive")
    assert entries["hot"].condition == "good"
    target = start_machine(memory_bytes=GUEST_BYTES, guest=guest, incoming=True)
    done = uringmig(
        "archive", "restore", tmp_path / "archive", "cold", "--qmp", target.qmp_path,
        "--then", "cont",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert target.console.digest() == digest


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_a_running_guest_in_small_blocks_read_back(
    live: tuple[Machine, str], guest: GuestImage, start_machine: StartMachine, tmp_path: Path,
    tier: str,
) -> None:  # fmt: skip
    """Two pages a request, compared with the disk; what is told of it is told everywhere."""
    machine, digest = live
    path = write_jobs(
        tmp_path,
        job("vm", f"qmp = '{machine.qmp_path}'", tier=tier, block_size="8K", verify=True),
        defaults='entry = "{name}"\nlevel = 1',
    )
    ended = run_jobs(path, "--report", tmp_path / "report")
    assert ended.code == 0, ended.err
    assert_runs(machine)
    end = job_ends(ended)["vm"]
    archived = end["archived"]
    assert archived["verified"]
    assert archived["stopped_seconds"] > 0
    assert (end["notes"], end["warnings"]) == (archived["notes"], archived["warnings"])
    [report] = (tmp_path / "report").glob("*.json")
    assert json.loads(report.read_bytes())["jobs"] == [end]
    entry = check_archive(tmp_path / "archive")["vm"]
    assert (entry.condition, entry.tier) == ("good", tier)
    manifest = json.loads(Path(entry.manifest).read_bytes())
    assert manifest["settings"]["block_size"] == 8 << 10
    target = start_machine(memory_bytes=GUEST_BYTES, guest=guest, incoming=True)
    done = uringmig(
        "archive", "restore", tmp_path / "archive", "vm", "--qmp", target.qmp_path,
        "--then", "cont",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert target.console.digest() == digest


@pytest.mark.parametrize("victim", ["runner", "worker"])
def test_killed_while_it_holds_the_guest(
    live: tuple[Machine, str], tmp_path: Path, victim: str
) -> None:
    """QEMU's stream closes, so it lets the guest run on; the next attempt starts anew."""
    machine, _ = live
    path = write_jobs(tmp_path, job("vm", f"qmp = '{machine.qmp_path}'", rate="32M", retries=5))
    process = start_jobs(path)
    first_event(process, "progress", job="vm", phase="write")
    if victim == "runner":
        kill(process)
        deadline = time.monotonic() + 60
        while machine.monitor.run_state() != "running":
            assert time.monotonic() < deadline, "the guest stands still"
            time.sleep(0.05)
        path.write_text(path.read_text())
        ended = run_jobs(path)
    else:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        ended = finish(process)
    assert ended.code == 0, ended.err
    assert job_ends(ended)["vm"]["stage"] == "done"
    assert len(check_archive(tmp_path / "archive")) == 1
    assert_runs(machine)


def test_stopped_by_a_signal_or_a_limit_while_it_holds_the_guest(
    live: tuple[Machine, str], tmp_path: Path
) -> None:
    machine, _ = live
    path = write_jobs(tmp_path, job("vm", f"qmp = '{machine.qmp_path}'", rate="8M"))
    process = start_jobs(path)
    first_event(process, "progress", job="vm", phase="write")
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 128 + signal.SIGTERM
    assert_runs(machine)
    limited = write_jobs(
        tmp_path, job("vm", f"qmp = '{machine.qmp_path}'", rate="8M", timeout="2s")
    )
    ended = run_jobs(limited)
    assert ended.code == 4
    assert job_ends(ended)["vm"]["kind"] == "Timeout"
    assert not check_archive(tmp_path / "archive")
    assert_runs(machine)
