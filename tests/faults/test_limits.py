"""A process that is given too little: one line, exit 6 (5 for a file too large), and no traceback.

Limits on processes do not hold for root, so these runs have a user of their own that may read
everything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batchjobs import (
    children,
    first_event,
    job,
    job_ends,
    make_image,
    run_jobs,
    start_jobs,
    write_jobs,
)
from commandline import PROGRAM, Ended, finish

from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Examine, Outcome
from uringmig.batch.pool import LocalPool
from uringmig.units import MiB

#: Nobody else's processes count against it.
_USER = "64321"
_CAPABILITIES = "+dac_override,+dac_read_search,+chown,+fowner"
AS_USER = (
    "setpriv", "--reuid", _USER, "--regid", _USER, "--clear-groups",
    # access(2) would leave capabilities out of account otherwise.
    "--securebits", "+no_setuid_fixup",
    f"--inh-caps={_CAPABILITIES}", f"--ambient-caps={_CAPABILITIES}",
)  # fmt: skip


def limited(limit: str, *arguments: object, prefix: tuple[str, ...] = ()) -> Ended:
    """Run the program with a resource limit, as ``nproc=3``."""
    command = [*prefix, "prlimit", f"--{limit}", *PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Two jobs of one image that everybody may read."""
    make_image(tmp_path / "vm.mig", size=4 * MiB)
    for name in ("vm.mig", "vm.mig.manifest.json"):
        (tmp_path / name).chmod(0o644)
    return write_jobs(
        tmp_path,
        job("hot", "image = 'vm.mig'"),
        job("cold", "image = 'vm.mig'", tier="cold"),
        defaults="retries = 1",
    )


def test_no_thread_to_be_had(jobs: Path) -> None:
    """Not even numpy's own, when it is loaded."""
    image = jobs.with_name("vm.mig")
    done = limited("nproc=1", "verify", image, prefix=AS_USER)
    assert done.code == 6
    assert done.err.count("\n") == 1
    assert "thread" in done.err
    assert limited("nproc=1", "inspect", image, prefix=AS_USER).code == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_too_few_processes_for_a_run(jobs: Path, count: int) -> None:
    """Workers, their threads, or both cannot be started: the jobs fail one by one, with 6."""
    done = limited(f"nproc={count}", "archive", "run", jobs, "--json", prefix=AS_USER)
    ends = job_ends(done)
    failed = [one for one in ends.values() if one["stage"] == "failed"]
    assert done.code == (6 if failed else 0)
    assert {one["kind"] for one in failed} <= {"LimitError"}
    assert all(one["attempts"] == 2 for one in failed), "what others give back may suffice"


@pytest.mark.parametrize(
    ("limit", "codes"),
    [
        ("as=104857600", {6}), ("as=157286400", {6}), ("as=209715200", {6, 0}),
        ("nofile=8", {6}), ("nofile=10", {6}), ("fsize=1024000", {5}), ("fsize=100", {5}),
    ],
)  # fmt: skip
def test_too_little_memory_too_few_files_too_small_files(
    jobs: Path, limit: str, codes: set[int]
) -> None:
    done = limited(limit, "archive", "run", jobs)
    assert done.code in codes
    assert all(line.startswith("uringmig: ") for line in done.err.splitlines())
    assert not list(jobs.with_name("archive").glob("*.mig*"))


def test_a_killed_worker_is_told_as_want_of_memory_and_tried_again_alone(tmp_path: Path) -> None:
    """As the kernel kills for memory: beside no other job the next attempt has more of it."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(
        tmp_path,
        job("big", "image = 'vm.mig'", rate="8M", retries=1),
        job("other", "image = 'vm.mig'", rate="4M"),
    )
    process = start_jobs(path, "--workers", "2")
    for name in ("big", "other"):
        first_event(process, "job", job=name, stage="running")
    first_event(process, "progress", job="big", phase="write")
    worker = _writing(tmp_path / "archive", "big", children(process.pid))
    os.kill(worker, signal.SIGKILL)
    told = first_event(process, "job", job="big", stage="waiting")
    assert "perhaps because memory ran out" in told["error"]
    first_event(process, "job", job="other", stage="done")
    first_event(process, "job", job="big", stage="running")
    assert finish(process).code == 0


def test_a_worker_killed_again_and_again_is_6(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("big", "image = 'vm.mig'", rate="2M", retries=0))
    process = start_jobs(path)
    first_event(process, "progress", job="big", phase="write")
    os.kill(_writing(tmp_path / "archive", "big", children(process.pid)), signal.SIGKILL)
    done = finish(process)
    assert done.code == 6
    assert "perhaps because memory ran out" in done.err
    assert run_jobs(path).code == 0


def test_a_worker_that_we_kill_says_nothing_of_memory(tmp_path: Path) -> None:
    """The pool's own SIGKILL, of a worker that did not heed SIGTERM."""
    make_image(tmp_path / "vm.mig", size=MiB)
    order = parse_jobs(
        f'[[jobs]]\nname = "a"\narchive = "/a"\nsource = {{ image = "{tmp_path}/vm.mig" }}\n',
        path="/j.toml",
    ).jobs[0]
    pool = LocalPool(1, command=(sys.executable, "-c", "import time; time.sleep(1000)"))
    try:
        pool.submit(Examine(key="a", job=order), host=None)
        time.sleep(0.1)
        pool.stop("a", at_once=True)
        outcomes: list[Outcome] = []
        while not outcomes:
            outcomes += [one for one in pool.poll(1.0) if isinstance(one, Outcome)]
    finally:
        pool.close()
    assert "memory" not in outcomes[0].error


def _writing(archive: Path, name: str, workers: list[int]) -> int:
    """The worker that has a job's partial file open."""
    for worker in workers:
        for link in Path(f"/proc/{worker}/fd").iterdir():
            if f"{archive}/{name}-" in str(link.readlink()):
                return worker
    raise AssertionError(f"nobody writes {name}")
