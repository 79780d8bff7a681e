"""``uringmig archive run``: every job of a job file, here or on dask's workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from uringmig.batch.account import Account
from uringmig.batch.job import JobFile, parse_jobs
from uringmig.batch.ledger import Ledger
from uringmig.batch.notify import Notifier
from uringmig.batch.planning import Plan
from uringmig.batch.pool import LocalPool, Pool
from uringmig.batch.report import describe_run
from uringmig.batch.runner import Run
from uringmig.batch.state import Summary, Watcher
from uringmig.batch.tuning import tune
from uringmig.cli import parameters
from uringmig.cli.batchview import Lines, LiveTable, ServiceStatus
from uringmig.cli.command import command
from uringmig.cli.jobfile import read_job_text
from uringmig.cli.output import Output
from uringmig.cli.profile import file_of_profiles
from uringmig.cli.session import Session
from uringmig.cli.table import table_lines
from uringmig.errors import FormatError, StateError, StorageError
from uringmig.signals import Interrupted, deferred
from uringmig.units import format_duration, format_size

#: One to read ahead and one to wait for a slow peer, even on a host with one core.
_WORKERS_LEAST: Final = 2
_RESUME_WITHIN: Final = "12h"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanShown:
    """A plan, for ``--json``; sizes in bytes."""

    job_file: str
    plan: Plan
    fits: bool


@dataclass(frozen=True, slots=True)
class _Options:
    """How a run is to go; as the options of the same names."""

    scheduler: str | None
    workers: int | None
    resume_within: float
    profile: bool
    profile_file: Path | None


@command(
    click.Argument(["jobs"], type=parameters.PATH, help="The job file (TOML)."),
    click.Option(["--dry-run"], is_flag=True, help="Show what would be done and whether it fits."),
    click.Option(
        ["--scheduler"], metavar="tcp://HOST:PORT", show_default="this host",
        help="Have the workers of this dask scheduler do it; each job's host is a resource.",
    ),
    click.Option(
        ["--workers"], type=click.IntRange(1, 256), show_default="one for each core",
        help="Worker processes.",
    ),
    click.Option(
        ["--resume-within"], type=parameters.seconds, default=_RESUME_WITHIN, metavar="DURATION",
        help="Go on with an interrupted run that is not older than this; 0 begins anew.",
    ),
    parameters.metrics_file(),
    click.Option(
        ["--report"], type=parameters.PATH, metavar="DIR",
        help="Write a Markdown and a JSON report here.",
    ),
    *parameters.profile(),
)  # fmt: skip
def run(
    session: Session,
    *,
    jobs: Path,
    dry_run: bool,
    scheduler: str | None,
    workers: int | None,
    resume_within: float,
    metrics_file: Path | None,
    report: Path | None,
    profile: bool,
    profile_file: Path | None,
) -> int:
    """Archive everything a job file names; what an interrupted run has done is not done again."""
    output = session.output
    options = _Options(scheduler, workers, resume_within, profile, profile_file)
    if dry_run:
        with _opened(session, jobs, options, None) as (ledger, pool):
            run = Run(ledger, pool, stop=lambda: session.signals.number)
            return _show_plan(session, ledger, run)
    path = str(jobs.absolute())
    with Account(path, metrics=metrics_file, report=report, warn=output.warn) as account:
        with _opened(session, jobs, options, account) as (ledger, pool):
            summary = _run(session, ledger, pool, account)
        account.ended(summary, exit_code=max(summary.exit_code, output.exit_code))
    _show(output, summary)
    if summary.stopped_by is not None:
        raise Interrupted(summary.stopped_by)
    return max(summary.exit_code, output.exit_code)


@contextmanager
def _opened(
    session: Session, jobs: Path, options: _Options, account: Account | None
) -> Iterator[tuple[Ledger, Pool]]:
    """The ledger and the workers of a run; without an account nothing is changed.

    Raises:
        UringmigError: it cannot begin.
    """
    text = read_job_text(jobs)
    job_file = parse_jobs(text, path=str(jobs.absolute()))
    if account is not None:
        account.jobs(job_file)
    if options.profile or options.profile_file is not None:
        job_file = _tuned(job_file, session.output, options.profile_file)
    # Jobs are to end cleanly, each in its own process: the runner asks whether a signal came.
    with (
        deferred(),
        Ledger(
            job_file, text=text, write=account is not None, resume_within_s=options.resume_within
        ) as ledger,
    ):
        session.output.warn_all(ledger.warnings)
        if account is not None:
            account.opened(ledger)
        # Ended before the ledger is: no worker writes to an archive that is not locked.
        with closing(_pool(options.scheduler, options.workers)) as pool:
            yield ledger, pool


def _tuned(job_file: JobFile, output: Output, profile_file: Path | None) -> JobFile:
    """Apply the profiles of the archives' places, and say where there is none.

    A profile is for speed: one that is lost or damaged costs no night its images.
    """
    try:
        tuned, notes = tune(job_file, file_of_profiles(profile_file))
    except (FormatError, StorageError) as error:
        output.warn(f"the defaults are used: {error}")
        return job_file
    for note in notes:
        output.note(note)
    return tuned


def _run(session: Session, ledger: Ledger, pool: Pool, account: Account) -> Summary:
    """Plan, refuse what cannot fit, and run with everybody watching."""
    output = session.output
    with closing(Notifier()) as notifier, output.live() as show:
        watchers: list[Watcher] = [ServiceStatus(notifier), Lines(output)]
        if account.metrics is not None:
            watchers.append(account.metrics)
        if show is not None:
            watchers.append(LiveTable(show))
        run = Run(ledger, pool, watchers=watchers, stop=lambda: session.signals.number)
        account.running(run)
        return _executed(output, ledger, run, notifier)


def _executed(output: Output, ledger: Ledger, run: Run, notifier: Notifier) -> Summary:
    """Plan and run.

    Raises:
        StorageError: the plan does not fit.
    """
    told = len(ledger.warnings)
    if ledger.resumed:
        output.note(f"going on with the run of {ledger.time}, which was interrupted")
    try:
        plan = run.plan()
        plan.check()
    except StorageError:
        # Of this run nothing was begun; what an interrupted one has done a later one goes on with.
        if not ledger.resumed:
            ledger.end()
        raise
    for warning in plan.warnings:
        output.note(warning)
    notifier.ready()
    summary = run.execute()
    output.warn_all(ledger.warnings[told:])
    notifier.stopping()
    return summary


def _pool(scheduler: str | None, workers: int | None) -> Pool:
    """This host's processes, or a cluster's.

    Raises:
        StateError: the two ask for different things, or dask is not installed.
        BusyError: there is no such scheduler.
    """
    if scheduler is None:
        return LocalPool(workers or max(_WORKERS_LEAST, os.cpu_count() or 1))
    if workers is not None:
        raise StateError("--workers is for this host; a scheduler has its own workers")
    try:
        # Optional, and slow to import.
        from uringmig.batch.cluster import ClusterPool
    except ImportError:
        raise StateError(
            "--scheduler needs dask.distributed: pip install 'uringmig[distributed]'"
        ) from None
    return ClusterPool(scheduler)


def _show_plan(session: Session, ledger: Ledger, run: Run) -> int:
    """Print the plan; refuse it if it cannot fit.

    Raises:
        StorageError: it cannot fit.
        Interrupted: a signal came before all of it was known.
    """
    output = session.output
    plan = run.plan()
    if session.signals.number is not None:
        raise Interrupted(session.signals.number)
    try:
        plan.check()
    except StorageError as error:
        shown = PlanShown(job_file=ledger.job_file.path, plan=plan, fits=False)
        output.result("archive run", shown, _plan_lines(plan), exit_code=error.exit_code)
        raise
    for row in plan.rows:
        for problem in filter(None, (row.problem, row.warning)):
            output.warn(f"job {row.job}: {problem}")
    for note in plan.notes:
        output.note(note)
    for warning in plan.warnings:
        output.warn(warning)
    shown = PlanShown(job_file=ledger.job_file.path, plan=plan, fits=True)
    exit_code = max(output.exit_code, *(row.exit_code for row in plan.rows))
    output.result("archive run", shown, _plan_lines(plan), exit_code=exit_code)
    return exit_code


def _plan_lines(plan: Plan) -> list[str]:
    """A table of jobs, and each file system's space."""
    titles = ("JOB", "ENTRY", "TIER", "SOURCE", "MEMORY", "IN PAGES", "AT MOST")
    rows: list[Sequence[str]] = [titles]
    for row in plan.rows:
        sizes = (row.memory_bytes, row.stored_bytes, row.file_bytes)
        known = [format_size(size) for size in sizes] if row.kind else ["", "", ""]
        if row.kind and row.stored_at_most:
            known[1] = f"<= {known[1]}"
        state = row.kind or row.done or row.problem
        rows.append((row.job, row.entry, row.tier, state, *known))
    return table_lines(rows) + [
        f"{', '.join(space.archives)}: {format_size(space.needed_bytes)} needed, "
        + ("unknown" if space.free_bytes is None else format_size(space.free_bytes))
        + " free"
        + ("" if space.fits else ": does not fit")
        for space in plan.spaces
    ]


