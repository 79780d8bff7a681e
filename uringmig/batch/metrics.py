"""A run in Prometheus' text format, for the textfile collector of its node exporter.

The file is replaced as a whole, so that a collector never reads half of it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from uringmig.batch.state import JobState, RunView, Stage
from uringmig.errors import UringmigError
from uringmig.storage.smallfile import publish_bytes

_INTERVAL_SECONDS: Final = 5.0
#: The collector runs as another user; jobs and disks are named in it, nothing of a guest's memory.
_MODE: Final = 0o644
_STAGES: Final[tuple[Stage, ...]] = (
    "waiting", "running", "done", "skipped", "failed", "stopped",
)  # fmt: skip
_SUCCESS_AT: Final = "uringmig_job_last_success_timestamp_seconds"
_SUCCESS_LINE: Final = re.compile(
    _SUCCESS_AT + r'\{job="((?:[^"\\\n]|\\.)*)"\} (\d+(?:\.\d+)?)$', re.MULTILINE
)
#: Ten thousand jobs leave a tenth of this.
_BYTES_MAX: Final = 64 << 20


class MetricsFile:
    """A watcher that keeps a file up to date; trouble with it never ends a run.

    Attributes:
        trouble: why the file could not be written last time, or "".
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written_at = float("-inf")
        self._began = time.time()
        self._successes = _former_successes(path)
        self.trouble = ""

    def look(self, view: RunView) -> None:
        """Write, unless that was just done."""
        if time.monotonic() - self._written_at >= _INTERVAL_SECONDS:
            self.write(view)

    def changed(self, state: JobState) -> None:
        """Note a success; the next look shows it."""
        if state.stage in ("done", "skipped"):
            self._successes[state.job.name] = time.time()

    def succeeded(self, times: Mapping[str, float]) -> None:
        """Note when jobs are known to have succeeded before; seconds of the epoch."""
        for name, at in times.items():
            self._successes[name] = max(at, self._successes.get(name, at))

    def write(self, view: RunView, *, exit_code: int | None = None) -> None:
        """Write now.

        Args:
            view: what is so now.
            exit_code: the run is over, with this; None: it goes on.
        """
        self._written_at = time.monotonic()
        try:
            data = render(
                view,
                now=time.time(),
                began=self._began,
                exit_code=exit_code,
                successes=self._successes,
            )
            publish_bytes(self._path, data.encode(), mode=_MODE)
        except UringmigError as error:
            self.trouble = f"metrics cannot be written: {error}"
        else:
            self.trouble = ""


def render(
    view: RunView,
    *,
    now: float,
    began: float,
    exit_code: int | None,
    successes: Mapping[str, float],
) -> str:
    """The whole text; names end in their units, as Prometheus' conventions ask.

    Args:
        view: what is so now.
        now: seconds of the epoch.
        began: when the run began, likewise.
        exit_code: of a run that is over, else None.
        successes: when each job last succeeded, by name. Where no job is known because the job
            file cannot be read, these are the jobs, and none of them was done.
    """
    page = _Page()
    page.family("uringmig_run_ended", "gauge", "1 once every job is through.")
    page.sample("uringmig_run_ended", int(exit_code is not None))
    page.family("uringmig_run_exit_code", "gauge", "What the run ended with; see the README.")
    if exit_code is not None:
        page.sample("uringmig_run_exit_code", exit_code)
    page.family("uringmig_run_started_timestamp_seconds", "gauge", "When the run began.")
    page.sample("uringmig_run_started_timestamp_seconds", round(began, 3))
    page.family("uringmig_run_updated_timestamp_seconds", "gauge", "When this was written.")
    page.sample("uringmig_run_updated_timestamp_seconds", round(now, 3))
    page.family("uringmig_run_seconds", "gauge", "How long the run has been going on.")
    page.sample("uringmig_run_seconds", round(view.seconds, 3))
    page.family("uringmig_runner_memory_bytes", "gauge", "Anonymous memory of the runner.")
    page.sample("uringmig_runner_memory_bytes", view.runner_bytes)
    page.family("uringmig_jobs", "gauge", "Jobs by stage.")
    unread = [] if view.jobs else sorted(successes)
    for stage in _STAGES:
        more = len(unread) if stage == "failed" else 0
        page.sample("uringmig_jobs", view.count(stage) + more, stage=stage)
    page.family(_SUCCESS_AT, "gauge", "When the job last made an entry, or found it made.")
    for name in unread or [state.job.name for state in view.jobs]:
        if name in successes:
            page.sample(_SUCCESS_AT, round(successes[name], 3), job=name)
    page.family("uringmig_job_success", "gauge", "1 if the entry is whole, 0 if the job failed.")
    for name in unread:
        page.sample("uringmig_job_success", 0, job=name)
    _jobs(page, view)
    _disks(page, view)
    return page.text()


