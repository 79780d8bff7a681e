"""The targets the project has set itself, each beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from perf import bench_startup
from perf.results import (
    Results,
    Sample,
    by_rival,
    counted,
    cpu_per_gib,
    samples_of,
    throughput_of,
)
from perf.workloads import OF_QEMU
from uringmig.options import WriteOptions
from uringmig.units import MiB, format_size

#: CPU seconds a GiB, as a share of QEMU's, and what the manifest may add.
CPU_SHARE_MAX: Final = 2 / 3
MANIFEST_CPU_MAX: Final = 0.12
PAGE_CACHE_MAX: Final = 8 * MiB
#: CPU seconds of `uringmig save` until QEMU hears of it.
FIRST_BYTE_CPU_MAX: Final = 0.15


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target.

    Attributes:
        met: whether what was measured meets it.
    """

    target: str
    measured: str
    met: bool


Choice = Callable[[Sample], bool]

_DEFAULTS: Final = WriteOptions()
#: Medians nearer to each other than this are a tie: their order changes from run to run.
_TIE: Final = 1.02


def verdicts(results: Results) -> list[Verdict]:
    """Every target for which there are samples."""
    dense = _rounds(results, "dense")
    return [
        *_at_least(
            "dense: our best at least 0.97 of fio's best of the same round",
            _ratio(dense, is_ours, _group("fio")), 0.97, "",
        ),
        *_at_least(
            "dense: our best not behind QEMU's best of the same round",
            _ratio(dense, is_ours, _group("qemu")), 1.0, " x",
        ),
        *_at_least(
            "dense: one channel alone at least 0.95 of our best",
            _ratio(dense, _is_one_channel, is_ours), 0.95, "",
        ),
        *_at_least(
            "fragmented: at least 8 x QEMU's best",
            _ratio(_rounds(results, "fragmented"), is_ours, _group("qemu")), 8.0, " x",
        ),
        *_at_least(
            "fragmented: at least 8 x QEMU's best with multifd and direct-io",
            _ratio(_rounds(results, "fragmented"), is_ours, _is_direct_qemu), 8.0, " x",
        ),
        *_at_least(
            "idle, fresh: at least 10 x QEMU's best",
            _ratio(_rounds(results, "idle"), is_ours, _group("qemu")), 10.0, " x",
        ),
        *_no_allocation(_rounds(results, "idle")),
        *_cpu(dense),
        *_page_cache(results),
        *_at_least(
            "small guest: `uringmig save` from exec to exit not slower than QEMU's best save of it",
            _ratio(_rounds(results, "small"), _is_program, _group("qemu")), 1.0, " x",
        ),
        *_starts(results),
    ]  # fmt: skip


def _rounds(results: Results, workload: str) -> list[Sample]:
    return counted(samples_of(results, "disk", workload, "save"))


def is_ours(sample: Sample) -> bool:
    """Our writer at its best: io_uring, O_DIRECT, from the RAM file if it is one, no manifest."""
    return _is_our_writer(sample) and not sample.settings["manifest"]


def is_as_delivered(sample: Sample) -> bool:
    """What a user gets who sets nothing: every default, and with that the manifest."""
    return _is_our_writer(sample) and _has_defaults(sample) and bool(sample.settings["manifest"])


def _is_our_writer(sample: Sample) -> bool:
    settings = sample.settings
    return (
        sample.group == "uringmig"
        and sample.kind == "save"
        and settings["engine"] == "io_uring"
        and settings["direct"] != "off"
        and settings["route"] == ("machine" if sample.workload in OF_QEMU else "file")
        and not settings["rate"]
        and bool(settings["bridge"])
    )


def _is_one_channel(sample: Sample) -> bool:
    return is_ours(sample) and sample.settings["channels"] == 1


def _is_default(sample: Sample) -> bool:
    return is_ours(sample) and _has_defaults(sample)


def _has_defaults(sample: Sample) -> bool:
    return all(
        sample.settings[name] == getattr(_DEFAULTS, name)
        for name in ("channels", "depth", "block_size", "bridge")
    )


def _is_program(sample: Sample) -> bool:
    return sample.group == "uringmig" and sample.settings["route"] == "program"


def _is_direct_qemu(sample: Sample) -> bool:
    return sample.group == "qemu" and sample.settings["direct"] == 1


def _group(name: str) -> Choice:
    return lambda sample: sample.group == name


def _ratio(samples: Sequence[Sample], first: Choice, second: Choice) -> float | None:
    """Median over rounds: the best speed of one group by the best of another."""
    ratios = []
    for number in sorted({sample.round for sample in samples}):
        here = [sample for sample in samples if sample.round == number]
        # Speed over the same guest, by time: gaps that we write through are no merit of ours.
        best = [
            max((s.memory_bytes / s.durable_s for s in here if choice(s)), default=0.0)
            for choice in (first, second)
        ]
        if all(best):
            ratios.append(best[0] / best[1])
    return statistics.median(ratios) if ratios else None


