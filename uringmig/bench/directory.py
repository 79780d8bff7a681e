"""The story of ``uringmig bench``: warm up, settings, ways of making the file, cost of a request.

Every part has its share of the time and ends with it, on a slow disk too: what a trial may write is
settled by the warm-up, and a trial that takes much longer than planned is cut short.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from uringmig.bench.profile import ProfileSettings
from uringmig.bench.race import Race, Rate
from uringmig.bench.trial import MEMORY_BYTES, Preparation, Trial, TrialOutcome, Workbench
from uringmig.errors import StateError, StorageError
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, DirectMode, EngineName, WriteOptions
from uringmig.storage.devices import Place, place_of
from uringmig.storage.enginechoice import choose_engine
from uringmig.units import KiB, MiB, align_down, format_size

_CHANNELS: Final = (1, 2, 4)
_DEPTHS: Final = (4, 8, 16)
_BLOCK_SIZES: Final = (512 * KiB, MiB, 4 * MiB)
#: Big blocks, many in flight, no digests: the fastest that can be had here.
_CEILING: Final = Trial(WriteOptions(channels=2, depth=16, block_size=4 * MiB, manifest=False))
#: Shares of the time: settings, ways of making the file, cost of a request.
_SHARES: Final = (0.55, 0.27, 0.13)
#: Trials that a whole race takes: 28 candidates, then half of them, down to a few, ten rounds.
_TRIALS_OF_RACE: Final = 110
#: Single pages are written to so much of a file: two thousand requests are long against the clock.
_STRETCH_BYTES: Final = 16 * MiB
#: A trial this many times longer than planned is cut short.
_PATIENCE: Final = 3.0
#: Differences of less are noise, however calm the disk was.
_NOISE_MIN: Final = 0.02
#: Two medians differ by more than noise if they differ by two standard errors. The interquartile
#: range times 0.74 is a standard deviation. That times 1.25, over the root of the number of rounds,
#: is a median's standard error. A difference of two has the root of 2 times as much.
_NOISE_FACTOR: Final = 2 * 2**0.5 * 1.25 * 0.74
#: What is bridged is written and takes room on the disk: beyond this it is not worth the time.
_BRIDGE_MAX: Final = 128 * KiB
#: A trial writes at least so much; and a directory must have room for one and some metadata.
SIZE_MIN: Final = 2 * WINDOW_BYTES
SECONDS_RANGE: Final = (1.0, 600.0)
_ROOM: Final = 16 * MiB


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting and how fast it was; sizes in bytes."""

    channels: int
    depth: int
    block_size: int
    rate: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What a directory can do; bytes, bytes a second until durable, seconds.

    Attributes:
        folder: that was measured.
        place: its device and file system.
        engine: that really ran.
        direct: whether O_DIRECT was on.
        file_bytes: written in one trial.
        seed: of data and order.
        seconds: all of it took.
        ceiling: big blocks, deep queues, no digests.
        best: the fastest setting of a save.
        default: the setting without a profile.
        chosen: what the profile will say, see `choose`.
        noise: differences up to this share do not count.
        tried: settings that took part.
        finalists: settings that were left at the end, fastest first.
        sized: chosen setting, the file's length set first.
        extending: the same, the writes make it longer.
        fallocated: the same, its blocks allocated first; None where that is not possible.
        buffered: the same through the page cache; None where there is no O_DIRECT to compare.
        request_seconds: what one more request of one page costs, beside its bytes.
        bridge_pages: gaps of up to so many pages are worth writing through.
        settings: for the profile.
        notes: what the operator should know, one line each.
    """

    folder: str
    place: Place
    engine: str
    direct: bool
    file_bytes: int
    seed: int
    seconds: float
    ceiling: Rate
    best: Setting
    default: Setting
    chosen: Setting
    noise: float
    tried: int
    finalists: tuple[Setting, ...]
    sized: Rate
    extending: Rate
    fallocated: Rate | None
    buffered: Rate | None
    request_seconds: float
    bridge_pages: int
    settings: ProfileSettings
    notes: tuple[str, ...]


def bench_directory(
    folder: str | os.PathLike[str],
    *,
    size: int = 512 * MiB,
    seconds: float = 25.0,
    engine: EngineName = "auto",
    direct: DirectMode = "preferred",
    seed: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Measure what a save can expect of a directory; leaves nothing there, whatever happens.

    Args:
        folder: the directory.
        size: largest file, in bytes; there must be room for it.
        seconds: about how long it may take.
        engine: as of a save.
        direct: as of a save.
        seed: of data and order; None draws one.
        tell: called with what is being measured, a few words.

    Raises:
        StateError: ``size`` or ``seconds`` out of range.
        StorageError: too little room, or the disk refuses.
        HostError: io_uring is required and cannot be had.
    """
    least, most = SECONDS_RANGE
    if not least <= seconds <= most:
        raise StateError(f"seconds must be from {least:g} to {most:g}, not {seconds:g}")
    if size < SIZE_MIN:
        raise StateError(f"size must be at least {format_size(SIZE_MIN)}, not {format_size(size)}")
    path = os.fspath(folder)
    place = place_of(path)
    _check_room(path, size)
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    return _Measuring(path, place, size, seconds, engine, direct, seed, tell).report()


