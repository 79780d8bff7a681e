"""The copy of a guest in memory: while it runs, and what has changed once it stands still.

A guest does not stand still for as long as a disk works, or is allowed to. Everything is copied
while it runs, at the allowed rate, and a digest of the very bytes that were written is kept; then
the guest is stopped, its memory is looked at once more, and what differs is copied again, as fast
as it goes. What takes long while the guest runs is followed by another round while it runs, so that
less is left for the standstill. One that stands still anyway is copied once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Protocol

from uringmig.archive.copied import CopiedGuest
from uringmig.contents.live import LiveContents, Memory
from uringmig.contents.source import Row, all_rows, window_of
from uringmig.image.digest import zero_digest

#: What a guest changes in so short a time is little, and another look would take as long.
_SHORT_SECONDS: Final = 0.5
#: Rounds after the first while a guest runs.
_ROUNDS_MOST: Final = 3


class LivePass(Protocol):
    """How a tier goes over some rows of memory."""

    def __call__(self, rows: Sequence[Row], *, again: bool, running: bool) -> None:
        """Copy them and drain.

        Args:
            rows: what to look at.
            again: only what is not as it was written before.
            running: the guest runs meanwhile: what is mapped is copied before it is looked at, and
                the rate holds.
        """


def copy_live(
    contents: LiveContents, guest: CopiedGuest, dense: frozenset[int], go_over: LivePass
) -> None:
    """Copy a guest's memory as it is at one moment.

    Args:
        contents: its memory.
        guest: what is known of it.
        dense: blocks, by index, that are written whole.
        go_over: the tier's way.

    Raises:
        UringmigError: nothing may be published; a guest that was stopped goes on.
    """
    again = contents.runs()
    if again:
        _copy_running(contents, guest, dense, go_over)
    with contents.standstill():
        rows = _to_look_at(contents, guest) if again else _with_data(contents, guest, dense)
        go_over(rows, again=again, running=False)


def _copy_running(
    contents: LiveContents, guest: CopiedGuest, dense: frozenset[int], go_over: LivePass
) -> None:
    """Copy all of it, then what has changed, for as long as each round is much shorter."""
    began = time.monotonic()
    go_over(_with_data(contents, guest, dense), again=False, running=True)
    took = time.monotonic() - began
    for _ in range(_ROUNDS_MOST):
        if took < _SHORT_SECONDS:
            return
        began = time.monotonic()
        go_over(_to_look_at(contents, guest), again=True, running=True)
        before, took = took, time.monotonic() - began
        if took > before / 2:
            return  # it changes its memory as fast as that is copied


def _with_data(contents: LiveContents, guest: CopiedGuest, dense: frozenset[int]) -> list[Row]:
    """The rows of a first pass; those that are nothing but hole are settled here."""
    holes = _holes(contents)
    for row in holes:
        guest.note_digest(row, _zeros(contents, row))
    return [row for row in all_rows(contents.blocks) if row[0] in dense or row not in holes]


def _to_look_at(contents: LiveContents, guest: CopiedGuest) -> list[Row]:
    """The rows of a later pass; what was zero and is a hole is still zero."""
    for memory in contents.memories:
        memory.forget_holes()
    holes = {row for row in _holes(contents) if guest.digest(row) == _zeros(contents, row)}
    return [row for row in all_rows(contents.blocks) if row not in holes]


def _zeros(contents: LiveContents, row: Row) -> bytes:
    """Digest of a row of zeros."""
    return zero_digest(window_of(contents.blocks, row).length_bytes)


def _holes(contents: LiveContents) -> set[Row]:
    """The rows that are nothing but hole; one question for each hole, not for each row."""
    return {
        row
        for number, memory in enumerate(contents.memories)
        for row in _holes_of(contents, number, memory)
    }


def _holes_of(contents: LiveContents, number: int, memory: Memory) -> list[Row]:
    """Of one block."""
    found, data_from = [], 0
    for row in range(contents.blocks[number].row_count):
        window = window_of(contents.blocks, (number, row))
        end = window.start_bytes + window.length_bytes
        if data_from <= window.start_bytes:
            data_from = memory.next_data(window.start_bytes)
        if data_from >= end:
            found.append((number, row))
    return found
