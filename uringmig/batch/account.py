"""What a run leaves in files for those who were not there: metrics and a report, however it ends.

A run that cannot even begin is the one that must be heard of: a file that nobody renews goes on
saying what was true last night. So both are tried early, and written whatever ends the run. They
are courtesies: trouble with them is a warning, and never costs an image.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from uringmig.archive.directory import Archive
from uringmig.batch.job import Job, JobFile
from uringmig.batch.ledger import TIME_FORMAT, Ledger
from uringmig.batch.metrics import MetricsFile
from uringmig.batch.report import write_report
from uringmig.batch.runner import Run
from uringmig.batch.state import JobState, RunView, Summary
from uringmig.errors import BUG_EXIT_CODE, UringmigError, explained
from uringmig.signals import SIGNAL_EXIT_CODE, Interrupted, deferred
from uringmig.storage.nameless import owner_of_new_files


class Account:
    """The files of one run; a context manager, which sees what ends the run.

    Args:
        job_file: its path.
        metrics: a file for Prometheus, or None.
        report: a folder, or None.
        warn: is told what cannot be written, once each.

    Attributes:
        metrics: keeps the file up to date, as a watcher of the run; or None.
    """

    def __init__(
        self, job_file: str, *, metrics: Path | None, report: Path | None,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.metrics = None if metrics is None else MetricsFile(metrics)
        self._job_file = job_file
        self._report = report
        self._warn = warn
        self._told: set[str] = set()
        self._began_at = time.monotonic()
        self._time = datetime.now(UTC).strftime(TIME_FORMAT)
        self._states: list[JobState] = []
        self._ledger: Ledger | None = None
        self._run: Run | None = None
        self._ended = False

    def __enter__(self) -> Self:
        if self._report is not None:
            try:
                self._report.mkdir(parents=True, exist_ok=True)
                owner_of_new_files(str(self._report))
            except OSError as error:
                self._tell(f"{self._report}: no report can be written: {error.strerror}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._ended:
            # A second signal still ends this at once.
            with deferred():
                self._failed(error)

    def jobs(self, job_file: JobFile) -> None:
        """Take down the jobs, before anything is opened that may be taken or broken."""
        self._states = [JobState(job, "") for job in job_file.jobs]
        if self.metrics is not None:
            self.metrics.succeeded(_newest_entries(job_file))
            self._write(self._view())

    def opened(self, ledger: Ledger) -> None:
        """Take down what is told of the archives and the journal, then and later."""
        self._ledger = ledger

    def running(self, run: Run) -> None:
        """From now on the run knows best."""
        self._run = run

    def ended(self, summary: Summary, *, exit_code: int) -> None:
        """Every job is through, or the run was stopped."""
        self._ended = True
        view = self._view()
        self._write_report(summary)
        self._write(view, exit_code=exit_code)

    def _failed(self, error: BaseException) -> None:
        """Something else than the jobs ended the run: all that was not through has failed."""
        self._ended = True
        exit_code, stopped_by = _code_of(error)
        view = self._view()
        for state in view.jobs:
            if not state.final:
                state.stage = "failed" if stopped_by is None else "stopped"
                state.kind, state.error = type(error).__name__, str(error)
                state.exit_code = exit_code
        summary = Summary(
            job_file=self._job_file,
            time=self._time,
            seconds=view.seconds,
            jobs=tuple(view.jobs),
            resumed=False,
            stopped_by=stopped_by,
            peak_runner_bytes=view.runner_bytes,
            peak_worker_bytes=max((state.peak_bytes for state in view.jobs), default=0),
            notes=tuple(self._ledger.notes) if self._ledger else (),
            warnings=tuple(self._ledger.warnings) if self._ledger else (),
            depths={},
            error=str(error) or type(error).__name__,
            error_code=exit_code,
        )
        self._write_report(summary)
        self._write(view, exit_code=exit_code)

    def _view(self) -> RunView:
        """Where everything stands, as far as that is known."""
        if self._run is not None:
            return self._run.view()
        seconds = time.monotonic() - self._began_at
        return RunView(jobs=self._states, disks=(), seconds=seconds, runner_bytes=0)

    def _write(self, view: RunView, *, exit_code: int | None = None) -> None:
        """Write the metrics."""
        if self.metrics is not None:
            self.metrics.write(view, exit_code=exit_code)
            if self.metrics.trouble:
                self._tell(self.metrics.trouble)

    def _write_report(self, summary: Summary) -> None:
        """Write the report."""
        if self._report is not None:
            try:
                write_report(summary, self._report)
            except UringmigError as error:
                self._tell(f"no report: {error}")

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warn(text)


def _code_of(error: BaseException) -> tuple[int, int | None]:
    """Exit code that an error ends the program with, and the number of the signal if it is one."""
    if isinstance(error, Interrupted):
        return SIGNAL_EXIT_CODE + error.number, error.number
    known = error if isinstance(error, UringmigError) else explained(error)
    return (BUG_EXIT_CODE if known is None else known.exit_code), None


def _newest_entries(job_file: JobFile) -> dict[str, float]:
    """When each job last made an entry that is not known to be damaged; seconds of the epoch."""
    newest: dict[tuple[str, str, str], float] = {}
    for path in {job.archive for job in job_file.jobs}:
        # What is wrong with an archive is told when it is opened for the run.
        with contextlib.suppress(UringmigError):
            if not os.path.exists(path):
                continue
            with Archive.open(path, write=False) as archive:
                for entry in archive.entries():
                    if entry.condition != "damaged":
                        key = (path, entry.vm, entry.tier)
                        made = entry.created_time.timestamp()
                        newest[key] = max(newest.get(key, 0.0), made)
    return {job.name: newest[_key(job)] for job in job_file.jobs if _key(job) in newest}


def _key(job: Job) -> tuple[str, str, str]:
    """What the entries of a job have in common."""
    return job.archive, job.vm, job.tier
