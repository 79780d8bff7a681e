"""Signals at every step of `archive run` and `archive restore`, in runner and workers alike.

A job is done and its entry whole, or it is not and there is none; the run says 128+N if, and only
if, it has stopped a job; and the next run brings what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from commandline import finish
from smallguests import left_in
from strikes import Struck, sweep

from uringmig import verify
from uringmig.archive.entry import SUFFIXES
from uringmig.contents.opening import open_contents
from uringmig.image.manifest import Tier
from uringmig.units import MiB


def check_run(struck: Struck, folder: Path) -> str:
    """What became of the job; its entry and the exit code agree with it."""
    events = [json.loads(line) for line in struck.out.splitlines()]
    ends = [one for event in events if event["event"] == "summary" for one in event["jobs"]]
    entries = check_archive(folder / "archive") if (folder / "archive").exists() else {}
    if not ends:
        assert struck.stopped, struck.err
        assert not entries
        return "stopped"
    (end,) = ends
    stage = str(end["stage"])
    assert (stage == "stopped") == struck.stopped, struck.err
    assert (stage == "done") == (struck.code in (0, 1)) == bool(entries), struck.err
    return stage


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("call", ["fdatasync", "rename"])
def test_a_worker_struck_at_each_step(tier: Tier, call: str, tmp_path: Path) -> None:
    """Only it is: its job is done, or failed as what nobody asked for, and the run says which."""
    make_image(tmp_path / "vm.mig", size=4 * MiB)
    path = write_jobs(
        tmp_path,
        job("a", "image = 'vm.mig'", tier=tier, verify=True, retries=0),
        defaults='entry = "{name}"',
    )
    image = tmp_path / "archive" / f"a{SUFFIXES[tier]}"
    own = [Path(f"{image}{suffix}") for suffix in (".partial", ".manifest.json.partial")]
    stages = set()
    for struck in sweep(tmp_path, call, "archive", "run", path, "--json", only=own):
        stages.add(check_run(struck, tmp_path))
        again = run_jobs(path)
        assert again.code == 0, again.err
        assert list(check_archive(tmp_path / "archive")) == ["a"]
        shutil.rmtree(tmp_path / "archive")
    assert stages == ({"done"} if call == "rename" else {"failed", "done"}), stages


def test_a_runner_struck_at_each_sync(tmp_path: Path) -> None:
    """It and its worker are, as by a service manager."""
    make_image(tmp_path / "vm.mig", size=4 * MiB)
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), defaults='entry = "{name}"')
    for struck in sweep(tmp_path, "fdatasync", "archive", "run", path, "--json", every=4):
        check_run(struck, tmp_path)
        assert run_jobs(path).code == 0
        assert list(check_archive(tmp_path / "archive")) == ["a"]
        shutil.rmtree(tmp_path / "archive")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_reading_back_ends_by_a_signal_and_the_entry_stays(
    number: signal.Signals, tmp_path: Path
) -> None:
    """It is published: the job is done, not compared, and nobody waits for the end of that."""
    make_image(tmp_path / "vm.mig", size=16 * MiB, pattern="dense")
    path = write_jobs(
        tmp_path, job("a", "image = 'vm.mig'", verify=True, rate="4M", depth=1, channels=1)
    )
    process = start_jobs(path)
    first_event(process, "progress", job="a", phase="verify")
    for worker in children(process.pid):
        os.kill(worker, number)
    ended = finish(process)
    assert ended.code == 1, ended.err
    end = job_ends(ended)["a"]
    assert (end["stage"], end["archived"]["verified"]) == ("done", False)
    assert any(
        f"not read back to its end: stopped by {number.name}" in one for one in end["warnings"]
    )
    (entry,) = check_archive(tmp_path / "archive").values()
    assert entry.condition == "unchecked"


def test_a_runner_that_is_stopped_ends_the_reading_back_too(tmp_path: Path) -> None:
    """All its jobs are done: it has stopped none, and does not say so."""
    make_image(tmp_path / "vm.mig", size=16 * MiB, pattern="dense")
    path = write_jobs(
        tmp_path, job("a", "image = 'vm.mig'", verify=True, rate="4M", depth=1, channels=1)
    )
    process = start_jobs(path)
    first_event(process, "progress", job="a", phase="verify")
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert (ended.code, job_ends(ended)["a"]["stage"]) == (1, "done"), ended.err
    assert len(check_archive(tmp_path / "archive")) == 1


@pytest.mark.parametrize("kind", ["hot", "plain"])
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "rename", "fsync"])
def test_a_restore_struck_at_each_step(kind: str, call: str, tmp_path: Path) -> None:
    """The file is there, whole, and 0 is said; or it is not and 128+N is."""
    make_image(tmp_path / "vm.mig", size=4 * MiB)
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), defaults='entry = "{name}"')
    assert run_jobs(path).code == 0
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "vm"
    ends = []
    arguments = ("archive", "restore", tmp_path / "archive", "a", out, "--as", kind)
    for struck in sweep(tmp_path, call, *arguments):
        if struck.stopped:
            assert left_in(folder) == []
            assert struck.err == f"uringmig: stopped by {struck.number.name}\n"
        else:
            assert (struck.code, struck.err) == (0, "")
            if kind == "hot":
                assert not verify(out).mismatches
            with open_contents(out) as contents:
                assert contents.device_state().tail
        ends.append(struck.stopped)
        for left in folder.iterdir():
            left.unlink()
    assert ends == sorted(ends, reverse=True), ends
