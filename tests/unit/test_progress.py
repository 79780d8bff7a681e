"""Progress: sums of what completed, and figures that hold at the edges."""

from __future__ import annotations

import dataclasses

import pytest

from uringmig.progress import ChannelCounters, account, take_snapshot


def counters(scale: int) -> ChannelCounters:
    """Every counter a different value, so that a swapped one is seen."""
    values = {
        field.name: type(field.default)(scale * number)  # type: ignore[misc]
        for number, field in enumerate(dataclasses.fields(ChannelCounters), start=1)
    }
    return ChannelCounters(**values)


def test_snapshot_is_the_sum_of_the_channels() -> None:
    one, other = counters(1), counters(10)
    snapshot = take_snapshot("write", [one, other], total_bytes=1000, seconds=2.0)
    for name in ("scanned", "zero", "finished", "completed", "in_flight"):
        field = f"{name}_bytes"
        assert getattr(snapshot, field) == getattr(one, field) + getattr(other, field)
    assert snapshot.channels == (one.completed_bytes, other.completed_bytes)
    assert (snapshot.phase, snapshot.total_bytes, snapshot.seconds) == ("write", 1000, 2.0)


def test_account_is_the_sum_of_the_channels_seconds() -> None:
    one, other = counters(1), counters(10)
    times = account([one, other], elapsed=9.0, sync=1.0, publish=2.0, receive=3.0)
    assert times.scan == one.scan_seconds + other.scan_seconds
    assert times.digest == one.digest_seconds + other.digest_seconds
    assert times.submit == one.submit_seconds + other.submit_seconds
    assert times.wait == one.wait_seconds + other.wait_seconds
    assert times.channel_cpu == one.cpu_seconds + other.cpu_seconds
    assert (times.elapsed, times.sync, times.publish, times.receive) == (9.0, 1.0, 2.0, 3.0)


def test_share_rate_and_time_left() -> None:
    counter = ChannelCounters(finished_bytes=250, completed_bytes=200)
    snapshot = take_snapshot("write", [counter], total_bytes=1000, seconds=2.0)
    assert snapshot.share == 0.25
    assert snapshot.rate == 100.0
    assert snapshot.seconds_left == pytest.approx(6.0)


def test_a_later_pass_is_told_of_by_itself() -> None:
    """What was gone through before says nothing about what is left; what was moved stays moved."""
    counter = ChannelCounters(finished_bytes=1250, completed_bytes=800)
    snapshot = take_snapshot(
        "catch-up", [counter], total_bytes=2000, seconds=8.0, passed_bytes=1000, passed_seconds=6.0
    )
    assert (snapshot.total_bytes, snapshot.finished_bytes, snapshot.share) == (1000, 250, 0.25)
    assert snapshot.rate == 100.0
    assert snapshot.seconds_left == pytest.approx(6.0)


def test_nothing_done_yet_has_no_estimate() -> None:
    snapshot = take_snapshot("write", [ChannelCounters()], total_bytes=1000, seconds=0.0)
    assert (snapshot.share, snapshot.rate, snapshot.seconds_left) == (0.0, 0.0, None)


def test_nothing_to_do_is_all_done() -> None:
    snapshot = take_snapshot("write", [ChannelCounters()], total_bytes=0, seconds=1.0)
    assert (snapshot.share, snapshot.seconds_left) == (1.0, 0.0)
