"""A run of the harness: contests in order, each in rounds, each round in an order of its own.

Every rival gets the same start: no image there (or none of it in the page cache, for a load), the
guest's memory present as it was in the first round, the processors idle. What others did meanwhile
is noted with each sample; a disturbed run may be repeated, and stays in the results all the same.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pyperf

from perf.host import describe_host, device_of
from perf.observe import cached_bytes, drop_file_cache, drop_page_cache, wait_until_idle
from perf.program import compile_package
from perf.programme import Contest
from perf.results import Results, Sample, Start, save
from perf.rivals import ROOT, Measured, Ours, Rival, Task
from perf.targets import opened
from perf.workloads import GuestRam
from uringmig.errors import UringmigError
from uringmig.options import PAGE_SIZE

#: A median of so many processes is steady on a quiet machine.
STARTS: Final = 20
#: How long the processors may take to become idle before a run; then it begins all the same.
SETTLE_S: Final = 1.0


class RivalFailed(UringmigError):
    """A rival could not do its work, so its contest has no result; the message says which."""

    exit_code = 4

    def __init__(self, contest: Contest, rival: Rival, cause: UringmigError) -> None:
        self.cause = cause
        super().__init__(f"{contest.target}/{contest.workload.name}: {rival.name} failed: {cause}")


@dataclass(slots=True)
class Session:
    """Runs contests and keeps their results.

    Attributes:
        folder: on the disk, where images are made.
        out: where results go; written after every contest, and when one fails.
        seed: of the orders and of the guests' bytes.
        repeat_disturbed: how often a disturbed run is tried again.
        say: told one line at a time what goes on.
        settle_s: how long to wait for idle processors; 0 does not write back what others left
            on the disk either.
    """

    folder: Path
    out: Path
    seed: int
    repeat_disturbed: int = 0
    say: Callable[[str], None] = print
    settle_s: float = SETTLE_S
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        """Begin the record."""
        self.results = Results(
            command=" ".join(["python -m perf", *sys.argv[1:]]),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=self.seed,
            commit=_commit(),
            hosts={},
        )

    def run(self, contests: Sequence[Contest], *, startup: bool = False) -> Results:
        """Run all contests, and before them the bench of starting if ``startup`` is set.

        Raises:
            RivalFailed: names the rival and its cause; what was measured before is on disk.
        """
        self.say(f"seed {self.seed}; repeat with --seed {self.seed}")
        compile_package()
        try:
            if startup:
                self.say("== start-up: processor time of processes")
                self.results.starts = measure_starts(self.say)
            for contest in contests:
                self._contest(contest)
                save(self.results, self.out)
        finally:
            save(self.results, self.out)
        return self.results

    def _contest(self, contest: Contest) -> None:
        """Run the rounds of one contest."""
        workload = contest.workload
        self.say(
            f"== {contest.target}/{workload.name} {contest.kind}: "
            f"{workload.memory_bytes >> 20} MiB ({workload.what}), {len(contest.rivals)} rivals, "
            f"{contest.rounds} rounds"
        )
        drop_page_cache()
        with (
            opened(contest.target, self.folder, size_bytes=workload.memory_bytes) as place,
            GuestRam(workload, seed=self.seed) as ram,
        ):
            host = describe_host(place)
            self.results.hosts[contest.target] = host
            direct = host["host_alignment"] != "no O_DIRECT"
            image = place / "guest.mig"
            if contest.kind == "load":
                # An image of a real machine, which QEMU can load too.
                self._attempt(
                    contest, Ours(route="machine", label="outside"), ram, image, direct=direct
                )
            order = random.Random(f"{self.seed}/{contest.target}/{workload.name}/{contest.kind}")
            for number in range(1, contest.rounds + 1):
                rivals = list(contest.rivals)
                order.shuffle(rivals)
                for position, rival in enumerate(rivals):
                    self._turn(contest, rival, ram, image, (number, position), direct=direct)

    def _turn(
        self,
        contest: Contest,
        rival: Rival,
        ram: GuestRam,
        image: Path,
        place: tuple[int, int],
        *,
        direct: bool,
    ) -> None:
        """One rival's turn in a round, tried again while others disturb it."""
        for attempt in range(1, self.repeat_disturbed + 2):
            ram.refresh()
            before = ram.allocated_bytes
            measured = self._attempt(contest, rival, ram, image, direct=direct)
            sample = self._sample(contest, rival, measured, image, ram, before)
            sample.round, sample.order, sample.attempt = *place, attempt
            self.results.samples.append(sample)
            self.say(_line(sample))
            if not sample.disturbed:
                return

    def _attempt(
        self, contest: Contest, rival: Rival, ram: GuestRam, image: Path, *, direct: bool
    ) -> Measured:
        """Give a rival its start and let it run."""
        if rival.kind == "load":
            drop_file_cache(image)
        else:
            for old in image.parent.glob(f"{image.name}*"):
                old.unlink()
        if self.settle_s:
            # What was removed is given back to the disk now and not during the run.
            os.sync()
        wait_until_idle(timeout_s=self.settle_s)
        # Names of sockets have to be short.
        with tempfile.TemporaryDirectory(prefix="perf-") as scratch:
            task = Task(ram, image, Path(scratch), device_of(image.parent), direct)
            try:
                return rival.run(task)
            except UringmigError as error:
                raise RivalFailed(contest, rival, error) from error

    def _sample(
        self,
        contest: Contest,
        rival: Rival,
        measured: Measured,
        image: Path,
        ram: GuestRam,
        ram_before: int,
    ) -> Sample:
        """Put together what is known of one run."""
        costs = measured.costs
        saving = rival.kind == "save"
        moves = 0 if rival.group == "twin" else measured.moved_bytes
        disturbed = costs.disturbances(
            own_written=moves if saving else 0, own_read=0 if saving else moves
        )
        return Sample(
            target=contest.target,
            workload=contest.workload.name,
            rival=rival.name,
            group=rival.group,
            kind=rival.kind,
            settings=rival.settings,
            memory_bytes=contest.workload.memory_bytes,
            nonzero_bytes=ram.nonzero_pages * PAGE_SIZE,
            scanned_bytes=ram_before,
            round=0,
            order=0,
            attempt=0,
            completed_s=measured.completed_s,
            durable_s=measured.durable_s,
            startup_s=measured.startup_s,
            cpu_s=costs.cpu_s,
            user_s=costs.user_s,
            machine_cpu_s=costs.machine_cpu_s,
            steal_s=costs.steal_s,
            foreign_user_s=costs.foreign_user_s,
            disk_written=costs.disk_written,
            disk_read=costs.disk_read,
            moved_bytes=measured.moved_bytes,
            requests=measured.requests,
            peak_bytes=measured.memory.peak,
            anonymous_bytes=measured.memory.anonymous,
            cached_bytes=cached_bytes(image),
            cached_growth=costs.cached_growth,
            image_allocated=image.stat().st_blocks * 512,
            ram_before=ram_before,
            ram_after=ram.allocated_bytes,
            disturbed=disturbed,
            account=measured.account,
            timeline=measured.timeline,
            notes=measured.notes,
        )


