"""Saves from outside that die: the guest goes on whatever of ours is killed, and whenever."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import uringmig
from imagereader import read_image
from otheruser import NOBODY, let_everybody_search
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on, shared_path

from uringmig.errors import HostError, StorageError
from uringmig.qemu import guardian, guestmemory
from uringmig.qemu.guardprocess import GO_ON, NOTES
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.saving import save_vm
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.testing.faults import WHOLE, faulty
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

SAVE = """
import sys, time
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
print("ready", flush=True)
def hold(snapshot):
    if snapshot.phase == "write" and snapshot.scanned_bytes == 0:
        time.sleep(float(sys.argv[3]))
with Monitor(sys.argv[1]) as monitor:
    save_outside(monitor, sys.argv[2], progress=hold)
"""


def start_save(machine: Machine, out: Path, *, hold_s: float = 0.0) -> subprocess.Popen[bytes]:
    """A save in a process of its own, which dawdles before it writes: the guest stands still."""
    command = [sys.executable, "-c", SAVE, str(machine.qmp_path), str(out), str(hold_s)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def wait_for_state(machine: Machine, state: str) -> None:
    while machine.monitor.run_state() != state:
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def guardian_of(child: subprocess.Popen[bytes]) -> int:
    """The saver's one child; /proc may miss it for a moment while others come and go (proc(5))."""
    while not (found := children(child.pid)):
        assert child.poll() is None, "the save has ended"
    return found[0]


def kept(machine: Machine) -> object:
    monitor = machine.monitor
    return monitor.capabilities(), monitor.parameters(), monitor.descriptors()


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


def test_killed_at_random_moments(live: Machine, tmp_path: Path) -> None:
    """The guest runs on, settings are the same, the image is absent or whole."""
    source = random.Random(20261126)
    before = kept(live)
    for number in range(12):
        out = tmp_path / f"{number}.mig"
        with start_save(live, out) as child:
            time.sleep(source.uniform(0.0, 0.5))
            child.kill()
        # It may have been killed before it stopped the guest, or its guardian acts in a moment.
        while live.monitor.run_state() != "running" or kept(live) != before:
            time.sleep(0.005)
        if out.exists():
            read_image(out)
    assert_goes_on(live)
    assert save_outside(live.monitor, tmp_path / "after.mig").notes == ()
    read_image(tmp_path / "after.mig")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_the_guest_stands_still(
    live: Machine, tmp_path: Path, number: signal.Signals
) -> None:
    """Nobody of ours has to live for the guest to go on but the guardian, which then ends."""
    before = kept(live)
    with start_save(live, tmp_path / "vm.mig", hold_s=60) as child:
        wait_for_state(live, "paused")
        guardian_pid = guardian_of(child)
        os.kill(guardian_pid, signal.SIGTERM)  # as a service that is stopped sends it to all
        child.send_signal(number)
        child.wait()
        wait_for_state(live, "running")
        while kept(live) != before:
            time.sleep(0.005)
    assert_goes_on(live)
    while os.path.isdir(f"/proc/{guardian_pid}") and not is_zombie(guardian_pid):
        time.sleep(0.005)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_ended(pid: int) -> None:
    while os.path.isdir(f"/proc/{pid}") and not is_zombie(pid):
        time.sleep(0.005)


def test_all_of_ours_killed_at_once(live: Machine, tmp_path: Path) -> None:
    """The note that QEMU keeps tells the next save, which lets the guest go on before it begins."""
    before = kept(live)
    with start_save(live, tmp_path / "vm.mig", hold_s=60) as child:
        wait_for_state(live, "paused")
        guardian_pid = guardian_of(child)
        os.kill(guardian_pid, signal.SIGKILL)
        child.kill()
    wait_until_ended(guardian_pid)
    assert live.monitor.run_state() == "paused"
    assert NOTES[GO_ON] in [opaque for _, opaque, _ in live.monitor.descriptors()]
    result = save_outside(live.monitor, tmp_path / "next.mig")
    assert result.state_before == result.state_after == live.monitor.run_state() == "running"
    assert any("let go on first" in note for note in result.notes)
    assert kept(live) == before
    assert_goes_on(live)


def test_guardian_killed_alone(live: Machine, tmp_path: Path) -> None:
    """It is not missed: the save goes on, and lets the guest go on itself."""
    before = kept(live)
    with start_save(live, tmp_path / "vm.mig", hold_s=1) as child:
        wait_for_state(live, "paused")
        guardian_pid = guardian_of(child)
        os.kill(guardian_pid, signal.SIGKILL)
        assert child.wait() == 0
    assert live.monitor.run_state() == "running"
    assert kept(live) == before
    read_image(tmp_path / "vm.mig")


