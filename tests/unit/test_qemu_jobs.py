"""A job of QEMU's is told to end once, and a refusal between two of its states is none."""

from __future__ import annotations

from typing import cast

import pytest

from uringmig.errors import PeerError
from uringmig.qemu.jobs import run_job
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.qmp import CommandError


class Scripted:
    """A QEMU whose job is in these states, one a question; the last stays."""

    def __init__(self, *states: str, refusals: int = 0, error: str | None = None) -> None:
        self._states = list(states)
        self._refusals = refusals
        self._error = error
        self.told: list[str] = []

    def execute(self, command: str, /, **arguments: object) -> object:
        if command == "query-jobs":
            state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
            found = {"id": "j", "status": state} | ({"error": self._error} if self._error else {})
            return [] if state == "gone" else [found]
        self.told.append(command)
        if command == "job-complete" and self._refusals:
            self._refusals -= 1
            raise CommandError(command, "cannot accept command verb 'complete'")
        return None


def run(qemu: Scripted) -> list[str]:
    run_job(cast(Monitor, qemu), "j", "block-commit")
    return qemu.told


def test_it_is_told_to_end_once() -> None:
    """It stays ready for a moment after it was told so, and a second time it would refuse."""
    qemu = Scripted("gone", "running", "ready", "ready", "ready", "concluded")
    assert run(qemu) == ["block-commit", "job-complete", "job-dismiss"]


def test_what_goes_on_between_two_questions_is_no_failure() -> None:
    qemu = Scripted("gone", "ready", "standby", "ready", "concluded", refusals=1)
    assert run(qemu) == ["block-commit", "job-complete", "job-complete", "job-dismiss"]


def test_one_that_is_there_is_waited_for() -> None:
    """As a save that was killed has left it; be it over."""
    assert run(Scripted("ready", "ready", "concluded")) == ["job-complete", "job-dismiss"]
    assert run(Scripted("concluded")) == ["job-dismiss"]


def test_a_job_that_never_ends_is_given_up() -> None:
    with pytest.raises(CommandError):
        run(Scripted("gone", "ready", refusals=1 << 30))


def test_a_job_that_fails_is_told() -> None:
    qemu = Scripted("gone", "concluded", error="No space left on device")
    with pytest.raises(PeerError, match="block-commit failed: No space"):
        run(qemu)
    assert qemu.told[-1] == "job-dismiss"
    with pytest.raises(PeerError, match="taken away"):
        run(Scripted("gone", "running", "gone"))
