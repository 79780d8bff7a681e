"""Results on disk: every run as a `Sample`, and the same as pyperf's suite.

``samples.json`` has all that was measured. ``pyperf.json`` has one benchmark per target, workload
and rival, one run per sample with its durable seconds as the value and the figures as metadata, so
that ``python -m pyperf show``, ``stats`` and ``compare_to`` work on it.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pyperf

from perf.rivals import Group, Kind
from uringmig.errors import FormatError
from uringmig.units import GiB

SAMPLES: Final = "samples.json"
SUITE: Final = "pyperf.json"


class Sample(msgspec.Struct, kw_only=True):
    """One run of one rival; seconds and bytes.

    Attributes:
        nonzero_bytes: of the guest's memory, in pages that are not zero.
        scanned_bytes: of the guest's memory, what is not a hole.
        attempt: 1, or more where a disturbed run was repeated; the last one counts.
        cached_bytes: of the file, in the page cache afterwards; None where nobody can tell.
        image_allocated: bytes the file has on its disk.
        ram_before: bytes the host had given the guest before the run, and after it.
        disturbed: what others did meanwhile; empty is nothing.
    """

    target: str
    workload: str
    rival: str
    group: Group
    kind: Kind
    settings: dict[str, str | int]
    memory_bytes: int
    nonzero_bytes: int
    scanned_bytes: int
    round: int
    order: int
    attempt: int
    completed_s: float
    durable_s: float
    startup_s: float
    cpu_s: float
    user_s: float
    machine_cpu_s: float
    steal_s: float
    foreign_user_s: float
    disk_written: int
    disk_read: int
    moved_bytes: int
    requests: int
    peak_bytes: int
    anonymous_bytes: int
    cached_bytes: int | None
    cached_growth: int
    image_allocated: int
    ram_before: int
    ram_after: int
    disturbed: list[str]
    account: dict[str, float]
    timeline: list[tuple[float, int]]
    notes: list[str]

    @property
    def benchmark(self) -> str:
        """Its name in the suite."""
        return f"{self.target}/{self.workload}/{self.kind} {self.rival}"


class Start(msgspec.Struct, kw_only=True):
    """Processor seconds until a process did what it was started for, one value a process."""

    what: str
    values: list[float]


class Results(msgspec.Struct, kw_only=True):
    """A whole run of the harness.

    Attributes:
        command: as it was typed.
        commit: of the code that was measured.
        hosts: what must agree before a comparison, by target; see `perf.host`.
        starts: what `perf.bench_startup` found; empty if it was left out.
    """

    command: str
    started: str
    seed: int
    commit: str
    hosts: dict[str, dict[str, str]]
    samples: list[Sample] = []
    starts: list[Start] = []


class Figures(msgspec.Struct, kw_only=True):
    """What the samples of one rival come to: medians over the rounds.

    Attributes:
        spread: half the distance of the quartiles of the durable time, as a share of its median.
        ceiling_ratio: throughput as a share of fio's best of the same round, median; None without.
        qemu_ratio: how many times faster than QEMU's best of the same round, median; None without.
        cpu_per_gib: processor seconds for each GiB of the guest.
        disturbed: runs that others disturbed, repeated ones included.
    """

    rival: str
    group: Group
    runs: int
    durable_s: float
    completed_s: float
    spread: float
    throughput: float
    ceiling_ratio: float | None
    qemu_ratio: float | None
    cpu_s: float
    cpu_per_gib: float
    cached_bytes: float | None
    anonymous_bytes: float
    ram_growth: float
    disturbed: int


def save(results: Results, folder: Path) -> None:
    """Write both files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{SAMPLES}.partial"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    part.replace(folder / SAMPLES)
    if results.samples:
        part = folder / f"{SUITE}.partial"
        as_suite(results).dump(str(part), replace=True)
        part.replace(folder / SUITE)


def load(folder: Path) -> Results:
    """Read ``samples.json``.

    Raises:
        FormatError: it is not there, or not what this program writes.
    """
    path = folder / SAMPLES
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.DecodeError) as error:
        raise FormatError(f"{path}: no results of perf: {error}") from None


def as_suite(results: Results) -> pyperf.BenchmarkSuite:
    """The same as pyperf has it."""
    runs: dict[str, list[pyperf.Run]] = defaultdict(list)
    for sample in counted(results.samples):
        runs[sample.benchmark].append(_as_run(sample, results))
    return pyperf.BenchmarkSuite([pyperf.Benchmark(items) for items in runs.values()])


