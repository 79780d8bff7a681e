"""Live saves that are stopped, killed or meddled with, in either pass and between the two.

URINGMIG_KILL_ROUNDS is how often each of the three ways to kill is tried, at random moments.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commandline import start, uringmig
from imagereader import read_image
from outsidefill import fill_ram
from realguest import StartMachine, shared_path

from uringmig import WriteOptions
from uringmig.errors import BusyError, HostError, PeerError, StorageError
from uringmig.image import manifest
from uringmig.progress import Snapshot
from uringmig.qemu import guestmemory
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.saving import save_vm
from uringmig.qemu.vmsave import Then
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import Completions
from uringmig.testing.machine import Machine
from uringmig.units import KiB, MiB
from uringmig.verify import verify

ROUNDS = int(os.environ.get("URINGMIG_KILL_ROUNDS", "3"))
GUEST_BYTES = 256 * MiB
FILLED_BYTES = 192 * MiB


def kept(machine: Machine) -> object:
    """All that QEMU keeps and that a save might change."""
    monitor = machine.monitor
    return monitor.capabilities(), monitor.parameters(), monitor.descriptors()


@pytest.fixture(scope="module")
def live(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose firmware runs, and memory that was filled from outside."""
    with Machine(tmp_path_factory.mktemp("m"), memory_bytes=GUEST_BYTES, backend="") as machine:
        fill_ram(machine, first=16 * MiB, length=FILLED_BYTES)
        yield machine


def at(phase: str, act: Callable[[], object]) -> Callable[[Snapshot], None]:
    """A progress callback that does something once, when this phase is told of first."""
    done: list[object] = []

    def look(snapshot: Snapshot) -> None:
        if snapshot.phase == phase and not done:
            done.append(None)
            act()

    return look


def child_of(process: subprocess.Popen[str]) -> int | None:
    """The guardian of a save, if it is there."""
    try:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return None
    return int(text.split()[0]) if text.split() else None


@pytest.mark.parametrize("who", ["saver", "guardian", "both"])
def test_killed_at_random_moments(live: Machine, tmp_path: Path, who: str) -> None:
    """The guest runs on, nothing of QEMU's is changed, the image is absent or whole."""
    source = random.Random(f"20261127 {who} {ROUNDS}")
    before = kept(live)
    out = tmp_path / "vm"
    for _ in range(ROUNDS):
        child = start("save", "--live", "--qmp", live.qmp_path, out)
        time.sleep(source.uniform(0.0, 1.2))
        guardian = child_of(child)
        if guardian is not None and who != "saver":
            os.kill(guardian, signal.SIGKILL)
        if who != "guardian":
            child.kill()
        _, err = child.communicate()
        if who == "both":
            done = uringmig("repair", "--qmp", live.qmp_path)
            assert done.code == 0, done.err
            assert live.monitor.run_state() == "running"
        elif who == "guardian":
            # Killed before it was up: then no guest is stopped. Later it is not missed.
            assert child.returncode == 0 or "guardian of the guest did not start" in err, err
        while live.monitor.run_state() != "running" or kept(live) != before:
            time.sleep(0.005)
        if out.exists():
            read_image(out)
            out.unlink()
    assert save_outside(live.monitor, out, live=True).notes == ()
    assert verify(out).mismatches == ()


