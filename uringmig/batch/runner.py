"""The story of a run: look at every job, refuse what cannot fit, admit, watch, try again, record.

One thread and one loop. Workers write images and manifests; this process alone holds the archives'
locks, fills their catalogues and keeps the run's journal, so a worker may die at any moment, and so
may this process: the next run reads journal and archives and goes on.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import structs

from uringmig.archive.directory import EntryFiles
from uringmig.batch.admission import DEPTH_OTHERWISE, Admission, Allowance
from uringmig.batch.disks import DiskUse, disks_of
from uringmig.batch.job import ImageSource, Job
from uringmig.batch.ledger import Ledger
from uringmig.batch.memory import OwnMemory
from uringmig.batch.messages import (
    Archived,
    Attempt,
    Disk,
    Estimate,
    Examine,
    Measure,
    MeasuredDepth,
    Message,
    Order,
    Outcome,
    Progress,
    Sizes,
    failure,
)
from uringmig.batch.planning import Plan, PlanRow, free_space, make_plan
from uringmig.batch.pool import Pool
from uringmig.batch.state import DiskView, JobState, RunView, Stage, Summary, Watcher
from uringmig.errors import LimitError, PeerError, StateError, UringmigError
from uringmig.units import format_duration

_TICK_SECONDS: Final = 0.2
#: Between looks at the disks' own counters, which the kernel updates about as often.
_DISK_SECONDS: Final = 1.0
#: Backoff doubles up to this; with jitter, since jobs that met one busy peer would meet it again.
_BACKOFF_SECONDS_MAX: Final = 300.0
#: Examining opens a source and connects to a QMP socket, whose own limits are shorter.
_EXAMINE_SECONDS: Final = 120.0
_MEASURE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a run behaves beside what its job file says; seconds.

    Attributes:
        backoff_s: before the first retry; twice as long before each further one.
        grace_s: what a worker has for cleaning up before it is killed: enough to unlink a partial
            file of any size, and for QEMU to take its guest back.
    """

    backoff_s: float = 1.0
    grace_s: float = 60.0