def _at_least(target: str, ratio: float | None, least: float, unit: str) -> list[Verdict]:
    if ratio is None:
        return []
    return [Verdict(target, f"{ratio:.2f}{unit}", ratio >= least)]


def _no_allocation(samples: Sequence[Sample]) -> list[Verdict]:
    ours = [sample.ram_after - sample.ram_before for sample in samples if is_ours(sample)]
    theirs = [s.ram_after - s.ram_before for s in samples if s.group == "qemu"]
    if not ours:
        return []
    beside = f"; QEMU {format_size(max(theirs))}" if theirs else ""
    return [
        Verdict(
            "idle: none of the guest's holes allocated on the host",
            f"{format_size(max(ours))}{beside}",
            max(ours) == 0,
        )
    ]


def _cpu(samples: Sequence[Sample]) -> list[Verdict]:
    """Processor time of our defaults beside QEMU's cheapest, and what the manifest adds."""
    rivals = by_rival(samples)
    ours = [sample for sample in samples if _is_default(sample)]
    qemu = [sample for sample in samples if _is_direct_qemu(sample)]
    theirs = min(
        by_rival([sample for sample in qemu if not sample.settings["touched"]]).values(),
        key=lambda runs: _median(runs, cpu_per_gib),
        default=[],
    )
    mapped = [sample for sample in qemu if sample.settings["touched"]]
    beside = f"; {_median(mapped, cpu_per_gib):.3f} s if it has it mapped" if mapped else ""
    found = []
    if ours and theirs:
        share = _median(ours, cpu_per_gib) / _median(theirs, cpu_per_gib)
        found.append(
            Verdict(
                "dense: cpu a GiB, by default, at most two thirds of QEMU's cheapest direct-io run "
                "over a guest that is as new to it as to us",
                f"{share:.2f} ({_median(ours, cpu_per_gib):.3f} s of {ours[0].rival} by "
                f"{_median(theirs, cpu_per_gib):.3f} s of {theirs[0].rival}{beside})",
                share <= CPU_SHARE_MAX,
            )
        )
    for name, runs in rivals.items():
        bare = rivals.get(name.removesuffix(" +manifest"))
        if name.endswith(" +manifest") and bare:
            added = _median(runs, cpu_per_gib) - _median(bare, cpu_per_gib)
            found.append(
                Verdict(
                    f"dense: the manifest adds at most {MANIFEST_CPU_MAX} cpu s a GiB",
                    f"{added:.3f} s ({name})",
                    added <= MANIFEST_CPU_MAX,
                )
            )
    return found


def _page_cache(results: Results) -> list[Verdict]:
    """The file's pages in the cache after each of our saves to the disk with O_DIRECT."""
    known = [
        sample.cached_bytes
        for sample in results.samples
        if sample.target == "disk" and sample.kind == "save" and is_ours(sample)
        if sample.cached_bytes is not None
    ]
    if not known:
        return []
    return [
        Verdict(
            "page cache of the image under 8 MiB after every save of ours",
            f"at most {format_size(max(known))}",
            max(known) < PAGE_CACHE_MAX,
        )
    ]


def _starts(results: Results) -> list[Verdict]:
    """Processor time of starting: against an empty Python, against numpy alone, and in seconds."""
    medians = {start.what: statistics.median(start.values) for start in results.starts}
    found = []
    for what, beside, most in (
        (bench_startup.VERSION, bench_startup.NOTHING, 3.0),
        (bench_startup.PACKAGE, bench_startup.NUMPY, 1.3),
    ):
        if what in medians and beside in medians:
            ratio = medians[what] / medians[beside]
            found.append(
                Verdict(
                    f"start: `{what}` at most {most:g} x `{beside}`",
                    f"{ratio:.2f} ({1e3 * medians[what]:.0f} by {1e3 * medians[beside]:.0f} ms)",
                    ratio <= most,
                )
            )
    if (first := medians.get(bench_startup.FIRST_BYTE)) is not None:
        found.append(
            Verdict(
                f"start: `{bench_startup.FIRST_BYTE}` at most {FIRST_BYTE_CPU_MAX} cpu s",
                f"{first:.3f} s",
                first <= FIRST_BYTE_CPU_MAX,
            )
        )
    return found


def _durable(sample: Sample) -> float:
    return sample.durable_s


def _median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return statistics.median(value(sample) for sample in samples)


def best_of(samples: Sequence[Sample], choice: Choice) -> tuple[str, float, float, float] | None:
    """Name, median durable seconds, GB/s and cpu s a GiB of the fastest rival of a choice.

    Of those that tie, the one that takes least processor time.
    """
    rivals = by_rival([sample for sample in samples if choice(sample)])
    if not rivals:
        return None
    fastest = min(_median(runs, _durable) for runs in rivals.values())
    name, runs = min(
        (item for item in rivals.items() if _median(item[1], _durable) <= _TIE * fastest),
        key=lambda item: _median(item[1], cpu_per_gib),
    )
    return (
        name,
        _median(runs, _durable),
        _median(runs, throughput_of) / 1e9,
        _median(runs, cpu_per_gib),
    )
