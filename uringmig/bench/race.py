"""Candidates measured against each other: interleaved, shuffled, the slow ones given up early.

A disk drifts by more than candidates differ. So nothing is ever measured twice in a row: a round
measures every candidate once, in a new order, and only medians over the same rounds are compared.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

#: A candidate whose best round stays so far below the leader's median is not measured again.
_HOPELESS: Final = 0.9
#: After each round the slower half is given up, but so many of the best always stay: enough to see
#: which differences are noise.
_KEPT: Final = 4
#: More rounds tell no more than the disk's drift.
_ROUNDS_MAX: Final = 15

Candidate = TypeVar("Candidate", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes a second over some rounds: the median, and the interquartile range as a share of it.

    One round has no spread: it is 0.0 then.
    """

    median: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Rate:
        """Summarise samples, one at least."""
        median = statistics.median(samples)
        if len(samples) == 1:
            return cls(median, 0.0, 1)
        first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (third - first) / median, len(samples))


class Race(Generic[Candidate]):
    """Rounds of measurements.

    Args:
        measure: runs a candidate once, and returns bytes a second.
        clock: seconds.
        order: shuffles; seeded by whoever wants to repeat it.
    """

    def __init__(
        self,
        measure: Callable[[Candidate], float],
        *,
        clock: Callable[[], float],
        order: random.Random,
    ) -> None:
        self._measure = measure
        self._clock = clock
        self._order = order

    def run(
        self,
        candidates: Sequence[Candidate],
        *,
        until: float,
        kept: Collection[Candidate] = (),
        eliminate: bool = True,
    ) -> dict[Candidate, Rate]:
        """Measure until ``until`` by the clock; the first one always measures all of ``kept``.

        Args:
            candidates: to be measured.
            until: no measurement begins after this time.
            kept: candidates that are never given up.
            eliminate: whether the others may be given up.

        Returns:
            The rates of those that are left, over the same rounds; a round that time cut short does
            not count, unless it was the first.
        """
        rounds: list[dict[Candidate, float]] = []
        running = list(candidates)
        while running and len(rounds) < _ROUNDS_MAX:
            self._order.shuffle(running)
            running.sort(key=lambda one: one not in kept)  # stable: those kept go first
            figures: dict[Candidate, float] = {}
            for one in running:
                if self._clock() >= until and (rounds or one not in kept):
                    break
                figures[one] = self._measure(one)
            if len(figures) < len(running) and rounds:
                break
            rounds.append(figures)
            if eliminate:
                running = _survivors(rounds, kept)
        return {one: Rate.of([figures[one] for figures in rounds]) for one in rounds[-1]}


def _survivors(
    rounds: Sequence[dict[Candidate, float]], kept: Collection[Candidate]
) -> list[Candidate]:
    """Give up the slower half, and whoever was slow in every round."""
    samples = {one: [figures[one] for figures in rounds] for one in rounds[-1]}
    ranked = sorted(samples, key=lambda one: -statistics.median(samples[one]))
    best = statistics.median(samples[ranked[0]])
    limit = max(_KEPT, len(ranked) // 2)
    return [
        one
        for place, one in enumerate(ranked)
        if one in kept or (place < limit and max(samples[one]) >= _HOPELESS * best)
    ]
