"""The journal of a run: what it says after any cut and any damage is a true beginning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.batch.journal import (
    Begun,
    Ended,
    Failed,
    Finished,
    Record,
    RunState,
    Started,
    digest_text,
    encode,
    replay,
)

BEGUN = Begun(job_file="/j.toml", job_digest="d", time="20260101T000000Z", at=1000.0)
RECORDS: list[Record] = [
    BEGUN,
    Started(job="a", entry="a-1"),
    Started(job="b", entry="b-1"),
    Finished(job="a", entry="a-1", content_digest="aa", fingerprint="f"),
    Failed(job="b", kind="PeerError", error="it hung\nfor ever"),
    Started(job="c", entry="c-1"),
    Ended(at=1010.0),
]
WHOLE = b"".join(map(encode, RECORDS))
ENDS = [len(b"".join(map(encode, RECORDS[:count]))) for count in range(len(RECORDS) + 1)]


def test_whole_journal() -> None:
    state = replay(WHOLE)
    assert state.begun == BEGUN
    assert state.ended
    assert state.started == {"c": "c-1"}
    assert state.finished == {"a": RECORDS[3]}
    assert state.length == len(WHOLE)


def test_cut_anywhere_is_the_records_before_the_cut() -> None:
    for cut in range(len(WHOLE) + 1):
        whole = max(end for end in ENDS if end <= cut)
        state = replay(WHOLE[:cut])
        assert state.length == whole
        assert state == replay(WHOLE[:whole])


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_damage_ends_it_at_the_record_before(at: int, mask: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[at] ^= mask
    state = replay(bytes(damaged))
    assert state.length == max(end for end in ENDS if end <= at)


@given(st.binary(max_size=300))
def test_garbage_is_no_journal(data: bytes) -> None:
    assert replay(data) == RunState()


def test_records_without_a_beginning_are_not_believed() -> None:
    assert replay(encode(RECORDS[3])) == RunState()
    assert replay(encode(BEGUN) + encode(BEGUN)).length == len(encode(BEGUN))
    other = Begun(version=2, job_file="", job_digest="", time="", at=0.0)
    assert replay(encode(other)) == RunState()


@pytest.mark.parametrize(
    ("count", "digest", "now", "resumable"),
    [
        (0, "d", 1001.0, False),
        (1, "d", 1001.0, True),
        (6, "d", 1001.0, True),
        (6, "d", 1100.0, True),
        (6, "d", 1101.0, False),
        (6, "d", 999.0, False),
        (6, "e", 1001.0, False),
        (7, "d", 1001.0, False),
    ],
)
def test_goes_on_with_an_unfinished_run_of_the_same_file_that_is_not_old(
    count: int, digest: str, now: float, resumable: bool
) -> None:
    state = replay(WHOLE[: ENDS[count]])
    assert state.resumable(job_digest=digest, now=now, within_s=100.0) is resumable


def test_digest_of_a_job_file_tells_every_change() -> None:
    assert digest_text("a") == digest_text("a") != digest_text("a ")
