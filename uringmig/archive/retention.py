"""Which entries to keep: the newest ones, and the newest of each day, week and month.  Pure.

Rules hold for each virtual machine by itself, and each rule for itself: what one keeps does not use
up another's number. Days, weeks (ISO) and months are those of UTC.

Whatever the rules say, these stay:

- the newest good entry of a machine, when no other good one would be left (good: verified whole);
- the newest one not known to be damaged, when only damaged ones would be left;
- the newest one, when none would be left (rather a damaged one than one that is missing);
- entries that claim to be made in the future: a clock was wrong, and they must not push others out.

A damaged or missing entry never uses up a place that a sound one could have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from uringmig.archive.entry import Entry
from uringmig.errors import StateError


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one entry.

    Attributes:
        entry: the entry.
        reasons: why it is kept, one phrase each; empty is: it goes.
    """

    entry: Entry
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)


def plan_prune(
    entries: Iterable[Entry],
    *,
    keep_last: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    now: datetime,
) -> list[Decision]:
    """Decide over all entries, oldest first.

    Args:
        entries: of any machines, in any order.
        keep_last: so many of the newest.
        keep_daily: the newest of each of so many days that have any.
        keep_weekly: likewise of weeks.
        keep_monthly: likewise of months.
        now: with its time zone.

    Raises:
        StateError: a number is negative, or none is positive.
    """
    counts = (keep_last, keep_daily, keep_weekly, keep_monthly)
    if min(counts) < 0 or max(counts) == 0:
        raise StateError("say how many to keep: --keep-last, -daily, -weekly or -monthly, above 0")
    machines: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=_age):
        machines.setdefault(entry.vm, []).append(entry)
    decisions: list[Decision] = []
    for mine in machines.values():
        reasons = _by_rules(mine, counts, now)
        for entry, reason in _rescued(mine, reasons):
            reasons.setdefault(entry.name, []).append(reason)
        decisions += [Decision(entry, tuple(reasons.get(entry.name, ()))) for entry in mine]
    return sorted(decisions, key=lambda decision: _age(decision.entry))


def _by_rules(
    entries: Sequence[Entry], counts: tuple[int, int, int, int], now: datetime
) -> dict[str, list[str]]:
    """Reasons to keep by the entry's name; entries are of one machine, oldest first."""
    reasons: dict[str, list[str]] = {}
    past = [entry for entry in reversed(entries) if entry.created_time <= now]
    sound = [entry for entry in past if entry.is_sound]
    for (rule, period), count in zip(_RULES, counts, strict=True):
        # The first of all, so that damage to one never makes another go; and the first sound ones.
        chosen = {entry.name for few in (past, sound) for entry in _first(few, period, count)}
        for entry in past:
            if entry.name in chosen:
                reasons.setdefault(entry.name, []).append(rule)
    for entry in entries:
        if entry.created_time > now:
            reasons.setdefault(entry.name, []).append("made in the future")
    return reasons


def _rescued(entries: Sequence[Entry], reasons: dict[str, list[str]]) -> list[tuple[Entry, str]]:
    """What would go and must not; entries are of one machine, oldest first."""
    kept = [entry for entry in entries if entry.name in reasons]
    for conditions, reason in (
        ({"good"}, "the only good one"),
        ({"good", "unchecked"}, "the only one not damaged"),
        ({"good", "unchecked", "damaged"}, "the only one"),
        ({"good", "unchecked", "damaged", "missing"}, "the only trace"),
    ):
        candidates = [entry for entry in entries if entry.condition in conditions]
        if candidates:
            left = any(entry.condition in conditions for entry in kept)
            return [] if left else [(candidates[-1], reason)]
    return []


def _first(
    entries: Sequence[Entry], period: Callable[[datetime], object], count: int
) -> list[Entry]:
    """The first entry of each of the first ``count`` periods."""
    seen: dict[object, Entry] = {}
    for entry in entries:
        seen.setdefault(period(entry.created_time.astimezone(UTC)) or entry.name, entry)
    return list(seen.values())[:count]


def _age(entry: Entry) -> tuple[datetime, str]:
    return entry.created_time, entry.name


#: Each rule's name, and the period of which it keeps one; None is every entry by itself.
_RULES: tuple[tuple[str, Callable[[datetime], object]], ...] = (
    ("last", lambda _: None),
    ("daily", lambda time: ("day", time.date())),
    ("weekly", lambda time: ("week", *time.isocalendar()[:2])),
    ("monthly", lambda time: ("month", time.year, time.month)),
)
