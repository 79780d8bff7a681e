"""Runs of job files within this process: the runner, ledger and workers' code, and no processes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from uringmig.batch.attempt import carry_out
from uringmig.batch.job import parse_jobs
from uringmig.batch.ledger import Ledger
from uringmig.batch.messages import Attempt, Examine, Message, Order
from uringmig.batch.runner import Run
from uringmig.batch.state import Summary
from uringmig.batch.worker import attempt
from uringmig.errors import UringmigError


class HerePool:
    """A pool that carries an order out while it is submitted, as fast as it can."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def refusal(self, host: str | None) -> UringmigError | None:
        return None

    def has_room(self, host: str | None) -> bool:
        return True

    def submit(self, order: Order, *, host: str | None) -> None:
        if isinstance(order, Attempt | Examine):
            job = msgspec.structs.replace(order.job, rate=0)
            order = msgspec.structs.replace(order, job=job)
        self._messages.append(attempt(order, carry_out, self._messages.append))

    def poll(self, timeout_s: float) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages

    def stop(self, key: str, *, at_once: bool) -> None:
        """Nothing: no order is ever under way."""

    def close(self) -> None:
        """Nothing is held."""


def run_here(path: Path) -> Summary:
    """Run a job file to its end, going on with an interrupted run of it."""
    text = path.read_text()
    job_file = parse_jobs(text, path=str(path.absolute()))
    with Ledger(job_file, text=text, write=True, resume_within_s=86400) as ledger:
        run = Run(ledger, HerePool())
        run.plan().check()
        return run.execute()
