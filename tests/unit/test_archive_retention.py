"""Pruning against a slow, obvious version, and the copies that no rule may take away."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from uringmig.archive.entry import Entry
from uringmig.archive.retention import plan_prune
from uringmig.errors import StateError

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
NONE = {"keep_last": 0, "keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0}


def entry(name: str, time: datetime, *, vm: str = "vm", condition: str = "unchecked") -> Entry:
    return Entry(
        name=name, vm=vm, tier="hot", created=time.isoformat(), host="", machine="q35",
        source_kind="qmp", source_path="", source_fingerprint="", content_digest="00" * 16,
        memory_bytes=0, stored_bytes=0, file_bytes=0, image="", manifest="",
        verified_at="2026-01-01T00:00:00+00:00" if condition == "good" else None,
        damaged_chunks=int(condition in ("damaged", "missing")),
        missing=condition == "missing",
    )  # fmt: skip


def kept(entries: list[Entry], **rules: int) -> list[str]:
    return [one.entry.name for one in plan_prune(entries, now=NOW, **NONE | rules) if one.keep]


def every_hours(count: int, hours: float) -> list[Entry]:
    """Entries named by their age: 0 is the newest."""
    return [entry(str(n), NOW - timedelta(hours=hours * n)) for n in range(count)]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"keep_last": 2}, ["1", "0"]),
        ({"keep_daily": 3}, ["5", "2", "0"]),  # 12, 4 and 20 o'clock of the two days before
        ({"keep_weekly": 2}, ["8", "0"]),  # 1 July 2026 is a Wednesday
        ({"keep_monthly": 2}, ["2", "0"]),
        ({"keep_last": 2, "keep_monthly": 2}, ["2", "1", "0"]),
        ({"keep_last": 100}, [str(n) for n in range(29, -1, -1)]),
    ],
)
def test_rules_keep_the_newest_of_each_period(rules: dict[str, int], expected: list[str]) -> None:
    assert kept(every_hours(30, 8), **rules) == expected


def test_machines_do_not_count_for_each_other() -> None:
    entries = [replace(one, vm=f"vm{one.name}") for one in every_hours(4, 8)]
    assert len(kept(entries, keep_last=1)) == 4


def test_days_are_those_of_utc() -> None:
    east = timezone(timedelta(hours=14))
    entries = [
        entry("a", datetime(2026, 6, 30, 0, 30, tzinfo=UTC).astimezone(east)),
        entry("b", datetime(2026, 6, 30, 23, 30, tzinfo=UTC)),
    ]
    assert kept(entries, keep_daily=2) == ["b"]


@pytest.mark.parametrize("rules", [{}, {"keep_last": -1}, {"keep_last": 1, "keep_daily": -1}])
def test_nothing_to_keep_is_refused(rules: dict[str, int]) -> None:
    with pytest.raises(StateError, match="how many to keep"):
        plan_prune([], now=NOW, **NONE | rules)


def of(*conditions: str) -> list[Entry]:
    """Entries of one machine, oldest first, named by their condition and number."""
    return [
        entry(f"{condition}{n}", NOW - timedelta(hours=100 - n), condition=condition)
        for n, condition in enumerate(conditions)
    ]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["good", "good", "unchecked"], ["good1", "unchecked2"]),
        (["good", "damaged", "damaged"], ["good0", "damaged2"]),
        (["unchecked", "damaged", "damaged"], ["unchecked0", "damaged2"]),
        (["damaged", "damaged"], ["damaged1"]),
        (["damaged", "missing"], ["damaged0", "missing1"]),
        (["missing", "missing"], ["missing1"]),
        (["good", "missing"], ["good0", "missing1"]),
        (["unchecked", "missing"], ["unchecked0", "missing1"]),
        (["good", "unchecked", "good"], ["good2"]),
        (["good", "unchecked", "damaged"], ["good0", "unchecked1", "damaged2"]),
    ],
)
def test_the_only_good_one_stays(conditions: list[str], expected: list[str]) -> None:
    assert kept(of(*conditions), keep_last=1) == expected


def test_entry_from_the_future_stays_and_pushes_none_out() -> None:
    late = entry("late", NOW + timedelta(days=400))
    assert kept([late, *every_hours(3, 8)], keep_last=1) == ["0", "late"]


def test_why_each_is_kept_is_told() -> None:
    decisions = plan_prune(every_hours(3, 24), now=NOW, **NONE | {"keep_last": 1, "keep_daily": 2})
    assert [one.reasons for one in decisions] == [(), ("daily",), ("last", "daily")]


entries_of_all_kinds = st.lists(
    st.builds(
        entry,
        st.uuids().map(str),
        st.integers(-48, 24 * 100).map(lambda hours: NOW - timedelta(hours=hours)),
        vm=st.sampled_from(["a", "b"]),
        condition=st.sampled_from(["good", "unchecked", "damaged", "missing"]),
    ),
    max_size=30,
    unique_by=lambda one: one.name,
)
rule_numbers = st.fixed_dictionaries({name: st.integers(0, 5) for name in NONE})


@given(entries_of_all_kinds, rule_numbers.filter(lambda rules: any(rules.values())))
def test_plan_against_the_obvious_version(entries: list[Entry], rules: dict[str, int]) -> None:
    expected = {one for vm in ("a", "b") for one in obvious(vm, entries, rules)}
    assert set(kept(entries, **rules)) == expected


def obvious(vm: str, entries: list[Entry], rules: dict[str, Any]) -> set[str]:
    """Rule by rule, period by period, with no cleverness."""
    mine = sorted((e for e in entries if e.vm == vm), key=lambda e: (e.created_time, e.name))
    stay = {e.name for e in mine if e.created_time > NOW}
    for few in (mine, [e for e in mine if e.condition in ("good", "unchecked")]):
        past = [e for e in few if e.created_time <= NOW][::-1]
        stay |= {e.name for e in past[: rules["keep_last"]]}
        for rule, text in (("daily", "%Y-%m-%d"), ("weekly", "%G-%V"), ("monthly", "%Y-%m")):
            periods: list[str] = []
            for e in past:
                period = e.created_time.strftime(text)
                if period not in periods and len(periods) < rules[f"keep_{rule}"]:
                    periods.append(period)
                    stay.add(e.name)
    goods = [e.name for e in mine if e.condition == "good"]
    sound = [e.name for e in mine if e.condition in ("good", "unchecked")]
    if goods:
        if not stay & set(goods):
            stay.add(goods[-1])
    elif sound:
        if not stay & set(sound):
            stay.add(sound[-1])
    elif mine and not stay & {e.name for e in mine if e.condition == "damaged"}:
        there = [e.name for e in mine if e.condition == "damaged"]
        if there or not stay:
            stay.add((there or [e.name for e in mine])[-1])
    return stay
