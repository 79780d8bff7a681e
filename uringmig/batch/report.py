"""The account of a run that an operator finds in the morning: report.md to read, report.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from uringmig.batch.state import JobState, Summary
from uringmig.errors import StorageError
from uringmig.storage.smallfile import publish_bytes
from uringmig.units import format_duration, format_size

FORMAT: Final = "uringmig-run-report"
VERSION: Final = 1
_COLUMNS: Final = (
    "job", "stage", "entry", "source", "memory", "in pages", "on disk", "shared", "ratio", "time",
    "MB/s", "stood still",
)  # fmt: skip


def describe_job(state: JobState) -> dict[str, Any]:
    """One job's end as plain values, for JSON."""
    archived = None if state.archived is None else msgspec.to_builtins(state.archived)
    return {
        "job": state.job.name,
        "vm": state.job.vm,
        "archive": state.job.archive,
        "entry": state.entry,
        "tier": state.job.tier,
        "stage": state.stage,
        "attempts": state.attempts,
        "kind": state.kind,
        "error": state.error,
        "exit_code": state.exit_code if state.stage == "failed" else 0,
        "worker": state.worker,
        "peak_bytes": state.peak_bytes,
        "notes": list(state.notes),
        "warnings": list(state.warnings),
        "archived": archived,
    }


def describe_run(summary: Summary) -> dict[str, Any]:
    """A whole run as plain values, for JSON; sizes in bytes, times in seconds."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "job_file": summary.job_file,
        "time": summary.time,
        "seconds": round(summary.seconds, 3),
        "resumed": summary.resumed,
        "stopped_by": summary.stopped_by,
        "exit_code": summary.exit_code,
        "error": summary.error,
        **{name: summary.count(name) for name in ("done", "skipped", "failed", "stopped")},
        "memory_bytes": summary.total(lambda one: one.memory_bytes),
        "stored_bytes": summary.total(lambda one: one.stored_bytes),
        "allocated_bytes": summary.total(lambda one: one.allocated_bytes),
        "shared_bytes": summary.total(lambda one: one.shared_bytes),
        "longest_stopped_seconds": round(summary.longest_stopped[0], 6),
        "peak_runner_bytes": summary.peak_runner_bytes,
        "peak_worker_bytes": summary.peak_worker_bytes,
        "disk_depths": dict(summary.depths),
        "notes": list(summary.notes),
        "warnings": list(summary.warnings),
        "jobs": [describe_job(state) for state in summary.jobs],
    }


def render_markdown(summary: Summary) -> str:
    """The report to read: failures first, then every job."""
    counts = ", ".join(
        f"{summary.count(stage)} {stage}"
        for stage in ("done", "skipped", "failed", "stopped")
        if summary.count(stage)
    )
    lines = [
        f"# Archive run {summary.time}",
        "",
        f"Job file `{summary.job_file}`: {counts or 'no jobs'}.",
        f"It took {format_duration(summary.seconds)}.",
        *(["Went on with an interrupted run."] if summary.resumed else []),
        *([f"**The run ended early:** {_text(summary.error)}"] if summary.error else []),
        *([f"Stopped by signal {summary.stopped_by}."] if summary.stopped_by else []),
        "",
    ]
    troubled = [state for state in summary.jobs if state.stage in ("failed", "stopped")]
    if troubled:
        lines += ["## What failed", ""]
        lines += [
            f"- **{state.job.name}** ({state.stage}, {_attempts(state)}): {_text(state.error)}"
            for state in troubled
        ]
        lines.append("")
    lines += _table(summary.jobs)
    lines += ["", *_remarks(summary), *_totals(summary)]
    return "\n".join(lines) + "\n"


def write_report(summary: Summary, folder: Path) -> None:
    """Write both reports, named by the run's time; earlier ones stay.

    They name guests and what is wrong with them, so they are their owner's only.

    Raises:
        StorageError: they cannot be written.
    """
    encoded = msgspec.json.format(msgspec.json.encode(describe_run(summary)), indent=1) + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError("cannot make the folder", errno=error.errno, path=folder) from None
    name = _free_name(folder, f"report-{summary.time}")
    publish_bytes(folder / f"{name}.md", render_markdown(summary).encode())
    publish_bytes(folder / f"{name}.json", encoded)


def _free_name(folder: Path, name: str) -> str:
    """A name that no earlier report has: an interrupted run and its end have the same time."""
    number, found = 1, name
    while os.path.exists(folder / f"{found}.md") or os.path.exists(folder / f"{found}.json"):
        number += 1
        found = f"{name}-{number}"
    return found


def _table(jobs: Sequence[JobState]) -> list[str]:
    """One line a job."""
    lines = [
        "## Jobs",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|" + " --- |" * 4 + " ---: |" * (len(_COLUMNS) - 4),
    ]
    for state in jobs:
        cells = [state.job.name, state.stage, f"{state.entry} ({state.job.tier})"]
        one = state.archived
        if one is None:
            cells += [""] * 9
        else:
            rate = one.stored_bytes / one.seconds / 1e6 if one.seconds else 0.0
            cells += [
                one.kind,
                *map(format_size, (one.memory_bytes, one.stored_bytes, one.allocated_bytes)),
                format_size(one.shared_bytes) if one.shared_bytes else "",
                f"{one.ratio:.2f}",
                format_duration(one.seconds) if one.seconds else "",
                f"{rate:.0f}" if rate else "",
                f"{one.stopped_seconds:.2f} s" if one.stopped_seconds else "",
            ]
        lines.append(f"| {' | '.join(map(_text, cells))} |")
    return lines


def _remarks(summary: Summary) -> list[str]:
    """Notes and warnings, by job."""
    remarks = [f"- warning: {_text(warning)}" for warning in summary.warnings]
    remarks += [f"- {_text(note)}" for note in summary.notes]
    for state in summary.jobs:
        remarks += [f"- {state.job.name}: warning: {_text(text)}" for text in state.warnings]
        remarks += [f"- {state.job.name}: {_text(text)}" for text in state.notes]
    return ["## Notes", "", *remarks, ""] if remarks else []


def _totals(summary: Summary) -> list[str]:
    """Sums, and what the run itself took."""
    stored = summary.total(lambda one: one.stored_bytes)
    taken = summary.total(lambda one: one.allocated_bytes)
    shared = summary.total(lambda one: one.shared_bytes)
    depths = ", ".join(f"{key} {depth}" for key, depth in summary.depths.items())
    stopped, job = summary.longest_stopped
    still = f"- no guest stood still longer than {stopped:.2f} s (job {_text(job)})"
    return [
        "## Totals",
        "",
        *([still] if stopped else []),
        f"- guest memory {format_size(summary.total(lambda one: one.memory_bytes))}, "
        f"in pages {format_size(stored)}, on disk {format_size(taken)}, "
        f"of it shared {format_size(shared)}",
        f"- peak memory: runner {format_size(summary.peak_runner_bytes)}, "
        f"largest worker {format_size(summary.peak_worker_bytes)}",
        f"- requests in flight allowed on the disks: {depths or 'no disk was used'}",
    ]


def _attempts(state: JobState) -> str:
    """How often it was tried."""
    if not state.attempts:
        return "not begun"
    return f"{state.attempts} attempt{'' if state.attempts == 1 else 's'}"


def _text(text: str) -> str:
    """Text that cannot break out of its line or cell, whatever a peer put into it."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return shown.replace("|", r"\|").replace("<", "&lt;")
