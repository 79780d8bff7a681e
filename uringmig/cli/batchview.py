"""A batch run as it goes on: a table on a terminal, JSON lines, a service manager's status."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from uringmig.batch.notify import Notifier
from uringmig.batch.report import describe_job
from uringmig.batch.state import DiskView, JobState, RunView
from uringmig.cli.output import Output
from uringmig.units import format_duration, format_size

#: At most so often each job's progress event is written; a new phase is told at once.
_EVENT_SECONDS: Final = 0.5
#: Rows that fit on any terminal; what runs goes before what waits or has ended.
_ROWS_MAX: Final = 20
_ORDER: Final = ("running", "failed", "stopped", "waiting", "done", "skipped")
_BAR_WIDTH: Final = 20


class LiveTable:
    """A watcher that redraws a table.

    Args:
        show: puts it on the screen.
    """

    def __init__(self, show: Callable[[RenderableType], None]) -> None:
        self._show = show

    def look(self, view: RunView) -> None:
        """Draw."""
        self._show(draw(view, now=time.monotonic()))

    def changed(self, state: JobState) -> None:
        """The next look shows it."""


class Lines:
    """A watcher that says in lines what becomes of jobs: JSON events, and complaints for people."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._told: dict[str, tuple[float, str]] = {}
        self._noted: set[str] = set()

    def look(self, view: RunView) -> None:
        """Progress of what runs."""
        now = time.monotonic()
        for state in view.jobs:
            progress = state.progress
            if state.stage != "running" or progress is None:
                continue
            told_at, phase = self._told.get(state.job.name, (float("-inf"), ""))
            if now - told_at < _EVENT_SECONDS and phase == progress.phase:
                continue
            self._told[state.job.name] = now, progress.phase
            self._output.event(
                "progress",
                {
                    "job": state.job.name,
                    "phase": progress.phase,
                    "total_bytes": progress.total_bytes,
                    "finished_bytes": progress.finished_bytes,
                    "completed_bytes": progress.completed_bytes,
                    "seconds": progress.seconds,
                    "share": progress.share,
                    "rate": progress.rate,
                    "seconds_left": progress.seconds_left,
                },
            )

    def changed(self, state: JobState) -> None:
        """A job's new stage."""
        self._output.event("job", describe_job(state))
        name = state.job.name
        if state.stage == "failed":
            self._output.complain(f"job {name} failed: {state.error}")
        elif state.stage == "waiting" and state.notes:
            self._output.complain(f"job {name}: {state.notes[-1]}; trying again")
        if state.stage == "done" and state.archived is not None:
            for note in state.archived.notes:
                # What holds for the host or the disk is not said again for each of its jobs.
                if note not in self._noted:
                    self._noted.add(note)
                    self._output.note(f"job {name}: {note}")
        if state.final:
            for warning in state.warnings:
                self._output.complain(f"job {name}: warning: {warning}")


class ServiceStatus:
    """A watcher that tells a service manager how far the run is, and that it is alive."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier

    def look(self, view: RunView) -> None:
        """Feed the watchdog; say the counts."""
        self._notifier.alive()
        ended = sum(state.final for state in view.jobs)
        self._notifier.status(
            f"{ended} of {len(view.jobs)} jobs through, {view.count('running')} running, "
            f"{view.count('failed')} failed"
        )

    def changed(self, state: JobState) -> None:
        """The next look says it."""


def draw(view: RunView, *, now: float) -> RenderableType:
    """The table, and a line for each disk below it."""
    table = Table(box=None, pad_edge=False, expand=False)
    for title in ("JOB", "PHASE", "", "SHARE", "MB/s", "LEFT", ""):
        table.add_column(title, justify="right" if title in ("SHARE", "MB/s", "LEFT") else "left")
    ranked = sorted(view.jobs, key=lambda state: _ORDER.index(state.stage))
    for state in ranked[:_ROWS_MAX]:
        table.add_row(*_cells(state, now=now))
    hidden = len(ranked) - _ROWS_MAX
    counts = ", ".join(f"{view.count(name)} {name}" for name in _ORDER if view.count(name))
    lines = [f"... and {hidden} more jobs"] if hidden > 0 else []
    lines.append(f"{counts}; {format_duration(view.seconds)}")
    lines += [_disk_line(disk) for disk in view.disks]
    return Group(table, *(Text(line) for line in lines))


def _cells(state: JobState, *, now: float) -> list[RenderableType]:
    """One job's row."""
    name, progress = Text(state.job.name), state.progress
    if state.stage == "running" and progress is not None:
        left = progress.seconds_left
        return [
            name,
            Text(progress.phase),
            ProgressBar(total=1.0, completed=progress.share, width=_BAR_WIDTH),
            f"{progress.share:.0%}",
            f"{progress.rate / 1e6:.0f}",
            "" if left is None else format_duration(left),
            Text(f"attempt {state.attempts}" if state.attempts > 1 else ""),
        ]
    remark = state.error
    if state.stage == "waiting" and state.not_before > now:
        remark = f"again in {format_duration(state.not_before - now)}: {state.error}"
    elif state.archived is not None:
        remark = f"{state.entry}, {format_size(state.archived.allocated_bytes)}"
    return [
        name,
        Text(state.stage),
        "",
        "",
        "",
        "",
        Text(remark, no_wrap=True, overflow="ellipsis"),
    ]


def _disk_line(disk: DiskView) -> str:
    """What a disk does, and what it is asked for."""
    admitted = min(disk.in_flight, disk.depth)
    line = f"disk {disk.key}: {admitted} of {disk.depth} requests admitted"
    if disk.in_flight > disk.depth:
        line += f" (all, to one job that asks for {disk.in_flight})"
    if disk.rate:
        line += f", at most {disk.rate / 1e6:.0f} MB/s"
    if disk.busy is not None and disk.moved is not None:
        line += f", busy {disk.busy:.0%}, {disk.moved / 1e6:.0f} MB/s"
    return line
