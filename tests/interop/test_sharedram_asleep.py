"""A guest in S3 saved by a migration: it lives, and wakes up, whatever is to become of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from realguest import StartMachine, put_to_sleep, shared_path

from uringmig.qemu.sharedram import save_shared
from uringmig.qemu.vmsave import Then
from uringmig.units import MiB


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("then", [None, "cont", "leave"])
def test_a_sleeping_guest_lives(
    then: Then | None, stopped: bool, start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU aborts where it has to go back to sleep from postmigrate: that road is not taken."""
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    put_to_sleep(machine)
    if stopped:
        machine.monitor.execute("stop")
    found = machine.monitor.run_state()
    result = save_shared(machine.monitor, tmp_path / "vm.mig", then=then)
    assert result.notes == ()
    expected = {None: found, "cont": "suspended", "leave": "paused"}[then]
    assert result.state_after == machine.monitor.run_state() == expected
    machine.monitor.execute("cont")
    assert machine.monitor.run_state() == "suspended"
    machine.monitor.execute("system_wakeup")
    while machine.monitor.run_state() != "running":
        pass
    assert machine.process.poll() is None
