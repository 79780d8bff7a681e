"""``uringmig repair``: puts back what a save that was killed left changed in a QEMU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.qemu.leftovers import heal
from uringmig.qemu.monitor import Monitor


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was found; ``done`` has a line for each thing that was put back or looks wrong."""

    done: tuple[str, ...]
    run_state: str


@command(parameters.qmp_socket(), verbose=False)
def repair(session: Session, *, qmp: Path) -> int:
    """Put back what a save left changed in a VM when it was killed; the next save does so too."""
    with Monitor(qmp) as monitor:
        found = Repaired(done=heal(monitor), run_state=monitor.run_state())
    lines = [*(found.done or ["nothing was left changed"]), f"the guest is {found.run_state}"]
    session.output.result("repair", found, lines)
    return session.output.exit_code
