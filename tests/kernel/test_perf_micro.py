"""The micro benches run, once each, and say under which setting.  No figure is judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyperf
import pytest

ROOT = Path(__file__).parents[2]
BENCHES = sorted(path.stem for path in (ROOT / "perf").glob("bench_*.py"))


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"perf.{name}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_are_found() -> None:
    assert BENCHES == [
        "bench_digest",
        "bench_plan",
        "bench_progress",
        "bench_ring",
        "bench_scan",
        "bench_startup",
    ]


@pytest.mark.parametrize("name", BENCHES)
def test_bench_runs_and_its_results_carry_the_setting(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lines = run(name, "--debug-single-value", "-o", out).splitlines()
    assert lines[0].endswith("?")
    [setting] = [line for line in lines if line.startswith("setting: ")]
    figures = [line for line in lines if line.startswith("  = ")]
    assert all(float(line.split()[1]) > 0 for line in figures)
    suite = pyperf.BenchmarkSuite.load(str(out))
    assert len(suite) == len(figures) >= 4
    for bench in suite.get_benchmarks():
        kept = {
            key.removeprefix("uringmig_"): value
            for key, value in bench.get_metadata().items()
            if key.startswith("uringmig_")
        }
        assert kept
        assert all(f"{key} {value}" in setting for key, value in kept.items())
