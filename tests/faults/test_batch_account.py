"""Metrics and reports of runs that could not begin: silence must not pass for success."""

from __future__ import annotations

import fcntl
import os
import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from batchjobs import first_event, job, make_image, run_jobs, start_jobs, write_jobs
from commandline import finish, uringmig
from loopdisk import mounted

from uringmig.units import MiB

SUCCEEDED = "uringmig_job_last_success_timestamp_seconds"


def metrics(path: Path) -> dict[str, float]:
    """Every sample, by its name with labels."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def newest(folder: Path) -> dict[str, Any]:
    """The newest report."""
    path = max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    described: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    assert path.with_suffix(".md").exists()
    return described


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A job file with two jobs, one of which has succeeded before; metrics and a report of it."""
    make_image(tmp_path / "vm.mig", size=MiB)
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), job("b", "image = 'none.mig'"))
    first = run_jobs(path, *files(tmp_path))
    assert first.code == 5
    found = metrics(tmp_path / "m.prom")
    assert found["uringmig_run_exit_code"] == 5
    assert found['uringmig_job_success{job="a"}'] == 1
    assert f'{SUCCEEDED}{{job="a"}}' in found
    assert f'{SUCCEEDED}{{job="b"}}' not in found
    return path


def files(folder: Path) -> list[object]:
    return ["--metrics-file", folder / "m.prom", "--report", folder / "report"]


def check_failed(folder: Path, code: int, *, reports: int = 2) -> dict[str, Any]:
    """The run has failed, its jobs with it, and job a's last success is still known."""
    found = metrics(folder / "m.prom")
    assert found["uringmig_run_exit_code"] == code
    assert found["uringmig_run_ended"] == 1
    assert found['uringmig_jobs{stage="waiting"}'] == found['uringmig_jobs{stage="done"}'] == 0
    assert found['uringmig_jobs{stage="failed"}'] > 0
    assert found['uringmig_job_success{job="a"}'] == 0
    assert found[f'{SUCCEEDED}{{job="a"}}'] < found["uringmig_run_updated_timestamp_seconds"]
    assert found["uringmig_run_started_timestamp_seconds"] > 1e9
    assert len(list((folder / "report").glob("*.json"))) == reports
    report = newest(folder / "report")
    assert report["exit_code"] == code
    assert report["error"]
    assert {one["stage"] for one in report["jobs"]} <= {"failed"}
    return report


def test_a_broken_job_file(done: Path) -> None:
    done.write_text("jobs = 3")
    ended = run_jobs(done, *files(done.parent))
    assert ended.code == 2
    report = check_failed(done.parent, 2)
    assert "expected `array`" in report["error"]


def test_no_job_file(done: Path) -> None:
    done.rename(done.with_name("away"))
    assert run_jobs(done, *files(done.parent)).code == 2
    check_failed(done.parent, 2)


def test_an_archive_that_is_taken(done: Path) -> None:
    """What the archive knows of the last success is asked even then."""
    (done.parent / "m.prom").unlink()
    with (done.parent / "archive" / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_jobs(done, *files(done.parent)).code == 5
    report = check_failed(done.parent, 5)
    assert {one["job"] for one in report["jobs"]} == {"a", "b"}
    assert {one["attempts"] for one in report["jobs"]} == {0}


def test_no_scheduler(done: Path) -> None:
    ended = run_jobs(done, *files(done.parent), "--scheduler", "tcp://127.0.0.1:1")
    assert ended.code == 4
    check_failed(done.parent, 4)


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig", size=24 * MiB, pattern="dense")
    with mounted("ext4", tmp_path, size=16 * MiB) as disk:
        path = write_jobs(tmp_path, job("a", "image = 'vm.mig'", archive=str(disk / "archive")))
        assert run_jobs(path, *files(tmp_path)).code == 5
    found = metrics(tmp_path / "m.prom")
    assert found['uringmig_jobs{stage="failed"}'] == found["uringmig_run_ended"] == 1
    assert found["uringmig_run_exit_code"] == 5
    assert "the plan needs" in newest(tmp_path / "report")["jobs"][0]["error"]


def test_a_signal(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'", rate="1M"))
    process = start_jobs(path, *files(tmp_path))
    first_event(process, "progress", job="a", phase="write")
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process).code == 128 + signal.SIGTERM
    assert metrics(tmp_path / "m.prom")["uringmig_run_exit_code"] == 128 + signal.SIGTERM
    assert newest(tmp_path / "report")["exit_code"] == 128 + signal.SIGTERM
    assert run_jobs(path, *files(tmp_path)).code == 0
    assert len(list((tmp_path / "report").glob("*.json"))) == 2, "an earlier report is gone"


def test_what_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    """Told before the night's work, and it costs no image."""
    make_image(tmp_path / "vm.mig", size=MiB)
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    report, places = tmp_path / "file" / "report", tmp_path / "folder"
    ended = uringmig("archive", "run", path, "--report", report, "--metrics-file", places)
    assert ended.code == 1
    warnings = [line for line in ended.err.splitlines() if "warning: " in line]
    assert any("report" in line for line in warnings)
    assert any("metrics" in line for line in warnings)
    assert "1 jobs: 1 done" in ended.out


def test_a_dry_run_leaves_both_alone(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig", size=MiB)
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"))
    assert run_jobs(path, *files(tmp_path), "--dry-run").code == 0
    assert not (tmp_path / "m.prom").exists()
    assert not (tmp_path / "report").exists()


def test_a_metrics_file_of_noise_is_replaced(done: Path) -> None:
    for noise in (b"\xff\x00" * 1000, f'{SUCCEEDED}{{job="x"}} 1e999\n'.encode()):
        (done.parent / "m.prom").write_bytes(noise)
        run_jobs(done, *files(done.parent))
        found = metrics(done.parent / "m.prom")
        assert f'{SUCCEEDED}{{job="a"}}' in found
        assert f'{SUCCEEDED}{{job="x"}}' not in found


def test_a_fallback_is_said_once_for_all_jobs(tmp_path: Path) -> None:
    """Without io_uring, as in a container: one line for three jobs, and in events and report."""
    make_image(tmp_path / "vm.mig", size=MiB)
    jobs = [job(name, "image = 'vm.mig'", verify=True) for name in "ab"]
    path = write_jobs(tmp_path, *jobs, job("c", "image = 'vm.mig'", tier="cold"))
    ended = uringmig("archive", "run", path, *files(tmp_path), refuse_ring=1)
    assert ended.code == 0
    notes = [line for line in ended.err.splitlines() if "using pwrite" in line]
    assert len(notes) == 1
    assert re.match(r"uringmig: note: job [abc]: using pwrite: io_uring: .*EPERM", notes[0])
    told = [one for one in newest(tmp_path / "report")["jobs"] if one["notes"]]
    assert len(told) == 3