def measure_starts(say: Callable[[str], None]) -> list[Start]:
    """Run `perf.bench_startup`, one process a value."""
    with tempfile.TemporaryDirectory(prefix="perf-") as scratch:
        file = Path(scratch) / "starts.json"
        command = [
            *(sys.executable, "-m", "perf.bench_startup", "--quiet", "-o", str(file)),
            *("--processes", str(STARTS), "--values", "1", "--warmups", "0", "--loops", "1"),
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        suite = pyperf.BenchmarkSuite.load(str(file))
    starts = [
        Start(what=bench.get_name(), values=list(bench.get_values()))
        for bench in suite.get_benchmarks()
    ]
    for start in starts:
        say(f"      {start.what:40} {1e3 * statistics.median(start.values):7.1f} ms")
    return starts


def _line(sample: Sample) -> str:
    """One run for people."""
    rate = (sample.moved_bytes or sample.memory_bytes) / sample.durable_s / 1e9
    text = (
        f"{sample.round:2}.{sample.order:02} {sample.rival:40} {sample.durable_s:7.3f} s "
        f"{rate:6.2f} GB/s  cpu {sample.cpu_s:6.2f} s"
    )
    return text + (f"  disturbed: {', '.join(sample.disturbed)}" if sample.disturbed else "")


def _commit() -> str:
    """The commit that was measured, with a mark if files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"
