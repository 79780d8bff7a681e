"""Where every job of a run stands; what watchers of a run are shown.

Changed by the runner alone, in one thread, which also calls the watchers: what they see is never
half-changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from uringmig.batch.job import Job
from uringmig.batch.messages import Archived, Estimate, Outcome
from uringmig.progress import Snapshot
from uringmig.signals import SIGNAL_EXIT_CODE

#: ``waiting`` for its disks, a worker or another try; the last four are final.
Stage = Literal["waiting", "running", "done", "skipped", "failed", "stopped"]
FINAL: Final = frozenset({"done", "skipped", "failed", "stopped"})


@dataclass(slots=True)
class JobState:
    """One job of a run; times are of time.monotonic().

    Attributes:
        entry: its name in the archive.
        attempts: begun so far.
        not_before: when it may be tried again.
        began_at: of the present attempt.
        stopping_at: when its worker was asked to stop, or None.
        timed_out: that was because it took too long.
        alone: the host had too little for it: it is tried again beside no other job of its host.
        estimate: None while it is not known.
        progress: of the present or last attempt.
        error: the last attempt's, one line.
        refused: nothing was attempted: as the job is written, it cannot be done.
        notes: what the operator should know, one line each.
    """

    job: Job
    entry: str
    stage: Stage = "waiting"
    attempts: int = 0
    not_before: float = 0.0
    began_at: float = 0.0
    stopping_at: float | None = None
    timed_out: bool = False
    alone: bool = False
    estimate: Estimate | None = None
    progress: Snapshot | None = None
    archived: Archived | None = None
    kind: str = ""
    error: str = ""
    exit_code: int = 0
    refused: bool = False
    worker: str = ""
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def final(self) -> bool:
        """Nothing more happens to it."""
        return self.stage in FINAL

    def note_outcome(self, outcome: Outcome) -> None:
        """Keep what every attempt leaves, however it ended."""
        self.worker = outcome.worker or self.worker
        self.peak_bytes = max(self.peak_bytes, outcome.peak_bytes)
        self.kind, self.error = outcome.kind, outcome.error
        self.exit_code = outcome.exit_code


@dataclass(frozen=True, slots=True)
class DiskView:
    """One disk: requests the jobs may have in flight, its limits, and its own use.

    Attributes:
        busy: share of the time it had something to do; None if that is not known.
        moved: bytes a second, of everybody; None likewise.
    """

    key: str
    in_flight: int
    depth: int
    rate: int
    busy: float | None
    moved: float | None


@dataclass(frozen=True, slots=True)
class RunView:
    """A whole run as watchers see it.

    Attributes:
        seconds: since it began.
        runner_bytes: anonymous memory of the runner now.
    """

    jobs: Sequence[JobState]
    disks: Sequence[DiskView]
    seconds: float
    runner_bytes: int

    def count(self, stage: Stage) -> int:
        """Jobs in a stage."""
        return sum(state.stage == stage for state in self.jobs)


class Watcher(Protocol):
    """Somebody who looks on; must return soon, and must not raise."""

    def look(self, view: RunView) -> None:
        """Called several times a second."""

    def changed(self, state: JobState) -> None:
        """Called when a job enters another stage, or is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run ended; bytes and seconds.

    Attributes:
        stopped_by: number of the signal that ended it early, or None.
        resumed: it went on with an interrupted run.
        peak_runner_bytes: most anonymous memory the runner was seen to have.
        peak_worker_bytes: likewise, of any worker.
        notes: what the operator should know, one line each.
        warnings: what is wrong with the archives or the run's journal, one line each.
        error: what ended the run before its jobs were through, or "".
        error_code: the exit code of that.
    """

    job_file: str
    time: str
    seconds: float
    jobs: tuple[JobState, ...]
    resumed: bool
    stopped_by: int | None
    peak_runner_bytes: int
    peak_worker_bytes: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    depths: Mapping[str, int]
    error: str = ""
    error_code: int = 0

    def count(self, stage: Stage) -> int:
        """Jobs in a stage."""
        return sum(state.stage == stage for state in self.jobs)

    def total(self, what: Callable[[Archived], int]) -> int:
        """A sum over what was archived."""
        return sum(what(state.archived) for state in self.jobs if state.archived is not None)

    @property
    def longest_stopped(self) -> tuple[float, str]:
        """How long a live guest stood still at most, in seconds, and for which job; else 0.0."""
        found = [
            (state.archived.stopped_seconds, state.job.name)
            for state in self.jobs
            if state.archived is not None
        ]
        return max(found, default=(0.0, ""))

    @property
    def exit_code(self) -> int:
        """0; 1 with warnings; else the highest code of a job that failed, or what ended the run."""
        if self.error_code:
            return self.error_code
        if self.stopped_by is not None:
            return SIGNAL_EXIT_CODE + self.stopped_by
        failed = [state.exit_code for state in self.jobs if state.stage == "failed"]
        warned = bool(self.warnings) or any(state.warnings for state in self.jobs)
        return max(failed, default=int(warned))