@pytest.mark.parametrize("phase", ["write", "catch-up", "bitmaps", "sync"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(
    live: Machine, tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    """In every pass: exit 128+N, the guest runs, and not even a partial file is left."""
    before = kept(live)
    program = (
        "import os, signal, sys\n"
        "import uringmig.writer as writer\n"
        "tell = writer.MappedRamWriter._tell\n"
        "def strike(self, phase):\n"
        f"    if phase == {phase!r}:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return tell(self, phase)\n"
        "writer.MappedRamWriter._tell = strike\n"
        "from uringmig.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "save", "--live", "--qmp", live.qmp_path, tmp_path / "vm"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert live.monitor.run_state() == "running"
    assert kept(live) == before


@pytest.mark.parametrize("then", [None, "cont", "leave"])
def test_somebody_stops_the_guest_in_the_first_pass(
    live: Machine, tmp_path: Path, then: Then | None
) -> None:
    """It is theirs: it is left stopped whatever the save was asked for, and is restored so."""
    before = kept(live)
    with Monitor(live.qmp_path) as monitor:
        stop = at("write", lambda: live.monitor.execute("stop"))
        result = save_outside(monitor, tmp_path / "vm", live=True, then=then, progress=stop)
    assert live.monitor.run_state() == "paused"
    assert kept(live) == before
    live.monitor.execute("cont")
    assert result.passes > 1
    assert result.stopped_seconds == 0.0
    assert (result.state_before, result.state_after) == ("running", "paused")
    assert "did not run any more" in result.notes[0]
    [state] = [each for each in read_image(tmp_path / "vm").sections if each.idstr == "globalstate"]
    assert b"paused" in state.raw


def test_stopped_and_let_go_on_in_the_first_pass(live: Machine, tmp_path: Path) -> None:
    """Nothing has to stand still yet."""

    def meddle() -> None:
        live.monitor.execute("stop")
        live.monitor.execute("cont")

    with Monitor(live.qmp_path) as monitor:
        result = save_outside(monitor, tmp_path / "vm", live=True, progress=at("write", meddle))
    assert result.notes == ()
    assert result.state_after == live.monitor.run_state() == "running"


@pytest.mark.parametrize("stopped_again", [True, False])
def test_somebody_lets_the_guest_go_on_while_it_stands_still(
    live: Machine, tmp_path: Path, stopped_again: bool
) -> None:
    def meddle() -> None:
        live.monitor.execute("cont")
        if stopped_again:
            live.monitor.execute("stop")

    before = kept(live)
    with (
        Monitor(live.qmp_path) as monitor,
        pytest.raises(PeerError, match="another client let the guest go on"),
    ):
        save_outside(monitor, tmp_path / "vm", live=True, progress=at("catch-up", meddle))
    assert live.monitor.run_state() == ("paused" if stopped_again else "running")
    assert kept(live) == before
    assert list(tmp_path.iterdir()) == []
    live.monitor.execute("cont")


@pytest.mark.parametrize("rate", [0, 256 * MiB])
def test_a_guest_that_is_stopped_anyway(live: Machine, tmp_path: Path, rate: int) -> None:
    """One pass, at the rate if there is one, and nothing to be said about it."""
    live.monitor.execute("stop")
    options = WriteOptions(rate=rate)
    result = save_outside(live.monitor, tmp_path / "vm", live=True, options=options)
    assert (result.passes, result.stopped_seconds, result.notes) == (1, 0.0, ())
    assert result.state_before == result.state_after == live.monitor.run_state() == "paused"
    live.monitor.execute("cont")


def test_a_rate_does_not_hold_the_guest(live: Machine, tmp_path: Path) -> None:
    """All that is paced is written while the guest runs; what it changed is written unpaced."""
    states: dict[str, set[str]] = {"write": set(), "catch-up": set()}

    def change() -> None:
        fill_ram(live, first=16 * MiB, length=64 * MiB, seed=7)

    change_then = at("catch-up", change)

    def look(snapshot: Snapshot) -> None:
        if snapshot.phase in states:
            states[snapshot.phase].add(live.monitor.run_state())
        change_then(snapshot)

    with Monitor(live.qmp_path) as monitor:
        options = WriteOptions(rate=128 * MiB)
        result = save_outside(monitor, tmp_path / "vm", options=options, progress=look)
    assert result.passes >= 2
    assert any("--rate" in note for note in result.notes)
    assert states == {"write": {"running"}, "catch-up": {"paused"}}
    assert result.image.written_bytes >= FILLED_BYTES + 64 * MiB
    assert verify(tmp_path / "vm").mismatches == ()


def test_another_save_in_the_first_pass(live: Machine, tmp_path: Path) -> None:
    """It is told so, and may try again; the first is not disturbed."""
    refused: list[PeerError] = []

    def second() -> None:
        with pytest.raises(BusyError, match="another save") as caught:
            save_outside(live.monitor, tmp_path / "second")
        refused.append(caught.value)

    with Monitor(live.qmp_path) as monitor:
        save_outside(monitor, tmp_path / "first", live=True, progress=at("write", second))
    assert refused[0].may_pass
    assert verify(tmp_path / "first").mismatches == ()


def test_a_migration_begins_in_the_first_pass(start_machine: StartMachine, tmp_path: Path) -> None:
    """The guest is QEMU's then: it is not stopped, and the migration is not disturbed."""
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    fill_ram(machine, first=16 * MiB, length=32 * MiB)
    machine.monitor.set_parameters(**{"max-bandwidth": MiB})

    def migrate() -> None:
        machine.monitor.execute("migrate", uri="exec:cat >/dev/null")

    with Monitor(machine.qmp_path) as monitor, pytest.raises(BusyError, match="migration"):
        save_outside(monitor, tmp_path / "vm", live=True, progress=at("write", migrate))
    assert machine.monitor.run_state() == "running"
    assert machine.monitor.migration().status in ("setup", "active")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["memory", "nvme", "nothing"])
def test_devices_that_come_in_the_first_pass(
    start_machine: StartMachine, tmp_path: Path, what: str
) -> None:
    """Others than were looked at before: the save is refused, and QEMU and its guest live."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    machine = start_machine(
        memory_bytes=64 * MiB,
        backend="",
        arguments=[
            *["-m", "slots=2,maxmem=1G", "-device", "pcie-root-port,id=root1,chassis=1"],
            *["-drive", f"file={disk},if=none,id=d,format=raw"],
        ],
    )
    monitor = machine.monitor

    def plug() -> None:
        if what == "memory":
            monitor.execute(
                "object-add", **{"qom-type": "memory-backend-ram", "id": "more", "size": 128 * MiB}
            )
            monitor.execute("device_add", driver="pc-dimm", memdev="more", id="dimm")
        if what == "nvme":
            monitor.execute("device_add", driver="nvme", drive="d", serial="1", bus="root1")

    out = tmp_path / "vm"
    with Monitor(machine.qmp_path) as ours:
        if what == "nothing":
            assert save_outside(ours, out, live=True, progress=at("write", plug)).passes > 1
        else:
            match, kind = {"memory": ("RAM changed", BusyError), "nvme": ("nvme", PeerError)}[what]
            with pytest.raises(kind, match=match):
                save_outside(ours, out, live=True, progress=at("write", plug))
            assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert monitor.run_state() == "running"


def test_qemu_dies_in_the_first_pass(start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    with Monitor(machine.qmp_path) as monitor, pytest.raises(PeerError, match=r"went away|ended"):
        save_outside(monitor, tmp_path / "vm", live=True, progress=at("write", machine.kill))
    assert list(tmp_path.iterdir()) == []


def test_only_from_outside(live: Machine, tmp_path: Path) -> None:
    """A migration holds the guest for all of a save: it is not taken without a word."""
    done = uringmig("save", "--live", "--how", "migrate", "--qmp", live.qmp_path, tmp_path / "vm")
    assert done.code == 2
    assert "from outside" in done.err
    assert live.monitor.run_state() == "running"


@pytest.mark.parametrize("then", ["leave", "quit"])
def test_what_becomes_of_the_guest(start_machine: StartMachine, tmp_path: Path, then: Then) -> None:
    """It is stopped for the second pass, and then not let go on."""
    machine = start_machine(memory_bytes=64 * MiB, backend="")
    result = save_outside(machine.monitor, tmp_path / "vm", live=True, then=then)
    assert result.passes > 1
    assert result.stopped_seconds > 0
    assert (result.state_before, result.notes) == ("running", ())
    assert result.state_after == {"leave": "paused", "quit": None}[then]
    if then == "quit":
        assert machine.process.wait(timeout=60) == 0
    else:
        assert machine.monitor.run_state() == "paused"
    assert verify(tmp_path / "vm").mismatches == ()


@pytest.mark.parametrize("phase", ["write", "catch-up"])
def test_full_disk(
    live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """In the first pass the guest is not even stopped; in the second it goes on."""
    full: list[str] = []

    class Engine(PwriteEngine):
        def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
            done = super().reap(wait_count=wait_count, timeout_ns=timeout_ns)
            if full:
                return Completions(done.token, np.full(len(done), -errno.ENOSPC, np.int64))
            return done

    def fill(snapshot: Snapshot) -> None:
        if snapshot.phase == phase and not full:
            full.append(phase)
            if phase == "catch-up":  # there has to be something to write
                fill_ram(live, first=16 * MiB, length=MiB, seed=99)

    monkeypatch.setattr("uringmig.writer.choose_engine", lambda _: EngineChoice("full", Engine))
    before, events = kept(live), live.monitor.run_events()
    with Monitor(live.qmp_path) as monitor, pytest.raises(StorageError) as caught:
        save_outside(monitor, tmp_path / "vm", live=True, progress=fill)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert live.monitor.run_state() == "running"
    assert kept(live) == before
    assert (live.monitor.run_events() == events) == (phase == "write")


def test_a_migration_keeps_no_rate(start_machine: StartMachine, tmp_path: Path) -> None:
    """Its guest stands still until all is written: it would wait for the rate, too."""
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    fill_ram(machine, first=16 * MiB, length=32 * MiB)
    result = save_vm(
        machine.qmp_path, tmp_path / "vm", how="migrate", options=WriteOptions(rate=KiB)
    )
    assert any("--rate was not kept" in note for note in result.notes)
    assert machine.monitor.run_state() == "running"


def test_a_live_save_that_cannot_read_does_not_migrate(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is to run on: the guest is not held for all of a save instead."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(guestmemory, "mappings_of", refuse)
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    with pytest.raises(HostError, match=r"no right to read .* not made by a migration"):
        save_vm(machine.qmp_path, tmp_path / "vm", live=True)
    assert machine.monitor.run_state() == "running"


def test_what_is_told_of_a_live_save(live: Machine, tmp_path: Path) -> None:
    """The passes as they go on, and how long the guest stood still: in result and manifest."""
    out = tmp_path / "vm"
    done = uringmig("save", "--json", "--live", "--qmp", live.qmp_path, out)
    assert (done.code, done.err) == (0, "")
    phases = [each["phase"] for each in done.events() if each["event"] == "progress"]
    assert list(dict.fromkeys(phases))[:3] == ["write", "catch-up", "bitmaps"]
    result = done.result()
    assert result["passes"] >= 2
    stopped = result["stopped_seconds"]
    assert 0 < stopped < result["image"]["time"]["elapsed"]
    said = manifest.decode(Path(f"{out}.manifest.json").read_bytes())
    assert said.seconds["stopped"] == pytest.approx(stopped, abs=1e-5)
    out.unlink()
    told = uringmig("save", "--live", "--qmp", live.qmp_path, out)
    assert "after all was written once while it ran" in told.out
