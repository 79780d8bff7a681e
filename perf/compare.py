"""Two results side by side, by pyperf's own significance; refused where they cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pyperf

# What ``python -m pyperf compare_to`` is made of; pyperf gives it no public name.
from pyperf._compare import CompareData, CompareResult

from perf.host import check_same_host
from uringmig.errors import FormatError, MismatchError

_SETTING: Final = "setting_"


def compare(first: Path, second: Path) -> list[str]:
    """Compare benchmark by benchmark; one line each.

    Args:
        first: ``pyperf.json`` of the reference.
        second: of what is compared with it.

    Raises:
        FormatError: a file is not pyperf's.
        MismatchError: machine, disk, settings or guests differ, or no benchmark is in both.
    """
    before, after = _benchmarks(first), _benchmarks(second)
    common = [name for name in before if name in after]
    if not common:
        raise MismatchError(f"no benchmark is in both {first} and {second}")
    for name in common:
        old, new = before[name].get_metadata(), after[name].get_metadata()
        check_same_host(old, new)
        _check_same_settings(name, old, new)
    lines = []
    for name in common:
        result = CompareResult(CompareData("A", before[name]), CompareData("B", after[name]))
        lines.append(f"{name}: {result.oneliner(verbose=False)}")
    lines += [f"{name}: only in {first}" for name in before if name not in after]
    lines += [f"{name}: only in {second}" for name in after if name not in before]
    return lines


def _benchmarks(path: Path) -> dict[str, pyperf.Benchmark]:
    """The benchmarks of a file by name."""
    try:
        suite = pyperf.BenchmarkSuite.load(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not a suite of pyperf's: {error}") from None
    return {benchmark.get_name(): benchmark for benchmark in suite.get_benchmarks()}


def _check_same_settings(name: str, old: Mapping[str, object], new: Mapping[str, object]) -> None:
    for key in sorted(set(old) | set(new)):
        if key.startswith(_SETTING) and old.get(key) != new.get(key):
            raise MismatchError(
                f"{name} cannot be compared: {key.removeprefix(_SETTING)} differs",
                expected=old.get(key),
                found=new.get(key),
            )