def _check_room(folder: str, size: int) -> None:
    """Refuse a folder that could not hold one file."""
    status = os.statvfs(folder)
    if status.f_blocks == 0:  # it does not count, as ramfs
        return
    free = status.f_bavail * status.f_frsize
    if free < size + _ROOM:
        raise StorageError(
            f"too little room: {format_size(free)} are free and "
            f"{format_size(size + _ROOM)} are needed",
            path=folder,
            cure="give a smaller --size",
        )


class _Measuring:
    """One run over one directory."""

    def __init__(
        self,
        folder: str,
        place: Place,
        size: int,
        seconds: float,
        engine: EngineName,
        direct: DirectMode,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self._started = time.monotonic()
        self._folder, self._place, self._size, self._seconds = folder, place, size, seconds
        self._asked_engine = engine
        self._engine = choose_engine(engine)
        self._default = WriteOptions(engine=engine, direct=direct)
        self._order = random.Random(seed)
        self._seed = seed
        self._tell = tell
        self._bench = Workbench(folder, self._engine, seed=seed)
        self._length = min(size, MEMORY_BYTES)
        self._trial_seconds = seconds * _SHARES[0] / _TRIALS_OF_RACE
        self._ends = [
            self._started + seconds * sum(_SHARES[: part + 1]) for part in range(len(_SHARES))
        ]

    def report(self) -> BenchReport:
        """Measure everything, and say it."""
        self._tell("warming up")
        first = self._warm_up()
        self._tell("channels x depth x block size")
        rates = self._race_settings()
        ceiling = rates.pop(self._ceiling())
        options = {trial.options: rate for trial, rate in rates.items()}
        best = max(options, key=lambda one: options[one].median)
        noise = noise_between(options[best], options[self._default])
        chosen = choose(options, self._default, noise=noise)
        self._tell("ways of making the file")
        ways, buffered = self._race_preparations(chosen, direct=first.direct)
        self._tell("cost of a request")
        request_seconds = self._cost_of_request(chosen, rate=ways["sized"].median)
        bridge_pages = pages_worth_bridging(request_seconds, ways["sized"].median)
        return BenchReport(
            folder=self._folder,
            place=self._place,
            engine=self._engine.name,
            direct=first.direct,
            file_bytes=self._length,
            seed=self._seed,
            seconds=time.monotonic() - self._started,
            ceiling=ceiling,
            best=_setting(best, options),
            default=_setting(self._default, options),
            chosen=_setting(chosen, options),
            noise=noise,
            tried=len(self._grid()),
            finalists=tuple(
                _setting(one, options)
                for one in sorted(options, key=lambda one: -options[one].median)
            ),
            sized=ways["sized"],
            extending=ways["extending"],
            fallocated=ways.get("fallocated"),
            buffered=buffered,
            request_seconds=request_seconds,
            bridge_pages=bridge_pages,
            settings=ProfileSettings(
                channels=chosen.channels,
                depth=chosen.depth,
                block_size=chosen.block_size,
                bridge=(bridge_pages + 1) * PAGE_SIZE if bridge_pages else 0,
                engine=self._asked_engine,
                # Where O_DIRECT works it stays, also where the page cache is faster: what a save
                # pushes out of the cache, others miss, and no trial here sees that.
                direct="preferred" if first.direct else "off",
            ),
            notes=tuple(note for note in (self._engine.note, first.note) if note is not None),
        )

    def _try(self, trial: Trial, length_bytes: int) -> TrialOutcome:
        """Run one trial."""
        return self._bench.run(
            trial, length_bytes=length_bytes, seconds_max=_PATIENCE * self._trial_seconds
        )

    def _rate(self, trial: Trial) -> float:
        return self._try(trial, self._length).rate

    def _warm_up(self) -> TrialOutcome:
        """Run the ceiling's trial unmeasured, and settle how much a trial writes."""
        trial = self._ceiling()
        self._try(trial, self._length)
        outcome = self._try(trial, self._length)
        length = align_down(int(outcome.rate * self._trial_seconds), WINDOW_BYTES)
        self._length = min(self._size, max(SIZE_MIN, length))
        return outcome

    def _ceiling(self) -> Trial:
        """The ceiling's trial, with the engine and O_DIRECT as asked."""
        options = replace(
            _CEILING.options, engine=self._default.engine, direct=self._default.direct
        )
        return replace(_CEILING, options=options)

    def _grid(self) -> list[WriteOptions]:
        """The settings to try, the default among them."""
        # pwrite does one request at a time, so a depth would change nothing.
        depths = _DEPTHS if self._engine.name == "io_uring" else (self._default.depth,)
        return [
            replace(self._default, channels=channels, depth=depth, block_size=block_size)
            for channels in _CHANNELS
            for depth in depths
            for block_size in _BLOCK_SIZES
        ]

    def _race(self) -> Race[Trial]:
        return Race(self._rate, clock=time.monotonic, order=self._order)

    def _race_settings(self) -> dict[Trial, Rate]:
        """Race the settings; ceiling and default stay to the end."""
        kept = [self._ceiling(), Trial(self._default)]
        others = [Trial(options) for options in self._grid() if options != self._default]
        return self._race().run([*kept, *others], until=self._ends[0], kept=kept)

    def _race_preparations(
        self, options: WriteOptions, *, direct: bool
    ) -> tuple[dict[Preparation, Rate], Rate | None]:
        """Race the ways of making the file, and the page cache where O_DIRECT is there too."""
        ways: list[Preparation] = ["sized", "extending"]
        if self._bench.can_allocate():
            ways.append("fallocated")
        trials = {way: Trial(options, preparation=way) for way in ways}
        cached = Trial(replace(options, direct="off"))
        everything = [*trials.values(), *([cached] if direct else [])]
        rates = self._race().run(everything, until=self._ends[1], kept=everything, eliminate=False)
        return (
            {way: rates[trial] for way, trial in trials.items()},
            rates[cached] if direct else None,
        )

    def _cost_of_request(self, options: WriteOptions, *, rate: float) -> float:
        """Seconds that one more request of a page costs, beside those of its bytes.

        A stretch of the file is written whole, and every other page of it by itself. The second
        way takes a request more for each two pages, and writes a page less; what both ways have in
        common, such as starting threads, cancels out.
        """
        single = Trial(replace(options, bridge=0, manifest=False), every_other=True)
        whole = Trial(replace(options, manifest=False))
        length = min(self._length, _STRETCH_BYTES)

        def stretch_rate(trial: Trial) -> float:
            return self._try(trial, length).rate * (2 if trial.every_other else 1)

        race = Race(stretch_rate, clock=time.monotonic, order=self._order)
        both = [single, whole]
        rates = race.run(both, until=self._ends[2], kept=both, eliminate=False)
        more = 2 * PAGE_SIZE / rates[single].median - 2 * PAGE_SIZE / rates[whole].median
        return max(0.0, more + PAGE_SIZE / rate)


def noise_between(first: Rate, second: Rate) -> float:
    """Share by which two medians may differ and mean nothing; 1.0 if there was but one round."""
    if min(first.rounds, second.rounds) == 1:
        return 1.0
    error = max(rate.spread / math.sqrt(rate.rounds) for rate in (first, second))
    return max(_NOISE_MIN, _NOISE_FACTOR * error)


def choose(rates: dict[WriteOptions, Rate], default: WriteOptions, *, noise: float) -> WriteOptions:
    """Choose the setting for the profile.

    The default, if it is as fast as the fastest within noise: it is known to serve guests of other
    kinds than the dense one measured here. Otherwise the cheapest setting that is as fast: fewest
    threads, then fewest bytes in flight. Settings with fewer channels or a lower depth than the
    default are taken last: channels also search for zero pages, and writes of single pages need
    the depth; dense memory shows neither.
    """
    limit = (1 - noise) * max(rate.median for rate in rates.values())
    good = [one for one, rate in rates.items() if rate.median >= limit]
    if default in good:
        return default
    return min(
        good,
        key=lambda one: (
            one.channels < default.channels or one.depth < default.depth,
            one.channels,
            one.depth * one.block_size,
            -one.block_size,
        ),
    )


def pages_worth_bridging(request_seconds: float, rate: float) -> int:
    """Pages of zeros that can be written in the time of one more request, within bounds.

    Args:
        request_seconds: cost of one more request.
        rate: bytes a second of big requests.
    """
    return min(int(request_seconds * rate), _BRIDGE_MAX) // PAGE_SIZE


def _setting(options: WriteOptions, rates: dict[WriteOptions, Rate]) -> Setting:
    """A setting with its rate, for the report."""
    return Setting(options.channels, options.depth, options.block_size, rates[options])
