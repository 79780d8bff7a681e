"""Reports, metrics and exit codes of runs, from states made by hand."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from uringmig.batch.job import Job, parse_jobs
from uringmig.batch.messages import Archived, Outcome
from uringmig.batch.metrics import render
from uringmig.batch.report import describe_run, render_markdown
from uringmig.batch.state import DiskView, JobState, RunView, Stage, Summary
from uringmig.cli.batchview import draw
from uringmig.progress import Snapshot
from uringmig.units import MiB


def make_job(name: str) -> Job:
    text = f'[[jobs]]\nname = "{name}"\narchive = "/a"\nsource = {{ image = "x" }}\n'
    return parse_jobs(text, path="/j.toml").jobs[0]


ARCHIVED = Archived(
    image="/a/web1.mig", kind="mapped-ram", content_digest="00" * 16, fingerprint="f",
    memory_bytes=64 * MiB, stored_bytes=32 * MiB, file_bytes=65 * MiB, allocated_bytes=33 * MiB,
    shared_bytes=MiB, resumed_bytes=0, ratio=1.0, seconds=2.0, stopped_seconds=0.25,
)  # fmt: skip


def make_state(name: str, stage: Stage, *, exit_code: int = 0, error: str = "") -> JobState:
    state = JobState(make_job(name), f"{name}-T", stage=stage, attempts=1)
    state.exit_code, state.error = exit_code, error
    if stage == "done":
        state.archived = ARCHIVED
    return state


def make_summary(*states: JobState, warnings: tuple[str, ...] = ()) -> Summary:
    return Summary(
        job_file="/j.toml", time="T", seconds=75.0, jobs=states, resumed=False, stopped_by=None,
        peak_runner_bytes=40 * MiB, peak_worker_bytes=50 * MiB, notes=(), warnings=warnings,
        depths={"h:vda": 16},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "warned", "expected"),
    [((), False, 0), ((), True, 1), ((4,), False, 4), ((3, 5, 4), True, 5)],
)
def test_the_worst_failure_is_the_run_s_exit_code(
    codes: tuple[int, ...], warned: bool, expected: int
) -> None:
    good = make_state("good", "done")
    good.warnings += ["odd"] if warned else []
    failed = [make_state(f"j{code}", "failed", exit_code=code) for code in codes]
    assert make_summary(good, *failed).exit_code == expected


def test_a_report_names_failures_first_and_no_text_breaks_its_line() -> None:
    bad = make_state("bad", "failed", exit_code=4, error="said | <b>no</b>\x1b[2J\nand left")
    text = render_markdown(make_summary(make_state("web1", "done"), bad))
    assert text.index("What failed") < text.index("## Jobs")
    (line,) = [line for line in text.splitlines() if line.startswith("- **bad**")]
    assert r"said \| &lt;b>no&lt;/b>\x1b[2J\nand left" in line
    (row,) = [line for line in text.splitlines() if line.startswith("| web1 |")]
    assert "| 64.0 MiB | 32.0 MiB | 33.0 MiB | 1.0 MiB | 1.00 | 2.0 s | 17 | 0.25 s |" in row
    assert "- no guest stood still longer than 0.25 s (job web1)" in text.splitlines()
    assert "h:vda 16" in text
    described = describe_run(make_summary(make_state("web1", "done"), bad))
    assert msgspec.json.decode(msgspec.json.encode(described))["jobs"][1]["error"] == bad.error
    assert (described["done"], described["failed"], described["shared_bytes"]) == (1, 1, MiB)
    assert described["longest_stopped_seconds"] == 0.25


def test_what_is_wrong_with_an_archive_is_in_every_account() -> None:
    """A run whose jobs are all done, and which has a warning of its own, says 1 and why."""
    summary = make_summary(make_state("web1", "done"), warnings=("a|b is damaged",))
    assert summary.exit_code == 1
    assert describe_run(summary)["warnings"] == ["a|b is damaged"]
    assert r"- warning: a\|b is damaged" in render_markdown(summary).splitlines()


def test_metrics_are_one_family_after_the_other() -> None:
    running = make_state("web2", "running")
    running.progress = Snapshot(
        phase="write", total_bytes=4, scanned_bytes=2, zero_bytes=0, finished_bytes=1,
        completed_bytes=10, in_flight_bytes=0, seconds=2.0, channels=(10,), pass_seconds=2.0,
    )  # fmt: skip
    view = RunView(
        jobs=[make_state("web1", "done"), running, make_state("bad", "failed", exit_code=4)],
        disks=[DiskView("h:vda", 16, 32, 0, 0.5, 1e6), DiskView("h:vdb", 0, 8, 0, None, None)],
        seconds=1.5,
        runner_bytes=7,
    )
    lines = render(view, now=100.0, began=90.0, exit_code=None, successes={}).splitlines()
    assert 'uringmig_jobs{stage="done"} 1' in lines
    assert 'uringmig_job_share{job="web2"} 0.25' in lines
    assert 'uringmig_job_rate_bytes{job="web2"} 5.0' in lines
    assert 'uringmig_job_success{job="bad"} 0' in lines
    assert 'uringmig_job_stopped_seconds{job="web1"} 0.25' in lines
    assert 'uringmig_disk_busy_share{disk="h:vda"} 0.5' in lines
    assert not [line for line in lines if "busy" in line and "vdb" in line]
    seen: list[str] = []
    for line in lines:
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0].split()[0]
        if name not in seen[-1:]:
            assert name not in seen, f"{name} is in two places"
            seen.append(name)


def test_outcomes_know_their_exit_codes() -> None:
    def code(kind: str) -> int:
        return Outcome(key="j", ending="failed", kind=kind).exit_code

    kinds = ("StateError", "MismatchError", "BusyError", "StorageError", "HostError", "Timeout")
    assert [code(kind) for kind in kinds] == [2, 3, 4, 5, 6, 4]
    assert Outcome(key="j", ending="done").exit_code == 0


@pytest.mark.parametrize(
    ("in_flight", "line"),
    [
        (0, "disk h:vda: 0 of 16 requests admitted"),
        (16, "disk h:vda: 16 of 16 requests admitted"),
        (32, "disk h:vda: 16 of 16 requests admitted (all, to one job that asks for 32)"),
    ],
)
def test_the_live_table_never_says_more_of_a_disk_than_there_is(in_flight: int, line: str) -> None:
    """A measured depth holds no single job back, but it is not "32 of 16" that are admitted."""
    disk = DiskView("h:vda", in_flight, 16, 0, None, None)
    limited = DiskView("h:vdb", in_flight, 16, 5_000_000, 0.5, 1e6)
    view = RunView(jobs=[], disks=[disk, limited], seconds=1.0, runner_bytes=0)
    out = io.StringIO()
    Console(file=out, width=200).print(draw(view, now=0.0))
    first, second = [one.rstrip() for one in out.getvalue().splitlines()][-2:]
    assert first == line
    assert second == line.replace("vda", "vdb") + ", at most 5 MB/s, busy 50%, 1 MB/s"
