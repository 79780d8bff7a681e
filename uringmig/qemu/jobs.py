"""Jobs of QEMU's block layer: started, or met where a save that was killed left them, and ended."""

from __future__ import annotations

import time
from typing import Any, Final

from uringmig import signals
from uringmig.errors import PeerError
from uringmig.qemu.monitor import Monitor, growing_pauses
from uringmig.qemu.qmp import CommandError

#: So often in a row, some seconds long, QEMU does not refuse what is only not possible just now.
_REFUSALS_MAX: Final = 200


def has_job(monitor: Monitor, job: str) -> bool:
    """Say whether QEMU has a job of this id, be it concluded."""
    return _find(monitor, job) is not None


def run_job(monitor: Monitor, job: str, command: str, /, **arguments: Any) -> None:
    """Run a job to its end; one of this id that is there already is waited for instead.

    Args:
        monitor: of QEMU.
        job: its id.
        command: QMP command that starts it.
        arguments: of the command; by them it does not dismiss itself.

    Raises:
        PeerError: QEMU refused it, or it failed.
    """
    if not has_job(monitor, job):
        monitor.execute(command, **{"job-id": job}, **arguments)
    pauses = growing_pauses()
    told, refusals = False, 0
    while True:
        found = _find(monitor, job)
        if found is None:
            raise PeerError(f"QEMU's job {job} was taken away")
        if found["status"] == "ready" and not told:
            try:
                monitor.execute("job-complete", id=job)
                told = True
            except CommandError:
                # It goes on between two questions: somebody who was killed had told it already, or
                # QEMU waits for its disks just now.
                refusals += 1
                if refusals > _REFUSALS_MAX:
                    raise
        elif found["status"] == "concluded":
            monitor.execute("job-dismiss", id=job)
            if found.get("error"):
                raise PeerError(f"QEMU's job {command} failed: {found['error']}")
            return
        signals.look()
        time.sleep(next(pauses))


def _find(monitor: Monitor, job: str) -> dict[str, Any] | None:
    """What QEMU says of one job."""
    return next((each for each in monitor.execute("query-jobs") if each["id"] == job), None)
