"""The harness's sums, files, comparison and report, on results made by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pyperf
import pytest

from perf.compare import compare
from perf.plots import plots
from perf.report import results_table, write_report
from perf.results import Results, Sample, Start, as_suite, counted, figures, load, save
from perf.rivals import Group
from perf.verdict import best_of, is_ours, verdicts
from uringmig.errors import FormatError, MismatchError
from uringmig.units import GiB, MiB

HOST = {"host_device": "vda", "host_kernel": "6.1", "host_file_system": "ext4"}
GROUPS: dict[str, Group] = {
    "uringmig io_uring 2x8x1M": "uringmig",
    "uringmig io_uring 1x16x1M": "uringmig",
    "uringmig io_uring 2x8x1M +manifest": "uringmig",
    "uringmig null 2x8x1M": "twin",
    "qemu mapped-ram multifd x2 direct": "qemu",
    "fio io_uring 1x16x1M sized": "fio",
}


def sample(rival: str, seconds: float, *, number: int = 1, **changes: object) -> Sample:
    channels, depth = (1, 16) if "1x16" in rival else (2, 8)
    made = Sample(
        target="disk",
        workload="dense",
        rival=rival,
        group=GROUPS[rival],
        kind="save",
        settings={
            "channels": channels, "depth": depth, "block_size": MiB, "engine": "io_uring",
            "direct": 1 if rival.startswith("qemu") else "preferred", "route": "file",
            "manifest": int("manifest" in rival), "rate": 0, "touched": 0, "bridge": 16384,
        },
        memory_bytes=GiB,
        nonzero_bytes=GiB,
        scanned_bytes=GiB,
        round=number,
        order=0,
        attempt=1,
        completed_s=seconds * 0.9,
        durable_s=seconds,
        startup_s=0.1,
        cpu_s=seconds / 2,
        user_s=seconds / 4,
        machine_cpu_s=seconds,
        steal_s=0.0,
        foreign_user_s=0.0,
        disk_written=GiB,
        disk_read=0,
        moved_bytes=GiB,
        requests=1024,
        peak_bytes=GiB,
        anonymous_bytes=20 * MiB,
        cached_bytes=0,
        cached_growth=0,
        image_allocated=GiB,
        ram_before=GiB,
        ram_after=GiB,
        disturbed=[],
        account={
            "elapsed": seconds, "scan": seconds / 5, "digest": 0.0, "submit": seconds / 5,
            "wait": seconds, "channel_cpu": seconds / 3, "sync": 0.01, "publish": 0.01,
        } if rival.startswith("uringmig") else {},
        timeline=[(seconds * step / 9, GiB * step // 9) for step in range(1, 10)],
        notes=[],
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def results_of(samples: list[Sample], **host: str) -> Results:
    return Results(
        command="python -m perf run",
        started="2026-01-02T03:04:05+00:00",
        seed=7,
        commit="abc",
        hosts={"disk": {**HOST, **host}},
        samples=samples,
    )


def whole_results() -> Results:
    """Three rounds of everybody; the machine is slower in each, so that rounds matter."""
    rounds = [
        sample(rival, base * number, number=number)
        for number in (1, 2, 3)
        for rival, base in zip(GROUPS, (0.6, 0.63, 0.66, 0.2, 0.9, 0.58), strict=True)
    ]
    one = sample("uringmig io_uring 1x16x1M", 1.0)
    grid = [
        msgspec.structs.replace(
            one, workload="grid", rival=f"uringmig io_uring 1x{depth}x{size}",
            durable_s=1 / depth + MiB / size,
            settings={**one.settings, "depth": depth, "block_size": size},
        )
        for depth in (1, 4, 16) for size in (MiB // 4, MiB, 4 * MiB)
    ]  # fmt: skip
    return results_of([*rounds, *grid])


def test_ratios_are_against_the_best_of_the_same_round() -> None:
    # Best against best over all rounds would give 2.0 and 0.5 here.
    ours, fio = "uringmig io_uring 2x8x1M", "fio io_uring 1x16x1M sized"
    qemu = "qemu mapped-ram multifd x2 direct"
    samples = [
        *(sample(ours, seconds, number=n) for n, seconds in enumerate((1.0, 2.0, 4.0))),
        *(sample(fio, seconds, number=n) for n, seconds in enumerate((0.8, 1.6, 8.0))),
        *(sample(qemu, seconds, number=n) for n, seconds in enumerate((3.0, 6.0, 4.0))),
    ]
    row = next(row for row in figures(samples) if row.rival == ours)
    assert row.ceiling_ratio == pytest.approx(0.8)
    assert row.qemu_ratio == pytest.approx(3.0)
    assert row.durable_s == 2.0
    assert row.throughput == pytest.approx(GiB / 2)
    assert row.cpu_per_gib == pytest.approx(1.0)
    assert row.spread == pytest.approx((3.0 - 1.5) / 2 / 2.0)


def test_without_a_ceiling_there_is_no_ratio() -> None:
    [row] = figures([sample("uringmig io_uring 2x8x1M", 1.0)])
    assert row.ceiling_ratio is None
    assert row.qemu_ratio is None
    assert row.spread == 0.0


def test_a_repeated_run_counts_once_and_is_kept() -> None:
    name = "uringmig io_uring 2x8x1M"
    samples = [
        sample(name, 9.0, disturbed=["steal 1.00 s"]),
        sample(name, 1.0, attempt=2),
        sample(name, 3.0, number=2, disturbed=["steal 1.00 s"]),
    ]
    assert [one.durable_s for one in counted(samples)] == [1.0, 3.0]
    [row] = figures(samples)
    assert row.runs == 2
    assert row.disturbed == 2
    assert len(results_of(samples).samples) == 3


def test_files_hold_everything_and_pyperf_reads_its_own(tmp_path: Path) -> None:
    results = whole_results()
    save(results, tmp_path)
    assert load(tmp_path) == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pyperf.json", "samples.json"]
    suite = pyperf.BenchmarkSuite.load(str(tmp_path / "pyperf.json"))
    benchmark = suite.get_benchmark("disk/dense/save uringmig io_uring 2x8x1M")
    assert benchmark.get_values() == pytest.approx((0.6, 1.2, 1.8))
    metadata = benchmark.get_metadata()
    assert metadata["host_device"] == "vda"
    assert metadata["setting_depth"] == 8
    shown = subprocess.run(
        [sys.executable, "-m", "pyperf", "show", str(tmp_path / "pyperf.json")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "disk/dense/save qemu mapped-ram multifd x2 direct" in shown


@pytest.mark.parametrize("content", [None, b"{", b'{"samples": 3}', b"[]"])
def test_a_file_that_is_not_ours_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "samples.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"samples\.json"):
        load(tmp_path)


def write_suite(path: Path, results: Results) -> Path:
    as_suite(results).dump(str(path))
    return path


def test_compare_tells_the_ratio(tmp_path: Path) -> None:
    name = "uringmig io_uring 2x8x1M"
    times = (1.0, 1.01, 0.99, 1.0)
    before = results_of([sample(name, value, number=n) for n, value in enumerate(times)])
    after = results_of([sample(name, 2 * value, number=n) for n, value in enumerate(times)])
    first, second = write_suite(tmp_path / "a", before), write_suite(tmp_path / "b", after)
    assert compare(first, second) == [
        f"disk/dense/save {name}: 1.00 sec +- 0.01 sec -> 2.00 sec +- 0.02 sec: 2.00x slower"
    ]
    assert compare(first, first)[0].endswith("Not significant!")


@pytest.mark.parametrize("key", [*HOST, "host_alignment"])
def test_unequal_machines_are_not_compared(tmp_path: Path, key: str) -> None:
    samples = [sample("uringmig io_uring 2x8x1M", 1.0)]
    first = write_suite(tmp_path / "a", results_of(samples))
    second = write_suite(tmp_path / "b", results_of(samples, **{key: "other"}))
    with pytest.raises(MismatchError, match=rf"{key.removeprefix('host_')} differs.*other"):
        compare(first, second)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"memory_bytes": 2 * GiB}, "memory_bytes"), ({"settings": {"depth": 4}}, "block_size")],
)
def test_unequal_work_is_not_compared(
    tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    name = "uringmig io_uring 2x8x1M"
    first = write_suite(tmp_path / "a", results_of([sample(name, 1.0)]))
    other = msgspec.structs.replace(sample(name, 1.0), **changes)
    second = write_suite(tmp_path / "b", results_of([other]))
    with pytest.raises(MismatchError, match=f"{what} differs"):
        compare(first, second)


def test_compare_refuses_what_is_no_suite_and_what_has_nothing_in_common(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(json.dumps({"a": 1}))
    suite = write_suite(tmp_path / "a", results_of([sample("uringmig io_uring 2x8x1M", 1.0)]))
    other = write_suite(tmp_path / "b", results_of([sample("uringmig null 2x8x1M", 1.0)]))
    with pytest.raises(FormatError, match="text"):
        compare(suite, tmp_path / "text")
    with pytest.raises(MismatchError, match="no benchmark is in both"):
        compare(suite, other)


def test_verdicts_hold_each_target_beside_its_number() -> None:
    found = {verdict.target: verdict for verdict in verdicts(whole_results())}
    ceiling = found["dense: our best at least 0.97 of fio's best of the same round"]
    assert ceiling.measured == "0.97"  # 0.58 by 0.6
    assert not ceiling.met, "0.9667 rounds to the target and still misses it"
    assert found["dense: our best not behind QEMU's best of the same round"].measured == "1.50 x"
    alone = found["dense: one channel alone at least 0.95 of our best"]
    assert (alone.measured, alone.met) == ("0.95", True)  # 0.6 by 0.63
    (cpu,) = [verdict for target, verdict in found.items() if "cpu a GiB, by default" in target]
    assert cpu.measured.startswith("0.67 (0.600 s of uringmig io_uring 2x8x1M by 0.900 s")
    assert found["dense: the manifest adds at most 0.12 cpu s a GiB"].measured.startswith("0.060")
    assert not any("idle" in target for target in found), "there was no idle guest"


def test_processor_time_is_held_beside_the_cheapest_qemu_that_had_nothing_mapped() -> None:
    qemu = "qemu mapped-ram multifd x2 direct"
    fast, cheap = sample(qemu, 1.0, cpu_s=0.9), sample(qemu, 1.5, cpu_s=0.6)
    mapped = sample(qemu, 1.0, cpu_s=0.3)
    cheap = msgspec.structs.replace(cheap, rival="qemu mapped-ram multifd x1 direct")
    mapped = msgspec.structs.replace(
        mapped, rival=f"{qemu} touched", settings={**mapped.settings, "touched": 1}
    )
    ours = sample("uringmig io_uring 2x8x1M", 1.0, cpu_s=0.5)
    other = sample("uringmig io_uring 1x16x1M", 0.9, cpu_s=0.1)
    (verdict,) = [
        verdict
        for verdict in verdicts(results_of([fast, cheap, mapped, ours, other]))
        if "cpu a GiB" in verdict.target
    ]
    assert verdict.measured.startswith("0.83 (0.500 s of uringmig io_uring 2x8x1M by 0.600 s")
    assert verdict.measured.endswith("; 0.300 s if it has it mapped)")
    assert not verdict.met


@pytest.mark.parametrize(("slower", "best"), [(1.01, "1x16x1M"), (1.03, "2x8x1M")])
def test_of_rivals_that_tie_the_cheapest_is_the_best(slower: float, best: str) -> None:
    samples = [
        sample("uringmig io_uring 2x8x1M", 1.0, cpu_s=0.5),
        sample("uringmig io_uring 1x16x1M", slower, cpu_s=0.4),
    ]
    found = best_of(samples, is_ours)
    assert found is not None
    assert found[0] == f"uringmig io_uring {best}"


def test_starting_is_judged_against_an_empty_python() -> None:
    results = results_of([])
    results.starts = [
        Start(what="python: nothing", values=[0.02, 0.03, 0.02]),
        Start(what="uringmig --version", values=[0.05, 0.09, 0.06]),
        Start(what="python: import numpy", values=[0.1]),
        Start(what="python: import uringmig", values=[0.15]),
        Start(what="uringmig save, to its first QMP byte", values=[0.2, 0.14, 0.15]),
    ]
    assert [(verdict.measured, verdict.met) for verdict in verdicts(results)] == [
        ("3.00 (60 by 20 ms)", True),
        ("1.50 (150 by 100 ms)", False),
        ("0.150 s", True),
    ]


def test_a_small_guest_is_judged_by_the_whole_process() -> None:
    process = sample("uringmig io_uring 2x8x1M", 0.5, workload="small")
    process = msgspec.structs.replace(
        process, rival="uringmig save, the process",
        settings={**process.settings, "route": "program", "manifest": 1},
    )  # fmt: skip
    qemu = sample("qemu mapped-ram multifd x2 direct", 0.4, workload="small")
    [verdict] = verdicts(results_of([process, qemu]))
    assert verdict.measured == "0.80 x"
    assert not verdict.met


def test_memory_that_looking_allocated_is_seen() -> None:
    samples = [
        sample("uringmig io_uring 2x8x1M", 1.0, workload="idle", ram_after=GiB + 4096),
        sample("qemu mapped-ram multifd x2 direct", 11.0, workload="idle", ram_after=8 * GiB),
    ]
    found = {verdict.target: verdict for verdict in verdicts(results_of(samples))}
    assert found["idle, fresh: at least 10 x QEMU's best"].met
    holes = found["idle: none of the guest's holes allocated on the host"]
    assert (holes.measured, holes.met) == ("4.0 KiB; QEMU 7.0 GiB", False)


def test_a_guest_of_zeros_has_no_picture_of_its_throughput() -> None:
    one = sample("uringmig io_uring 2x8x1M", 1.0, workload="zero", nonzero_bytes=0)
    titles = [plot.title for plot in plots(results_of([one]))]
    assert titles == ["zero on disk: time to save", "zero on disk: where the time goes"]


def test_report_is_one_page_with_all_pictures(tmp_path: Path) -> None:
    results = whole_results()
    titles = [plot.title for plot in plots(results)]
    assert titles == [
        "dense on disk: time to save",
        "dense on disk: throughput by channels",
        "dense on disk: where the time goes",
        "dense on disk: throughput over time",
        "grid on disk: throughput by depth and block size",
    ]
    assert all(plot.png.startswith(b"\x89PNG") for plot in plots(results))
    markdown, page = write_report(results, tmp_path)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(titles)
    assert not re.search(r'(src|href)="(?!data:)', text), "it refers to nothing outside"
    for rival in GROUPS:
        assert f"| {rival} | 3 |" in markdown.read_text()
    assert "| 0.93 |" not in results_table(results)
    table = results_table(results)
    # The manifest is on by default, so what a user gets is that rival, not the fastest one.
    assert (
        "| save: dense 1.0 GiB, disk | 1.32 s (1.4 x) | 1.20 s (0.89 GB/s; io_uring 2x8x1M) |"
        in (table)
    )


def test_the_page_opens_with_the_verdict_and_the_machine_below_it(tmp_path: Path) -> None:
    """Who opens the page reads first what was met; long words wrap instead of leaving the page."""
    _, page = write_report(whole_results(), tmp_path)
    text = page.read_text()
    order = ["dense: our best at least 0.97", "Machine and run", "host_", "Pictures", "durable: to"]
    places = [text.find(words) for words in order]
    assert places[2] == -1, "conditions go by their names, not by pyperf's"
    assert [place for place in places if place >= 0] == sorted(places)[1:]
    assert '<table class="words"><tr><th>target</th>' in text
    assert ".words td, .words th { text-align: left; white-space: normal;" in text
    assert "<td>device</td><td>vda</td>" in text
