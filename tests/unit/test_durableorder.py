"""The rules of durable order see what breaks them, and nothing else."""

from __future__ import annotations

from dataclasses import replace

from durableorder import unsafe_names, unsettled
from systemcalls import Call

CREATE = frozenset({"O_CREAT"})
OPEN = Call("open", "/r/vm.partial", flags=CREATE)
WRITE = Call("write", "/r/vm.partial", offset=0, length=4, data=b"data")
SYNC = Call("sync", "/r/vm.partial")
NAME = Call("rename", "/r/vm.partial", target="/r/vm")
FOLDER = Call("sync", "/r")
LATER = Call("write", "/r/vm", offset=4, length=4, data=b"more")
LATER_SYNC = Call("sync", "/r/vm")
TELL = Call("tell", "pipe", data=b"saved")


def numbered(*calls: Call) -> list[Call]:
    return [replace(call, number=at, begun=at) for at, call in enumerate(calls)]


def complaints(*calls: Call) -> list[str]:
    listed = numbered(*calls, TELL)
    return unsafe_names(listed) + unsettled(listed, at=len(calls))


def test_the_right_order_is_not_complained_of() -> None:
    assert complaints(OPEN, WRITE, SYNC, NAME, FOLDER) == []
    assert complaints(OPEN, WRITE, SYNC, WRITE, SYNC, NAME, FOLDER) == []


def test_a_name_before_the_sync() -> None:
    assert complaints(OPEN, WRITE, NAME, FOLDER)
    assert complaints(OPEN, WRITE, SYNC, WRITE, NAME, FOLDER)
    assert complaints(OPEN, WRITE, NAME, LATER_SYNC, FOLDER)


def test_a_sync_that_began_too_early() -> None:
    calls = numbered(OPEN, WRITE, SYNC, NAME, FOLDER, TELL)
    calls[2] = replace(calls[2], begun=1)
    assert unsafe_names(calls) == ["vm got its name before its write was synced"]


def test_a_change_under_the_final_name() -> None:
    assert complaints(OPEN, WRITE, SYNC, NAME, FOLDER, LATER, LATER_SYNC)


def test_success_before_the_folder_is_synced() -> None:
    assert complaints(OPEN, WRITE, SYNC, NAME) == ["the name vm is not synced"]
    assert complaints(OPEN, WRITE, SYNC, FOLDER, NAME) == ["the name vm is not synced"]


def test_a_log_may_grow_but_each_addition_is_synced() -> None:
    begun = (OPEN, WRITE, SYNC, NAME, FOLDER)
    good = numbered(*begun, LATER, LATER_SYNC, LATER, LATER_SYNC, TELL)
    assert unsafe_names(good, logs=("vm",)) == []
    assert unsettled(good, at=len(good) - 1) == []
    bad = numbered(*begun, LATER, LATER, LATER_SYNC, TELL)
    assert unsafe_names(bad, logs=("vm",)) == ["vm grew twice without a sync"]
    open_end = numbered(*begun, LATER, TELL)
    assert unsettled(open_end, at=len(open_end) - 1) == ["the content of vm is not synced"]