def _former_successes(path: Path) -> dict[str, float]:
    """When each job last succeeded, as an earlier run has left it.

    Nothing if that is not to be had: the file may be another program's, or there is none.
    """
    try:
        if not os.path.isfile(path):
            return {}
        with path.open("rb") as file:
            text = file.read(_BYTES_MAX).decode(errors="replace")
    except OSError:
        return {}
    return {
        re.sub(r"\\(.)", lambda one: "\n" if one[1] == "n" else one[1], name): float(at)
        for name, at in _SUCCESS_LINE.findall(text)
    }


def _jobs(page: _Page, view: RunView) -> None:
    """What is known of each job."""
    for state in view.jobs:
        if state.final:
            success = int(state.stage in ("done", "skipped"))
            page.sample("uringmig_job_success", success, job=state.job.name)
    for name, text, field in (
        ("uringmig_job_share", "Finished part of the memory.", "share"),
        ("uringmig_job_rate_bytes", "Bytes a second so far.", "rate"),
    ):
        page.family(name, "gauge", text)
        for state in view.jobs:
            if state.progress is not None:
                page.sample(name, round(getattr(state.progress, field), 4), job=state.job.name)
    for name, text, field in (
        ("uringmig_job_file_bytes", "Length of the image.", "file_bytes"),
        ("uringmig_job_allocated_bytes", "What the image takes.", "allocated_bytes"),
        ("uringmig_job_shared_bytes", "Shared with earlier images.", "shared_bytes"),
        ("uringmig_job_memory_bytes", "Guest memory.", "memory_bytes"),
        ("uringmig_job_stopped_seconds", "How long a live guest stood still.", "stopped_seconds"),
    ):
        page.family(name, "gauge", text)
        for state in view.jobs:
            if state.archived is not None:
                page.sample(name, getattr(state.archived, field), job=state.job.name)
    page.family("uringmig_job_attempts", "gauge", "Attempts begun.")
    page.family("uringmig_worker_peak_memory_bytes", "gauge", "Most anonymous memory of a worker.")
    for state in view.jobs:
        page.sample("uringmig_job_attempts", state.attempts, job=state.job.name)
        page.sample("uringmig_worker_peak_memory_bytes", state.peak_bytes, job=state.job.name)


def _disks(page: _Page, view: RunView) -> None:
    """What the disks do, and may be asked to do."""
    page.family("uringmig_disk_requests_allowed", "gauge", "Requests in flight that jobs may have.")
    page.family("uringmig_disk_requests", "gauge", "Requests in flight of admitted jobs.")
    page.family("uringmig_disk_busy_share", "gauge", "Share of the time with something to do.")
    page.family("uringmig_disk_rate_bytes", "gauge", "Bytes a second, of everybody.")
    for disk in view.disks:
        page.sample("uringmig_disk_requests_allowed", disk.depth, disk=disk.key)
        page.sample("uringmig_disk_requests", disk.in_flight, disk=disk.key)
        if disk.busy is not None:
            page.sample("uringmig_disk_busy_share", round(disk.busy, 4), disk=disk.key)
        if disk.moved is not None:
            page.sample("uringmig_disk_rate_bytes", round(disk.moved), disk=disk.key)


class _Page:
    """Samples by family: Prometheus wants all of a family together, after its head."""

    def __init__(self) -> None:
        self._heads: dict[str, str] = {}
        self._samples: dict[str, list[str]] = {}

    def family(self, name: str, kind: str, text: str) -> None:
        """Begin a family."""
        self._heads[name] = f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
        self._samples[name] = []

    def sample(self, name: str, value: float, **labels: str) -> None:
        """Add a sample to its family."""
        inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        self._samples[name].append(f"{name}{{{inner}}} {value}\n" if inner else f"{name} {value}\n")

    def text(self) -> str:
        """Families that have samples."""
        return "".join(
            head + "".join(self._samples[name])
            for name, head in self._heads.items()
            if self._samples[name]
        )


def _escaped(text: str) -> str:
    """A label's value."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