def _as_run(sample: Sample, results: Results) -> pyperf.Run:
    metadata: dict[str, str | int | float] = {
        "name": sample.benchmark,
        "unit": "second",
        "perf_version": pyperf.__version__,
        "cpu_count": os.cpu_count() or 0,
        "date": results.started,
        "code_commit": results.commit,
        "setting_memory_bytes": sample.memory_bytes,
        "setting_seed": results.seed,
        "disturbed": "; ".join(sample.disturbed) or "no",
        **results.hosts[sample.target],
        **{f"setting_{name}": value for name, value in sample.settings.items()},
    }
    for name in (
        *("completed_s", "cpu_s", "user_s", "startup_s", "moved_bytes", "requests"),
        *("peak_bytes", "anonymous_bytes", "image_allocated", "round", "attempt"),
    ):
        metadata[name] = getattr(sample, name)
    if sample.cached_bytes is not None:
        metadata["cached_bytes"] = sample.cached_bytes
    return pyperf.Run([sample.durable_s], metadata=metadata, collect_metadata=False)


def counted(samples: Iterable[Sample]) -> list[Sample]:
    """Of each rival and round the last attempt: that is what a repetition is for."""
    last: dict[tuple[str, int], Sample] = {}
    for sample in samples:
        key = (sample.benchmark, sample.round)
        if key not in last or sample.attempt > last[key].attempt:
            last[key] = sample
    return list(last.values())


def contests(results: Results) -> list[tuple[str, str, Kind]]:
    """The (target, workload, kind) there are, in the order they ran."""
    return list(dict.fromkeys((s.target, s.workload, s.kind) for s in results.samples))


def samples_of(results: Results, target: str, workload: str, kind: Kind) -> list[Sample]:
    """All runs of one contest, disturbed ones and repetitions too."""
    wanted = (target, workload, kind)
    return [s for s in results.samples if (s.target, s.workload, s.kind) == wanted]


def by_rival(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The runs of each rival, by its name."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.rival].append(sample)
    return found


def figures(samples: Sequence[Sample]) -> list[Figures]:
    """Figures of every rival of one contest, fastest first."""
    rounds = counted(samples)
    fio = _best(rounds, "fio", throughput_of)
    qemu = _best(rounds, "qemu", lambda sample: 1 / sample.durable_s)
    found = []
    for rival, runs in by_rival(rounds).items():
        cached = [run.cached_bytes for run in runs if run.cached_bytes is not None]
        durable = [run.durable_s for run in runs]
        found.append(
            Figures(
                rival=rival,
                group=runs[0].group,
                runs=len(runs),
                durable_s=statistics.median(durable),
                completed_s=statistics.median(run.completed_s for run in runs),
                spread=_spread(durable),
                throughput=statistics.median(throughput_of(run) for run in runs),
                ceiling_ratio=_ratio(runs, fio, throughput_of),
                qemu_ratio=_ratio(runs, qemu, lambda sample: 1 / sample.durable_s),
                cpu_s=statistics.median(run.cpu_s for run in runs),
                cpu_per_gib=statistics.median(cpu_per_gib(run) for run in runs),
                cached_bytes=statistics.median(cached) if cached else None,
                anonymous_bytes=statistics.median(run.anonymous_bytes for run in runs),
                ram_growth=statistics.median(run.ram_after - run.ram_before for run in runs),
                disturbed=sum(bool(s.disturbed) for s in samples if s.rival == rival),
            )
        )
    return sorted(found, key=lambda figure: figure.durable_s)


def throughput_of(sample: Sample) -> float:
    """Bytes moved a second, until durable; where none were, bytes of the guest's memory."""
    return (sample.moved_bytes or sample.memory_bytes) / sample.durable_s


def cpu_per_gib(sample: Sample) -> float:
    """Processor seconds for each GiB of the guest."""
    return sample.cpu_s / (sample.memory_bytes / GiB)


def _best(
    samples: Sequence[Sample], group: Group, speed: Callable[[Sample], float]
) -> dict[int, float]:
    """The best speed of a group, by round."""
    best: dict[int, float] = {}
    for sample in samples:
        if sample.group == group:
            best[sample.round] = max(best.get(sample.round, 0.0), speed(sample))
    return best


def _ratio(
    runs: Sequence[Sample], best: dict[int, float], speed: Callable[[Sample], float]
) -> float | None:
    """Median of a rival's speed against the best one of the same round."""
    ratios = [speed(run) / best[run.round] for run in runs if run.round in best]
    return statistics.median(ratios) if ratios else None


def _spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles, as a share of the median; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return (quartiles[2] - quartiles[0]) / 2 / quartiles[1]
