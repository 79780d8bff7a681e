"""kill -9 of the runner and of workers at random times: after the next run all is whole.

The number of rounds is URINGMIG_KILL_ROUNDS, a few by default; fifty take some minutes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from batchjobs import (
    check_archive,
    children,
    first_event,
    job,
    job_ends,
    kill,
    make_image,
    run_jobs,
    start_jobs,
    summary_of,
    write_jobs,
)
from commandline import finish
from loopdisk import mounted

from uringmig.units import MiB

ROUNDS = int(os.environ.get("URINGMIG_KILL_ROUNDS", "3"))
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of different sizes."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(NAMES):
        make_image(folder / f"{name}.mig", size=(16 + 8 * number) * MiB, seed=number)
    return folder


def jobs_in(folder: Path, sources: Path, *, rate: str) -> Path:
    jobs = [
        job(
            name, f"image = '{sources}/{name}.mig'", tier="cold" if name in "bd" else "hot",
            rate=rate, retries=9,
        )
        for name in NAMES
    ]  # fmt: skip
    return write_jobs(folder, *jobs)


def test_killed_at_random_times(tmp_path: Path, sources: Path) -> None:
    """The runner or one of its workers dies, up to three times; then a run is left alone."""
    clean = tmp_path / "clean"
    clean.mkdir()
    assert run_jobs(jobs_in(clean, sources, rate="0")).code == 0
    digests = {
        entry.vm: entry.content_digest for entry in check_archive(clean / "archive").values()
    }
    source = random.Random(20)
    killed: set[str] = set()
    for number in range(ROUNDS):
        folder = tmp_path / f"round-{number}"
        folder.mkdir()
        path = jobs_in(folder, sources, rate="16M")
        for _ in range(source.randint(1, 3)):
            process = start_jobs(path)
            time.sleep(source.uniform(0.3, 4))
            victim = source.choice(["runner", "worker"])
            workers = children(process.pid)
            if victim == "runner" or not workers:
                kill(process)
                killed.add("runner")
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(source.choice(workers), signal.SIGKILL)
            killed.add("worker")
            assert finish(process).code == 0
            break
        ended = run_jobs(path)
        assert ended.code == 0, ended.err
        entries = check_archive(folder / "archive")
        # A run that had ended is not gone on with: then each has two, of two times.
        assert {entry.vm for entry in entries.values()} == set(NAMES)
        for entry in entries.values():
            assert entry.content_digest == digests[entry.vm]
        shutil.rmtree(folder)
    assert killed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_was_done_is_skipped_and_a_copy_goes_on(
    tmp_path: Path, sources: Path, number: signal.Signals
) -> None:
    """Ended in the last third of the second copy: its durable chunks are not copied again.

    A clean stop, as of a reboot, keeps what a kill cannot take away.
    """
    make_image(tmp_path / "d.mig", size=384 * MiB, pattern="idle")
    path = write_jobs(
        tmp_path,
        job("a", f"image = '{sources}/a.mig'"),
        job("d", "image = 'd.mig'", rate="4M"),
    )
    process = start_jobs(path, "--workers", "1")
    first_event(process, "job", job="a", stage="done")
    journal = None
    while journal is None:
        journal = next((tmp_path / "archive").glob("d-*.journal"), None)
        assert process.poll() is None, "the copy ended before it had a journal"
        time.sleep(0.02)
    if number == signal.SIGKILL:
        kill(process)
    else:
        process.send_signal(number)
        assert finish(process).code == 128 + number
    assert list((tmp_path / "archive").glob("d-*.partial"))
    ended = run_jobs(path)
    assert ended.code == 0
    assert summary_of(ended)["resumed"]
    ends = job_ends(ended)
    assert (ends["a"]["stage"], ends["d"]["stage"]) == ("skipped", "done")
    assert ends["a"]["attempts"] == 0
    assert ends["d"]["archived"]["resumed_bytes"] >= 256 * MiB
    assert len(check_archive(tmp_path / "archive")) == 2


def test_a_plan_that_does_not_fit_now_forgets_nothing(tmp_path: Path, sources: Path) -> None:
    """What an interrupted run has finished stays finished for the run after the refused one."""
    make_image(tmp_path / "d.mig", size=24 * MiB, pattern="dense")
    with mounted("ext4", tmp_path, size=64 * MiB) as disk:
        archive = disk / "archive"
        path = write_jobs(
            tmp_path,
            job("a", f"image = '{sources}/a.mig'", archive=str(archive)),
            job("d", "image = 'd.mig'", archive=str(archive), rate="2M"),
        )
        process = start_jobs(path)
        first_event(process, "job", job="a", stage="done")
        kill(process)
        taken = disk / "taken"
        with taken.open("wb") as file, contextlib.suppress(OSError):
            while file.write(bytes(MiB)):
                file.flush()
        refused = run_jobs(path)
        assert refused.code == 5
        assert "the plan needs" in refused.err
        taken.unlink()
        ended = run_jobs(path)
        assert ended.code == 0
        assert summary_of(ended)["resumed"]
        ends = job_ends(ended)
        assert (ends["a"]["stage"], ends["d"]["stage"]) == ("skipped", "done")
        assert len(check_archive(archive)) == 2


def test_begun_anew_when_the_run_is_old_or_the_job_file_another(
    tmp_path: Path, sources: Path
) -> None:
    path = write_jobs(
        tmp_path,
        job("a", f"image = '{sources}/a.mig'"),
        job("b", f"image = '{sources}/b.mig'", rate="4M"),
    )
    for options, change in ((("--resume-within", "0"), ""), ((), "# another\n")):
        time.sleep(1.1)  # runs of one second have the same entries, and would skip them
        process = start_jobs(path)
        first_event(process, "job", job="a", stage="done")
        first_event(process, "progress", job="b", phase="write")
        kill(process)
        path.write_text(path.read_text().replace('"4M"', '"0"') + change)
        time.sleep(1.1)
        ended = run_jobs(path, *options)
        assert ended.code == 0
        assert not summary_of(ended)["resumed"]
        assert {one["stage"] for one in job_ends(ended).values()} == {"done"}
        check_archive(tmp_path / "archive")
        path.write_text(path.read_text().replace('"0"', '"4M"'))


def test_a_killed_worker_harms_no_other_job(tmp_path: Path, sources: Path) -> None:
    path = write_jobs(
        tmp_path,
        *(job(name, f"image = '{sources}/{name}.mig'", rate="8M", retries=2) for name in "ab"),
    )
    process = start_jobs(path, "--workers", "2")
    first_event(process, "progress", job="b", phase="write")
    for worker in children(process.pid)[:1]:
        os.kill(worker, signal.SIGKILL)
    ended = finish(process)
    assert ended.code == 0
    ends = job_ends(ended)
    assert {one["stage"] for one in ends.values()} == {"done"}
    assert sorted(one["attempts"] for one in ends.values()) == [1, 2]
    (notes,) = [one["notes"] for one in ends.values() if one["attempts"] == 2]
    assert "was killed (SIGKILL)" in notes[0]
    assert len(check_archive(tmp_path / "archive")) == 2
