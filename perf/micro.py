"""What the micro benches share: pyperf's Runner, the setting in the results, plain figures.

Run them from the root of the tree, as ``python -m perf.bench_scan`` with pyperf's own options
(``--fast``, ``-o FILE``, ``--help``); results of two runs are compared by ``python -m pyperf
compare_to``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyperf

#: Runs so many loops and returns the seconds they took.
TimeFunction = Callable[[int], float]


class Micro:
    """One bench file: one question, one setting.

    Args:
        module: its name, by which workers are started.
        question: in words.
        setting: whatever the answer depends on; goes into the metadata of every result.
    """

    def __init__(self, module: str, question: str, **setting: str | int) -> None:
        self._runner = pyperf.Runner(
            # Workers are started as modules, so that they find the tree as their parent did.
            program_args=("-m", module),
            metadata={f"uringmig_{name}": value for name, value in setting.items()},
        )
        self._is_worker: bool = self._runner.parse_args().worker
        if not self._is_worker:
            print(question)
            print("setting: " + ", ".join(f"{name} {value}" for name, value in setting.items()))

    def rate(self, name: str, function: TimeFunction, *, loop_bytes: int) -> None:
        """Time ``function``, and say how many bytes a second that is."""
        seconds = self._mean(name, function)
        if seconds is not None:
            print(f"  = {loop_bytes / seconds / 1e9:.2f} GB/s")

    def cost(self, name: str, function: TimeFunction, *, operations: int, of: str) -> None:
        """Time ``function``, and say what one of its ``operations`` a loop costs."""
        seconds = self._mean(name, function)
        if seconds is not None:
            print(f"  = {seconds / operations * 1e6:.3f} us for each {of}")

    def _mean(self, name: str, function: TimeFunction) -> float | None:
        """Seconds of one loop; None in a worker process, since its parent prints the result."""
        result: Any = self._runner.bench_time_func(name, function)
        if result is None or self._is_worker:
            return None
        return float(result.mean())