def _show(output: Output, summary: Summary) -> None:
    """The summary, as an event or as lines."""
    for note in summary.notes:
        output.note(note)
    output.event("summary", describe_run(summary))
    output.text(_summary_lines(summary, verbose=output.verbose))


def _summary_lines(summary: Summary, *, verbose: bool) -> list[str]:
    """What a person wants to know of a run."""
    counts = ", ".join(
        f"{summary.count(stage)} {stage}"
        for stage in ("done", "skipped", "failed", "stopped")
        if summary.count(stage)
    )
    taken = summary.total(lambda one: one.allocated_bytes)
    shared = summary.total(lambda one: one.shared_bytes)
    lines = [
        f"{len(summary.jobs)} jobs: {counts}, in {format_duration(summary.seconds)}",
        f"{format_size(summary.total(lambda one: one.memory_bytes))} of memory, "
        f"{format_size(taken)} on disk" + (f", {format_size(shared)} shared" if shared else ""),
    ]
    stopped, job = summary.longest_stopped
    if stopped:
        lines.append(f"no guest stood still longer than {stopped:.2f} s (job {job})")
    if verbose:
        lines += [
            f"{state.job.name}: {state.stage}, {state.entry}"
            + (f", {format_size(state.archived.allocated_bytes)}" if state.archived else "")
            for state in summary.jobs
        ]
        lines.append(
            f"peak memory: runner {format_size(summary.peak_runner_bytes)}, "
            f"largest worker {format_size(summary.peak_worker_bytes)}"
        )
    return lines
