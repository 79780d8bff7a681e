"""Other QMP clients of a VM that is being saved: what they ask for is done, and no image lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from imagereader import read_image
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on

from uringmig.errors import BusyError, PeerError
from uringmig.progress import Snapshot
from uringmig.qemu.guardian import Guardian
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.vmsave import Then, VmSave
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB


@pytest.fixture(scope="module")
def live(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One booted guest for all tests here."""
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=GUEST_BYTES,
        backend="",
        guest=guest,
        fill_bytes=FILL_BYTES,
    ) as machine:
        machine.console.wait_until_ready()
        yield machine


def save_while(
    machine: Machine,
    out: Path,
    meddle: Callable[[], object],
    *,
    phase: str = "write",
    then: Then | None = None,
) -> VmSave:
    """Save by a connection of its own; in its first moment of a phase ``meddle`` is called."""
    done: list[object] = []

    def look(snapshot: Snapshot) -> None:
        if snapshot.phase == phase and not done:
            done.append(meddle())

    with Monitor(machine.qmp_path) as monitor:
        try:
            return save_outside(monitor, out, then=then, progress=look)
        finally:
            assert done, f"no phase {phase!r}"


def kept(machine: Machine) -> tuple[Any, ...]:
    monitor = machine.monitor
    return monitor.capabilities(), monitor.parameters(), monitor.descriptors()


def doing(machine: Machine, *commands: str) -> Callable[[], None]:
    """Have another client run these."""

    def run() -> None:
        for command in commands:
            machine.monitor.execute(command)

    return run