def test_a_paused_guest_stays_paused_when_its_save_is_killed(live: Machine, tmp_path: Path) -> None:
    """The guardian lets go on what ran, and nothing else."""
    live.monitor.execute("stop")
    before = kept(live)
    with start_save(live, tmp_path / "vm.mig", hold_s=60) as child:
        while not (tmp_path / "vm.mig.partial").exists():
            time.sleep(0.005)
        guardians = children(child.pid)
        child.kill()
    for pid in guardians:
        # Before it ends it takes back what QEMU was given for the time of the save.
        wait_until_ended(pid)
    assert live.monitor.run_state() == "paused"
    assert kept(live) == before
    live.monitor.execute("cont")
    assert_goes_on(live)


def test_full_disk(live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of the pages: told with its number, nothing left, the guest goes on."""
    factory = faulty(PwriteEngine, lambda _: [WHOLE] * 5 + [-errno.ENOSPC])
    choice = EngineChoice("faulty", factory)
    monkeypatch.setattr("uringmig.writer.choose_engine", lambda _: choice)
    before = kept(live)
    with pytest.raises(StorageError) as caught:
        save_outside(live.monitor, tmp_path / "vm.mig")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert kept(live) == before
    assert live.monitor.run_state() == "running"
    assert_goes_on(live)


def test_no_guardian_no_standstill(
    live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest is not stopped without somebody who would let it go on."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    events = live.monitor.run_events()
    with pytest.raises(HostError, match="guardian"):
        save_outside(live.monitor, tmp_path / "vm.mig")
    assert live.monitor.run_state() == "running"
    assert live.monitor.run_events() == events
    assert {"running"} <= guardian.LIVE


def test_no_right_to_read(live: Machine, tmp_path: Path) -> None:
    """Another user: exit 6, one line that says who is who; the guest is not stopped."""
    live.qmp_path.chmod(0o777)
    let_everybody_search(live.folder)
    tmp_path.chmod(0o777)
    program = (
        "import os, sys\n"
        "from uringmig.qemu.saving import save_vm\n"
        "from uringmig.errors import UringmigError\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try:\n"
        "    save_vm(sys.argv[1], sys.argv[2])\n"
        "except UringmigError as error:\n"
        "    print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(live.qmp_path), str(tmp_path / "vm.mig")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (6, ""), done.stdout
    assert f"this is user {NOBODY}, QEMU is user 0" in done.stdout
    assert "CAP_SYS_PTRACE" in done.stdout
    assert live.monitor.run_state() == "running"


def test_what_cannot_be_reached_is_migrated(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` takes the other way where there is one, and says so; else both reasons are told."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(guestmemory, "mappings_of", refuse)
    shared = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    with Monitor(shared.qmp_path) as monitor:
        result = save_vm(monitor, tmp_path / "vm.mig")
    assert result.how == "migrate"
    [note] = result.notes
    assert "no right to read" in note
    private = start_machine(memory_bytes=64 * MiB, backend="")
    with pytest.raises(HostError, match=r"no right to read .* and not by a migration: .*share"):
        save_vm(private.qmp_path, tmp_path / "vm.mig")


MIGRATE = SAVE.replace("outside", "shared").replace("qemu.shared ", "qemu.sharedram ")


@pytest.mark.parametrize("healer", ["save", "repair"])
def test_settings_after_a_migration_was_killed(
    healer: str, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Noted before they are changed, put back by whoever comes next; others' are left alone."""
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    machine.monitor.set_capabilities(**{"auto-converge": True})
    before = kept(machine)
    arguments = [str(machine.qmp_path), str(tmp_path / "vm.mig"), "60"]
    with subprocess.Popen([sys.executable, "-c", MIGRATE, *arguments]) as child:
        wait_for_state(machine, "finish-migrate")
        child.kill()
    wait_for_state(machine, "running")
    assert machine.monitor.capabilities()["x-ignore-shared"]
    if healer == "repair":
        done = uringmig("repair", "--qmp", machine.qmp_path)
        assert (done.code, done.err) == (0, "")
        assert "were put back" in done.out
        again = uringmig("repair", "--qmp", machine.qmp_path)
        assert again.out.startswith("nothing was left changed")
    else:
        result = save_outside(machine.monitor, tmp_path / "next.mig")
        assert any("were put back" in note for note in result.notes)
    assert kept(machine) == before


def test_others_settings_that_spoil_images_are_told(
    start_machine: StartMachine, tmp_path: Path
) -> None:
    """x-ignore-shared without a note of ours may be wanted: it is named, with the cure."""
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    machine.monitor.set_capabilities(**{"x-ignore-shared": True})
    result = save_outside(machine.monitor, tmp_path / "vm.mig")
    [note] = result.notes
    assert "x-ignore-shared" in note
    assert "migrate-set-capabilities" in note
    assert machine.monitor.capabilities()["x-ignore-shared"]
