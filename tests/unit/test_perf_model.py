"""The cost model, fitted to runs that were computed from constants known here."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from test_perf_results import results_of, sample

from perf.__main__ import app
from perf.model import describe, fit, points
from perf.results import Results, Sample, save
from uringmig.errors import StateError
from uringmig.units import GiB, KiB, MiB

DEVICE = 2e9
LATENCY = 200e-6
SINGLE = 1e9
MAP = 0.1 / GiB
UNMAP = 0.03 / GiB
ZERO = 0.25 / GiB
MOVE = 0.05 / GiB
REQUEST = 20e-6
REQUEST_CHANNEL = 5e-6
FIXED = 0.02

OURS = "uringmig io_uring 1x16x1M"


def saved(
    workload: str, *, channels: int, depth: int, block: int, moved: int, requests: int,
    null: bool = False, zeros: int = 0, bridge: int = 16 * KiB,
) -> Sample:  # fmt: skip
    """A run of a machine that obeys the formula of MODEL.md to the letter."""
    scan = MAP * (GiB - zeros) + ZERO * zeros
    work = scan + (0 if null else MOVE * moved + REQUEST * requests)
    size = moved / requests if requests else block
    in_flight = min(channels * depth * block / size, 256 * channels)
    rate = in_flight * size / (LATENCY + size / SINGLE)
    device = 0.0 if null else math.hypot(moved / DEVICE, moved / rate)
    channel_cpu = scan + (0 if null else REQUEST_CHANNEL * requests)
    seconds = FIXED + max(device, channel_cpu / channels, work / 2)
    base = sample("uringmig null 2x8x1M" if null else OURS, seconds)
    busy = (seconds - FIXED) * channels
    return msgspec.structs.replace(
        base,
        workload=workload,
        rival=f"{workload} {channels}x{depth}x{block} {bridge} {null}",
        settings={
            **base.settings, "channels": channels, "depth": depth, "block_size": block,
            "engine": "null" if null else "io_uring", "bridge": bridge,
        },
        moved_bytes=moved,
        requests=requests,
        nonzero_bytes=GiB - zeros,
        cpu_s=work + UNMAP * GiB,
        user_s=work / 4,
        completed_s=seconds - FIXED,
        account={
            "elapsed": seconds, "scan": busy / 2, "digest": 0.0, "submit": 0.0, "wait": busy / 2,
            "channel_cpu": channel_cpu, "sync": FIXED / 2, "publish": FIXED / 2,
        },
    )  # fmt: skip


def obedient() -> Results:
    fio = sample("fio io_uring 1x16x1M sized", GiB / DEVICE)
    samples = [fio]
    samples += [
        saved("dense", channels=n, depth=16 // n, block=MiB, moved=GiB, requests=1024, null=null)
        for n in (1, 2) for null in (True, False)
    ]  # fmt: skip
    samples += [
        saved("grid", channels=1, depth=depth, block=block, moved=GiB, requests=GiB // block)
        for depth in (1, 4, 16) for block in (256 * KiB, MiB, 4 * MiB)
    ]  # fmt: skip
    samples += [
        saved("zero", channels=n, depth=16 // n, block=MiB, moved=0, requests=0, zeros=GiB)
        for n in (1, 2)
    ]
    half = GiB // 2
    samples += [
        saved("fragmented", channels=1, depth=16, block=MiB, moved=moved, requests=requests,
              zeros=half, bridge=bridge)
        for moved, requests, bridge in ((GiB, 1024, 16 * KiB), (half, half // 4096, 0))
    ]  # fmt: skip
    return results_of(samples)


def test_the_fit_finds_the_constants() -> None:
    found = fit(obedient())
    assert found.device == pytest.approx(DEVICE)
    assert found.request_s == pytest.approx(LATENCY)
    assert found.single == pytest.approx(SINGLE)
    assert found.map_s == pytest.approx(MAP)
    assert found.unmap_s == pytest.approx(UNMAP)
    assert found.zero_s == pytest.approx(ZERO)
    # The few requests of the largest blocks are in it.
    assert found.move_s == pytest.approx(MOVE + REQUEST / (4 * MiB))
    assert found.request_channel_s == pytest.approx(REQUEST_CHANNEL, rel=0.01)
    assert found.request_cpu_s == pytest.approx(REQUEST, rel=0.01)
    assert found.fixed_s == pytest.approx(FIXED)
    assert found.python_s == pytest.approx((MAP + MOVE + 1024 * REQUEST / GiB) / 4)


def test_an_obedient_machine_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    results = obedient()
    found = {point.name: point for point in points(results, fit(results))}
    assert {point.limit for point in found.values()} == {"device", "channels", "processors"}
    assert sum(not point.fitted for point in found.values()) >= 8
    for point in found.values():
        assert point.error == pytest.approx(0.0, abs=0.01), point


def test_a_machine_that_disobeys_is_told_with_the_error() -> None:
    results = obedient()
    for one in results.samples:
        if one.rival == f"grid 1x4x{MiB} {16 * KiB} False":
            one.durable_s *= 2
    text = describe(results)
    assert "largest 50 %" in text
    assert f"| grid: grid 1x4x{MiB} {16 * KiB} False | " in text
    assert "| -50 % | device |" in text
    assert "an array, 25.0 GB/s" in text


def test_without_its_measurements_there_is_no_model() -> None:
    results = obedient()
    results.samples = [one for one in results.samples if one.workload != "zero"]
    with pytest.raises(StateError, match="one channel of io_uring over zero"):
        fit(results)


def test_the_document_keeps_its_words(tmp_path: Path) -> None:
    save(obedient(), tmp_path)
    document = tmp_path / "MODEL.md"
    document.write_text("# Words\n\n## Measured\nold figures\n")
    done = CliRunner().invoke(app, ["model", str(tmp_path), "--into", str(document)])
    assert done.exit_code == 0, done.output
    text = document.read_text()
    assert text.startswith("# Words\n\n## Measured\nMeasured 2026-01-02")
    assert "old figures" not in text
