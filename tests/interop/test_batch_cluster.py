"""Jobs on a real dask scheduler with real worker processes, one host's resource each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from batchjobs import (
    check_archive,
    children,
    first_event,
    job,
    job_ends,
    make_image,
    run_jobs,
    start_jobs,
    write_jobs,
)
from commandline import finish, uringmig

from uringmig.batch.cluster import ClusterPool
from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Examine, Message, Outcome
from uringmig.units import MiB

NODES = ("node1", "node2", "node3")


@dataclass
class Cluster:
    """A scheduler's address, and its workers by the host they stand for."""

    address: str
    workers: dict[str, subprocess.Popen[bytes]]


def dask(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distributed.cli." + str(arguments[0])]
    return subprocess.Popen([*command, *map(str, arguments[1:])], stderr=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and three workers without nannies: a killed one stays dead."""
    folder = tmp_path_factory.mktemp("dask")
    with ExitStack() as stack:
        told = folder / "scheduler.json"
        arguments = ("--no-dashboard", "--host", "127.0.0.1", "--port", "0")
        scheduler = dask("dask_scheduler", *arguments, "--scheduler-file", told)
        stack.callback(ended, scheduler)
        while not told.exists() or not told.read_text().endswith("}"):
            assert scheduler.poll() is None, "the scheduler ended"
            time.sleep(0.05)
        workers = {}
        for node in NODES:
            workers[node] = dask(
                "dask_worker", "--scheduler-file", told, "--no-nanny", "--no-dashboard",
                "--nthreads", "2", "--resources", f"host:{node}=1", "--host", "127.0.0.1",
                "--local-directory", folder / node,
            )  # fmt: skip
            stack.callback(ended, workers[node])
        address = told.read_text().split('"address": "')[1].split('"')[0]
        yield Cluster(address, workers)


def test_each_job_runs_where_it_belongs_and_a_killed_worker_s_is_tried_again(
    tmp_path: Path, cluster: Cluster
) -> None:
    """Six jobs on three workers; node2's is killed in the middle and comes back later."""
    jobs = []
    for number in range(6):
        make_image(tmp_path / f"vm{number}.mig", seed=number)
        node = NODES[number % 3]
        rate = "3M" if number == 1 else "0"
        jobs.append(job(f"j{number}", f"image = 'vm{number}.mig'", host=node, rate=rate, retries=5))
    path = write_jobs(tmp_path, *jobs, defaults='entry = "{name}-{host}"')
    process = start_jobs(path, "--scheduler", cluster.address)
    first_event(process, "progress", job="j1", phase="write")
    victim = cluster.workers["node2"]
    (own,) = children(victim.pid)
    ended(victim)
    event = first_event(process, "job", job="j1", stage="waiting")
    assert "is gone" in event["error"]
    assert not Path(f"/proc/{own}/exe").exists(), "its job's process goes on without it"
    cluster.workers["node2"] = dask(
        "dask_worker", cluster.address, "--no-nanny", "--no-dashboard", "--nthreads", "2",
        "--resources", "host:node2=1", "--host", "127.0.0.1",
        "--local-directory", tmp_path / "again",
    )  # fmt: skip
    try:
        done = finish(process)
    finally:
        ended(cluster.workers["node2"])
    assert done.code == 0, done.err
    ends = job_ends(done)
    assert {one["stage"] for one in ends.values()} == {"done"}
    assert ends["j1"]["attempts"] >= 2
    assert ends["j0"]["attempts"] == 1
    entries = check_archive(tmp_path / "archive")
    assert sorted(entries) == sorted(f"j{n}-{NODES[n % 3]}" for n in range(6))


def test_a_host_without_a_worker_and_a_signal(tmp_path: Path, cluster: Cluster) -> None:
    make_image(tmp_path / "vm.mig", size=16 * MiB)
    path = write_jobs(
        tmp_path,
        job("lost", "image = 'vm.mig'", host="node9", retries=0),
        job("slow", "image = 'vm.mig'", host="node1", rate="1M"),
        job("any", "image = 'vm.mig'"),
    )
    process = start_jobs(path, "--scheduler", cluster.address)
    first_event(process, "job", job="any", stage="done")
    first_event(process, "progress", job="slow", phase="write")
    os.kill(process.pid, signal.SIGTERM)
    done = finish(process)
    assert done.code == 128 + signal.SIGTERM
    ends = job_ends(done)
    stages = {name: one["stage"] for name, one in ends.items()}
    assert stages == {"lost": "failed", "slow": "stopped", "any": "done"}
    assert "no dask worker with the resource host:node9" in ends["lost"]["error"]
    assert len(check_archive(tmp_path / "archive")) == 1
    again = run_jobs(path, "--scheduler", cluster.address, "--dry-run")
    assert [bool(row["done"]) for row in again.result()["plan"]["rows"]] == [False, False, True]


def test_a_worker_that_dies_before_it_has_begun(tmp_path: Path, cluster: Cluster) -> None:
    """Its task would wait for ever for another worker of that host, which never comes."""
    make_image(tmp_path / "vm.mig", size=MiB)
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'", host="node1"))
    (wanted,) = parse_jobs(path.read_text(), path=str(path)).jobs
    pool = ClusterPool(cluster.address)
    try:
        while pool.refusal("node1") is not None:
            time.sleep(0.1)
        victim = cluster.workers["node1"]
        victim.send_signal(signal.SIGSTOP)
        pool.submit(Examine(key="a", job=wanted), host="node1")
        assert pool.poll(2.0) == []
        ended(victim)
        outcomes: list[Message] = []
        while not outcomes:
            outcomes = pool.poll(1.0)
    finally:
        pool.close()
    (outcome,) = outcomes
    assert isinstance(outcome, Outcome)
    assert (outcome.ending, outcome.may_pass) == ("lost", True)
    assert "gone" in outcome.error


def test_no_scheduler_there(tmp_path: Path) -> None:
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"))
    told = uringmig("archive", "run", path, "--scheduler", "tcp://127.0.0.1:1", "--dry-run")
    assert told.code == 4
    assert "tcp://127.0.0.1:1: no dask scheduler" in told.err
    both = uringmig("archive", "run", path, "--scheduler", "tcp://127.0.0.1:1", "--workers", "2")
    assert both.code == 2
