"""The bench's arithmetic: rounds on a made-up clock and disk, medians, what is chosen and why."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.bench.directory import choose, noise_between, pages_worth_bridging
from uringmig.bench.race import Race, Rate
from uringmig.options import WriteOptions

DEFAULT = WriteOptions()


class Disk:
    """Candidates of known speed (letters), and a clock that runs only while one is measured."""

    def __init__(self, rates: dict[str, float], *, noise: float = 0.0) -> None:
        self.now = 0.0
        self.runs: list[str] = []
        self._rates = rates
        self._noise = noise
        self._random = random.Random(1)

    def measure(self, name: str) -> float:
        self.now += 1.0
        self.runs.append(name)
        return self._rates[name] * (1 + self._noise * self._random.uniform(-1, 1))

    def race(self, seed: int = 0) -> Race[str]:
        return Race(self.measure, clock=lambda: self.now, order=random.Random(seed))


@given(st.lists(st.floats(1.0, 1e12), min_size=2, max_size=30))
def test_rate_is_median_and_quartiles(samples: list[float]) -> None:
    rate = Rate.of(samples)
    low, middle, high = np.percentile(samples, [25, 50, 75])
    assert rate.median == pytest.approx(middle)
    assert rate.spread == pytest.approx((high - low) / middle)
    assert rate.rounds == len(samples)


def test_one_sample_has_no_spread() -> None:
    assert Rate.of([5.0]) == Rate(5.0, 0.0, 1)


def test_nothing_runs_twice_before_all_have_run_once() -> None:
    disk = Disk(dict.fromkeys("abcd", 100.0))
    rates = disk.race().run("abcd", until=12.0, eliminate=False)
    assert [rate.rounds for rate in rates.values()] == [3, 3, 3, 3]
    rounds = [disk.runs[at : at + 4] for at in range(0, 12, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1, "the order is the same in each round"


def test_a_round_cut_short_does_not_count() -> None:
    disk = Disk(dict.fromkeys("abcd", 100.0))
    rates = disk.race().run("abcd", until=10.5, eliminate=False)
    assert len(disk.runs) == 11
    assert {rate.rounds for rate in rates.values()} == {2}


def test_time_ends_the_first_round_but_for_those_kept() -> None:
    disk = Disk(dict.fromkeys("abcdefgh", 100.0))
    rates = disk.race().run("abcdefgh", until=3.0, kept="gh")
    assert {"g", "h"} < set(rates)
    assert len(rates) == 3
    disk = Disk(dict.fromkeys("abcdefgh", 100.0))
    assert set(disk.race().run("abcdefgh", until=0.0, kept="gh")) == {"g", "h"}


def test_the_slow_are_given_up_early_and_the_kept_never() -> None:
    disk = Disk({name: 100.0 - place for place, name in enumerate("abcdefghijklmnop")} | {"z": 1.0})
    rates = disk.race().run("abcdefghijklmnopz", until=100.0, kept="z")
    counts = Counter(disk.runs)
    assert max(rates, key=lambda name: rates[name].median) == "a"
    assert counts["p"] == 1
    assert counts["z"] == counts["a"] == rates["z"].rounds
    assert set(rates) == {*"abcd", "z"}


def test_the_hopeless_go_even_if_few() -> None:
    disk = Disk({"a": 100.0, "b": 80.0})
    assert set(disk.race().run("ab", until=20.0)) == {"a"}
    assert disk.runs.count("b") == 1


@given(st.integers(0, 1000))
def test_a_noisy_leader_is_found(seed: int) -> None:
    disk = Disk(dict.fromkeys("bcdefgh", 100.0) | {"a": 130.0}, noise=0.1)
    rates = disk.race(seed).run("abcdefgh", until=100.0)
    assert max(rates, key=lambda name: rates[name].median) == "a"


def options(channels: int, depth: int, block_mib: int) -> WriteOptions:
    return WriteOptions(channels=channels, depth=depth, block_size=block_mib << 20)


def rates_of(figures: dict[WriteOptions, float]) -> dict[WriteOptions, Rate]:
    return {one: Rate(figure, 0.01, 5) for one, figure in figures.items()}


def test_the_default_stays_if_no_worse_than_noise() -> None:
    rates = rates_of({DEFAULT: 96.0, options(4, 16, 4): 100.0, options(2, 16, 1): 99.0})
    assert choose(rates, DEFAULT, noise=0.05) == DEFAULT
    assert choose(rates, DEFAULT, noise=0.02) == options(2, 16, 1)


def test_the_cheapest_within_noise_is_chosen() -> None:
    rates = rates_of(
        {DEFAULT: 50.0, options(4, 8, 1): 100.0, options(2, 16, 4): 99.0, options(2, 8, 4): 98.5}
    )
    assert choose(rates, DEFAULT, noise=0.03) == options(2, 8, 4)
    assert choose(rates, DEFAULT, noise=0.005) == options(4, 8, 1)


def test_less_than_the_default_comes_last() -> None:
    """One channel may do for dense memory, and would search for zero pages half as fast."""
    rates = rates_of({DEFAULT: 50.0, options(1, 8, 4): 100.0, options(2, 4, 4): 100.0})
    assert choose(rates, DEFAULT, noise=0.02) == options(1, 8, 4)
    rates |= rates_of({options(4, 16, 4): 99.0})
    assert choose(rates, DEFAULT, noise=0.02) == options(4, 16, 4)


def test_noise_is_two_errors_of_the_difference() -> None:
    """Twenty thousand races of two equals: about one in twenty seems to be decided."""
    source = np.random.default_rng(1)
    for rounds in (9, 15):
        samples = source.normal(100.0, 5.0, (20_000, 2, rounds))
        first, third = np.percentile(samples, [25, 75], axis=2)
        middle = np.median(samples, axis=2)
        spreads = (third - first) / middle
        decided = [
            abs(one - other) / max(one, other)
            > noise_between(Rate(one, a, rounds), Rate(other, b, rounds))
            for (one, other), (a, b) in zip(middle.tolist(), spreads.tolist(), strict=True)
        ]
        assert 0.01 < sum(decided) / len(decided) < 0.1
    assert noise_between(Rate(1.0, 0.0, 5), Rate(1.0, 0.0, 5)) == 0.02
    assert noise_between(Rate(1.0, 0.0, 1), Rate(1.0, 0.0, 1)) == 1.0


@pytest.mark.parametrize(
    ("request_us", "rate", "pages"),
    [
        (0.0, 1e9, 0),
        (4.0, 1e9, 0),
        (4.1, 1e9, 1),
        (13.0, 1e9, 3),
        (1e6, 1e9, 32),
        (100.0, 0.1e9, 2),
    ],
)
def test_pages_worth_bridging(request_us: float, rate: float, pages: int) -> None:
    """At 1 GB/s a page takes 4.096 us; what is written in vain is bounded by 128 KiB."""
    assert pages_worth_bridging(request_us / 1e6, rate) == pages