def assert_nothing_left(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == []


def test_a_stop_before_the_guest_is_stopped(
    live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody stops it just when the guardian has been told to let it go on: it stays stopped."""
    arm = Guardian.arm
    done: list[object] = []

    def late(self: Guardian, word: bytes) -> None:
        arm(self, word)
        if not done:
            done.append(live.monitor.execute("stop"))

    monkeypatch.setattr(Guardian, "arm", late)
    before = kept(live)
    with Monitor(live.qmp_path) as monitor:
        result = save_outside(monitor, tmp_path / "vm.mig")
    assert (result.state_before, result.state_after) == ("paused", "paused")
    assert live.monitor.run_state() == "paused"
    assert kept(live) == before
    live.monitor.execute("cont")
    assert_goes_on(live)


def test_a_cont_before_the_guest_is_looked_at(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found stopped, and let go on by somebody else: it is stopped, saved, and goes on."""
    machine = start_machine(memory_bytes=64 * MiB, backend="", paused=True)
    arm = Guardian.arm
    done: list[object] = []

    def late(self: Guardian, word: bytes) -> None:
        arm(self, word)
        if not done:
            done.append(machine.monitor.execute("cont"))

    monkeypatch.setattr(Guardian, "arm", late)
    with Monitor(machine.qmp_path) as monitor:
        result = save_outside(monitor, tmp_path / "vm.mig")
    assert (result.state_before, result.state_after) == ("running", "running")
    read_image(tmp_path / "vm.mig")


@pytest.mark.parametrize("phase", ["bitmaps", "sync", "publish"])
def test_a_stop_after_the_standstill(live: Machine, tmp_path: Path, phase: str) -> None:
    """The guest goes on before its image is durable; whoever stops it then has it stopped."""
    result = save_while(live, tmp_path / "vm.mig", doing(live, "stop"), phase=phase)
    assert (result.state_before, result.state_after) == ("running", "paused")
    assert live.monitor.run_state() == "paused"
    read_image(tmp_path / "vm.mig")
    live.monitor.execute("cont")
    assert_goes_on(live)


def test_a_stop_within_the_standstill(live: Machine, tmp_path: Path) -> None:
    """QEMU does nothing and tells nobody, so the guest goes on: docs/operations.md says so.

    Should a QEMU come that tells, this fails, and then it is to be honoured.
    """
    events: list[tuple[str, ...]] = []

    def stop() -> None:
        live.monitor.run_state()  # with what came until now
        seen = live.monitor.run_events()
        live.monitor.execute("stop")
        live.monitor.run_state()
        events.append(live.monitor.run_events()[len(seen) :])

    result = save_while(live, tmp_path / "vm.mig", stop)
    assert events == [()]
    assert result.state_after == live.monitor.run_state() == "running"


def test_cont_and_stop_within_the_standstill(live: Machine, tmp_path: Path) -> None:
    """What an operator does who wants it stopped now: there is no image, and it is stopped."""
    out = tmp_path / "vm.mig"
    with pytest.raises(BusyError, match="another client let the guest go on"):
        save_while(live, out, doing(live, "cont", "stop"))
    assert_nothing_left(out)
    assert live.monitor.run_state() == "paused"
    live.monitor.execute("cont")
    assert_goes_on(live)


@pytest.mark.parametrize("running", [True, False])
def test_a_reset_within_the_standstill(
    running: bool, start_machine: StartMachine, tmp_path: Path
) -> None:
    """ROMs are copied anew into memory: an image of both is none; a guest that ran begins anew."""
    machine = start_machine(memory_bytes=64 * MiB, backend="", paused=not running)
    before, out = kept(machine), tmp_path / "vm.mig"

    def reset() -> None:
        machine.monitor.run_state()
        seen = machine.monitor.run_events()
        machine.monitor.execute("system_reset")
        while "RESET" not in machine.monitor.run_events()[len(seen) :]:
            machine.monitor.run_state()

    with pytest.raises(BusyError, match="another client reset the guest"):
        save_while(machine, out, reset)
    assert_nothing_left(out)
    assert machine.monitor.run_state() == ("running" if running else "prelaunch")
    assert kept(machine) == before


def test_a_power_button_within_the_standstill(live: Machine, tmp_path: Path) -> None:
    """It is for the guest to heed, when it goes on; the image is of the moment before."""
    result = save_while(live, tmp_path / "vm.mig", doing(live, "system_powerdown"))
    assert (result.state_after, result.notes) == ("running", ())
    assert_goes_on(live)


@pytest.mark.parametrize("then", [None, "quit"])
def test_a_quit_within_the_standstill(
    then: Then | None, start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU ends as it was told to; one line, and no image."""
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    out = tmp_path / "vm.mig"

    def end() -> None:
        machine.monitor.execute("quit")
        machine.process.wait()

    with pytest.raises(PeerError, match=r"went away|has ended") as caught:
        save_while(machine, out, end, then=then)
    assert "\n" not in str(caught.value)
    assert_nothing_left(out)


@pytest.mark.parametrize("running", [True, False])
def test_a_migration_within_the_standstill(
    running: bool, start_machine: StartMachine, tmp_path: Path
) -> None:
    """The guest lives elsewhere since: it does not go on here, or it would be in two places."""
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    if not running:
        machine.monitor.execute("stop")
    out = tmp_path / "vm.mig"

    def migrate() -> None:
        machine.monitor.execute("migrate", uri=f"file:{tmp_path / 'theirs.mig'}")
        assert machine.monitor.wait_for_migration(timeout_s=300).status == "completed"

    with pytest.raises(BusyError, match="brought the guest into state 'postmigrate'"):
        save_while(machine, out, migrate)
    assert_nothing_left(out)
    assert machine.monitor.run_state() == "postmigrate"
    assert machine.process.poll() is None


@pytest.mark.parametrize("live", [True, False])
def test_a_migration_before_the_standstill(
    live: bool,
    start_machine: StartMachine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first pass of a live save, or just before the stop: it is not saved from elsewhere."""
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    arm = Guardian.arm
    done: list[object] = []

    def late(self: Guardian, word: bytes) -> None:
        arm(self, word)
        if not done:
            machine.monitor.execute("migrate", uri=f"file:{tmp_path / 'theirs.mig'}")
            done.append(machine.monitor.wait_for_migration(timeout_s=300))

    monkeypatch.setattr(Guardian, "arm", late)
    out = tmp_path / "vm.mig"
    with Monitor(machine.qmp_path) as monitor, pytest.raises(PeerError, match="'postmigrate'"):
        save_outside(monitor, out, live=live)
    assert_nothing_left(out)
    assert machine.monitor.run_state() == "postmigrate"


def test_a_migration_that_lasts(start_machine: StartMachine, tmp_path: Path) -> None:
    """It goes on after the standstill as the guest does; the image is whole."""
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    machine.monitor.set_parameters(**{"max-bandwidth": 4096})

    def migrate() -> None:
        machine.monitor.execute("migrate", uri=f"file:{tmp_path / 'theirs.mig'}")
        while machine.monitor.migration().status != "active":
            pass

    result = save_while(machine, tmp_path / "vm.mig", migrate)
    assert result.state_after == "running"
    assert machine.monitor.migration().status == "active"
    read_image(tmp_path / "vm.mig")
    machine.monitor.execute("migrate_cancel")
    assert machine.monitor.wait_for_migration(timeout_s=300).status == "cancelled"
    assert machine.monitor.run_state() == "running"
    machine.monitor.execute("migrate", uri=f"file:{tmp_path / 'theirs.mig'}")
    with pytest.raises(BusyError, match="migration"):
        save_outside(machine.monitor, tmp_path / "second.mig")