class Run:
    """One run of a job file.

    Args:
        ledger: open for writing, unless only `plan` is called.
        pool: where orders are carried out; stays the caller's.
        settings: see there.
        watchers: are told what happens.
        stop: asked often; the number of a signal that asks to end the run, or None.
    """

    def __init__(
        self,
        ledger: Ledger,
        pool: Pool,
        *,
        settings: RunSettings = RunSettings(),
        watchers: Sequence[Watcher] = (),
        stop: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self._settings = settings
        self._watchers = watchers
        self._stop = stop
        self._stopped_by: int | None = None
        self._began_at = time.monotonic()
        self._states = ledger.states()
        self._by_name = {state.job.name: state for state in self._states}
        self._places: dict[str, EntryFiles] = {}
        self._admission = Admission({})
        self._disks = _Disks()
        self._memory = OwnMemory()

    def plan(self) -> Plan:
        """Look at every job's source, in the workers, and add up what the run asks for.

        Raises:
            StorageError: the free space cannot be looked at.
        """
        self._check_entries(new=False)
        orders = [
            (Examine(key=state.job.name, job=state.job), state.job.host)
            for state in self._states
            if not state.final
        ]
        limits = {
            state.job.name: min(state.job.timeout_s or _EXAMINE_SECONDS, _EXAMINE_SECONDS)
            for state in self._states
        }
        outcomes = self._errands(orders, limits)
        for state in self._states:
            outcome = outcomes.get(state.job.name)
            if outcome is not None:
                self._examined(state, outcome)
        self._check_entries(new=True)
        rows = [self._with_sharing(state, _plan_row(state)) for state in self._states]
        archives = self._ledger.archives
        plan = make_plan(
            rows,
            {archive: free_space(archive) for archive in archives},
            unfinished={archive: self._ledger.unfinished_bytes(archive) for archive in archives},
        )
        self._ledger.notes += plan.notes
        return plan

    def _check_entries(self, *, new: bool) -> None:
        """Give jobs up at once whose entries cannot be made; see `Ledger.check_entry`."""
        for state in self._states:
            if state.final:
                continue
            try:
                self._ledger.check_entry(state, new=new)
            except StateError as error:
                state.kind, state.error = type(error).__name__, str(error)
                state.exit_code = error.exit_code
                state.refused = True
                self._enter(state, "failed")

    def _with_sharing(self, state: JobState, row: PlanRow) -> PlanRow:
        """Say in the plan, and on the first night, that pages cannot be shared, if it is so."""
        if state.final:
            return row
        trouble, begun = self._ledger.sharing_trouble(state)
        if trouble is None:
            # What is shared with the earlier image takes no room.
            return structs.replace(row, at_most=row.at_most or begun)
        if not begun:  # later on each attempt says it
            state.warnings.append(f"later images will share nothing: {trouble}")
        return structs.replace(row, warning=f"nothing will be shared: {trouble}")

    def execute(self) -> Summary:
        """Archive, after `plan`; returns when every job is through, or the run was stopped."""
        self._ledger.clear_leftovers(self._states)
        self._measure_disks()
        while not all(state.final for state in self._states):
            self._heed_signal()
            self._begin_jobs()
            self._take_in(self._pool.poll(_TICK_SECONDS))
            self._enforce_limits()
            self._look()
        if not any(state.stage == "stopped" for state in self._states):
            # A signal that came when all was done, or given up, has stopped nothing.
            self._stopped_by = None
            self._ledger.end()
        return self._summary()

    def view(self) -> RunView:
        """Where everything stands."""
        return RunView(
            jobs=self._states,
            disks=self._disks.look(self._admission),
            seconds=time.monotonic() - self._began_at,
            runner_bytes=self._memory.look(),
        )

    def _examined(self, state: JobState, outcome: Outcome) -> None:
        """Keep an estimate; a source that cannot be looked at now may still be archived later."""
        state.note_outcome(outcome)
        if isinstance(outcome.result, Estimate):
            state.estimate = outcome.result
            if self._ledger.unchanged(state, outcome.result.fingerprint):
                state.notes.append("the entry is there, and its source has not changed")
                self._enter(state, "skipped")
        elif not outcome.may_pass and outcome.ending == "failed":
            self._enter(state, "failed")

    def _errands(
        self, orders: Sequence[tuple[Order, str | None]], limits_s: Mapping[str, float]
    ) -> dict[str, Outcome]:
        """Have orders carried out that are small and need no admission."""
        waiting = list(orders)
        begun: dict[str, float] = {}
        outcomes: dict[str, Outcome] = {}
        while len(outcomes) < len(orders) and self._stopped_by is None:
            for order, host in list(waiting):
                if (refusal := self._pool.refusal(host)) is not None:
                    outcomes[order.key] = failure(order.key, refusal)
                elif self._pool.has_room(host):
                    self._pool.submit(order, host=host)
                    begun[order.key] = time.monotonic()
                else:
                    continue
                waiting.remove((order, host))
            for message in self._pool.poll(_TICK_SECONDS):
                if isinstance(message, Outcome):
                    outcomes[message.key] = message
                    begun.pop(message.key, None)
            for key, since in begun.items():
                if time.monotonic() - since > limits_s[key]:
                    self._pool.stop(key, at_once=True)
            self._heed_signal()
            self._look()
        return outcomes

    def _measure_disks(self) -> None:
        """Settle what every disk takes: as the job file says, else as measured now."""
        limits = {
            disk.name: limit for limit in self._ledger.job_file.devices
            for disk in disks_of(limit.path)
        }  # fmt: skip
        orders: dict[str, tuple[Order, str | None]] = {}
        allowances: dict[str, Allowance] = {}
        for state in self._states:
            if state.final:
                continue
            estimate = state.estimate or _unseen(state.job)
            for disk in (*estimate.archive_disks, *estimate.source_disks):
                limit = limits.get(disk.name)
                rate = 0 if limit is None else limit.rate
                if limit is not None and limit.depth is not None:
                    allowances[disk.key] = Allowance(limit.depth, rate, stated=True)
                elif disk.key not in allowances:
                    allowances[disk.key] = Allowance(min(DEPTH_OTHERWISE, disk.requests_max), rate)
                    order = _measuring(state.job, disk, estimate)
                    orders[order.key] = (order, state.job.host)
        outcomes = self._errands(list(orders.values()), dict.fromkeys(orders, _MEASURE_SECONDS))
        for key, outcome in outcomes.items():
            disk_key = key.removeprefix("disk ")
            before = allowances[disk_key]
            if isinstance(outcome.result, MeasuredDepth):
                allowances[disk_key] = Allowance(outcome.result.depth, before.rate)
            elif self._stopped_by is None:
                self._ledger.notes.append(
                    f"{key} could not be measured: {before.depth} requests at a time are assumed "
                    f"to suit it ({outcome.error})"
                )
        self._admission = Admission(allowances)

    def _heed_signal(self) -> None:
        """At the first signal let nothing more begin, and have what runs clean up."""
        if self._stopped_by is not None or (number := self._stop()) is None:
            return
        self._stopped_by = number
        for state in self._states:
            if state.stage == "running":
                self._ask_to_stop(state)
            elif not state.final:
                self._enter(state, "stopped")

    def _take_in(self, messages: Sequence[Message]) -> None:
        """Keep progress; begin the next job before the last one is written down: no disk waits."""
        outcomes = []
        for message in messages:
            state = self._by_name[message.key]
            if isinstance(message, Progress):
                state.progress = message.snapshot
            else:
                self._admission.release(state.job)
                outcomes.append((state, message))
        if outcomes:
            self._heed_signal()
            self._begin_jobs()
        for state, outcome in outcomes:
            self._ended(state, outcome)

    def _begin_jobs(self) -> None:
        """Begin every job whose time has come, whose disks have room, and for which a worker is."""
        now = time.monotonic()
        for state in self._states:
            if state.stage != "waiting" or now < state.not_before:
                continue
            host = state.job.host
            if (refusal := self._pool.refusal(host)) is not None:
                state.attempts += 1
                self._ended(state, failure(state.job.name, refusal))
            elif self._pool.has_room(host) and not self._crowded(state):
                estimate = state.estimate or _unseen(state.job)
                job = self._admission.fitted(state.job, estimate)
                rate = self._admission.admit(job, estimate)
                if rate is not None:
                    self._begin(state, job, rate)

    def _crowded(self, state: JobState) -> bool:
        """Say whether another job runs on its host while one of the two is to run alone there."""
        return any(
            (state.alone or other.alone) and other.job.host == state.job.host
            for other in self._states
            if other.stage == "running"
        )

    def _begin(self, state: JobState, job: Job, rate: int) -> None:
        """Give a job, as it was admitted, to a worker."""
        state.attempts += 1
        try:
            place, previous = self._ledger.start(state)
        except UringmigError as error:
            self._admission.release(job)
            state.kind, state.error = type(error).__name__, str(error)
            state.exit_code = error.exit_code
            self._enter(state, "failed")
            return
        self._places[job.name] = place
        state.began_at = time.monotonic()
        state.stopping_at, state.timed_out, state.progress = None, False, None
        self._pool.submit(
            Attempt(
                key=job.name,
                job=job,
                entry=state.entry,
                image=str(place.image),
                journal=str(place.journal),
                previous=previous,
                rate=rate,
            ),
            host=job.host,
        )
        self._enter(state, "running")

    def _ended(self, state: JobState, outcome: Outcome) -> None:
        """An attempt is over: done, to be tried again, or given up."""
        # A service manager sends its signal to the workers too, and theirs may be told first.
        self._heed_signal()
        state.note_outcome(outcome)
        place = self._places.pop(state.job.name, None)
        archived = outcome.result if isinstance(outcome.result, Archived) else None
        if archived is None and place is not None and os.path.exists(place.image):
            archived = self._ledger.adopt(state, place)
        if archived is not None:
            state.archived = archived
            state.kind = state.error = ""
            state.exit_code = 0
            state.notes += archived.notes
            state.warnings += archived.warnings
            self._ledger.finish(state, archived)
            self._enter(state, "done")
            return
        if state.timed_out:
            limit = format_duration(state.job.timeout_s)
            state.kind, state.error = "Timeout", f"given up after {limit}"
            state.exit_code = PeerError.exit_code
        if self._stopped_by is not None:
            self._ledger.fail(state, place, stopped=True)
            self._enter(state, "stopped")
        elif (
            (outcome.may_pass or outcome.ending == "stopped")
            and not state.timed_out
            and state.attempts <= state.job.retries
        ):
            self._try_again(state)
        else:
            self._ledger.fail(state, place, stopped=False)
            self._enter(state, "failed")

    def _try_again(self, state: JobState) -> None:
        """Let a job wait, longer each time."""
        delay = self._settings.backoff_s * 2 ** max(0, state.attempts - 1)
        delay = min(delay, _BACKOFF_SECONDS_MAX) * random.uniform(0.75, 1.25)
        state.not_before = time.monotonic() + delay
        state.alone = state.exit_code == LimitError.exit_code
        state.notes.append(f"attempt {state.attempts}: {state.error}")
        self._enter(state, "waiting")

    def _enforce_limits(self) -> None:
        """Stop what takes too long, and kill what does not stop."""
        now = time.monotonic()
        for state in self._states:
            if state.stage != "running":
                continue
            limit = state.job.timeout_s
            if state.stopping_at is None:
                if limit and now - state.began_at > limit:
                    state.timed_out = True
                    self._ask_to_stop(state)
            elif now - state.stopping_at > self._settings.grace_s:
                self._pool.stop(state.job.name, at_once=True)

    def _ask_to_stop(self, state: JobState) -> None:
        """Have a worker clean up; not when the image is just getting its name."""
        state.stopping_at = time.monotonic()
        self._pool.stop(state.job.name, at_once=False)

    def _enter(self, state: JobState, stage: Stage) -> None:
        """Move a job to another stage, and tell."""
        state.stage = stage
        for watcher in self._watchers:
            watcher.changed(state)

    def _look(self) -> None:
        """Show watchers where everything stands."""
        view = self.view()
        for watcher in self._watchers:
            watcher.look(view)

    def _summary(self) -> Summary:
        """What is to be reported."""
        return Summary(
            job_file=self._ledger.job_file.path,
            time=self._ledger.time,
            seconds=time.monotonic() - self._began_at,
            jobs=tuple(self._states),
            resumed=self._ledger.resumed,
            stopped_by=self._stopped_by,
            peak_runner_bytes=self._memory.peak_bytes,
            peak_worker_bytes=max((state.peak_bytes for state in self._states), default=0),
            notes=tuple(self._ledger.notes),
            warnings=tuple(self._ledger.warnings),
            depths={key: allowance.depth for key, allowance in self._admission.allowances.items()},
        )


class _Disks:
    """What the disks of a run do, looked at now and then."""

    def __init__(self) -> None:
        self._use = DiskUse()
        self._looked_at = float("-inf")
        self._seen: dict[str, tuple[float, float] | None] = {}

    def look(self, admission: Admission) -> list[DiskView]:
        """Every disk that admission knows of."""
        now = time.monotonic()
        if now - self._looked_at >= _DISK_SECONDS:
            self._looked_at = now
            self._seen = {
                key: self._use.look(key.rpartition(":")[2]) for key in admission.allowances
            }
        views = []
        for key, allowance in admission.allowances.items():
            busy, moved = self._seen.get(key) or (None, None)
            in_flight = admission.in_flight(key)
            views.append(DiskView(key, in_flight, allowance.depth, allowance.rate, busy, moved))
        return views


def _plan_row(state: JobState) -> PlanRow:
    """A job in the plan."""
    estimate = None if state.stage == "skipped" else state.estimate
    sizes = {name: getattr(estimate, name) for name in Sizes.__struct_fields__} if estimate else {}
    return PlanRow(
        job=state.job.name,
        entry=state.entry,
        archive=state.job.archive,
        tier=state.job.tier,
        done=state.notes[-1] if state.stage == "skipped" else "",
        problem=state.error,
        exit_code=state.exit_code if state.refused else 0,
        stored_at_most=estimate is not None and estimate.at_most,
        **sizes,
    )


def _unseen(job: Job) -> Estimate:
    """What is known of a job whose source could not be looked at."""
    source = job.source.image if isinstance(job.source, ImageSource) else None
    return Estimate(
        source_disks=() if source is None else disks_of(source),
        archive_disks=disks_of(job.archive),
    )


def _measuring(job: Job, disk: Disk, estimate: Estimate) -> Measure:
    """How a disk of a job is measured: by writing in the archive, or else by reading the source."""
    path = job.archive
    if disk not in estimate.archive_disks and isinstance(job.source, ImageSource):
        path = job.source.image
    return Measure(
        key=f"disk {disk.key}",
        path=path,
        host=job.host,
        depth_max=disk.requests_max,
    )
