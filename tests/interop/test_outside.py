"""A VM saved from outside, whatever its RAM: restored by stock QEMU, and left as it was found."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagereader import read_image
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on, shared_path

from uringmig.errors import PeerError, StorageError
from uringmig.progress import Snapshot
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.vmsave import Then
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB
from uringmig.verify import verify

SMALL_BYTES = 64 * MiB
#: Backend, and whether its RAM is mapped or copied.
BACKENDS = {
    "-m alone": ("", "copied"),
    "ram": ("memory-backend-ram", "copied"),
    "ram shared": ("memory-backend-ram,share=on", "mapped"),
    "memfd shared": ("memory-backend-memfd,share=on", "mapped"),
    "memfd private": ("memory-backend-memfd,share=off", "copied"),
    "shm": ("memory-backend-shm,share=on", "mapped"),
    "file shared": ("memory-backend-file,mem-path={file},share=on", "mapped"),
    "file private": ("memory-backend-file,mem-path={file},share=off", "copied"),
    "folder": ("memory-backend-file,mem-path=/dev/shm,share=on", "mapped"),
}


def settings(machine: Machine) -> tuple[dict[str, bool], dict[str, Any], list[Any]]:
    """All that QEMU keeps and that a save might change."""
    monitor = machine.monitor
    return monitor.capabilities(), monitor.parameters(), monitor.descriptors()


def host_bytes(machine: Machine) -> int:
    """Memory of the host that QEMU has: its own pages, and those of its RAM's file."""
    rollup = Path(f"/proc/{machine.process.pid}/smaps_rollup").read_text()
    return 1024 * int(rollup.split("Rss:")[1].split()[0])


def assert_nothing_left(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == []


def load_by_qemu(waiting: Machine, image: Path, **capabilities: bool) -> None:
    """Stock QEMU's own loader, with nothing of ours in it."""
    waiting.monitor.set_capabilities(**{"mapped-ram": True}, **capabilities)
    waiting.monitor.execute("migrate-incoming", uri=f"file:{image}")
    assert waiting.monitor.wait_for_migration(timeout_s=300).status == "completed"


@pytest.fixture(scope="module")
def live(
    guest: GuestImage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, str]]:
    """One booted guest with private RAM for all tests here, and its digest."""
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=GUEST_BYTES,
        backend="",
        guest=guest,
        fill_bytes=FILL_BYTES,
    ) as machine:
        yield machine, machine.console.wait_until_ready()


@pytest.mark.parametrize("name", BACKENDS)
def test_any_ram_is_saved_and_restored(
    name: str, guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    """The digest is the same and the counter goes on, here and there; nothing of QEMU's changes."""
    backend, way = BACKENDS[name]
    file = shared_path()
    try:
        if "{file}" in backend:
            file.touch()
        machine = start_machine(
            memory_bytes=GUEST_BYTES,
            backend=backend.format(file=file),
            guest=guest,
            fill_bytes=FILL_BYTES,
        )
        file.unlink(missing_ok=True)  # the memory is the one that QEMU has mapped, name or not
        digest = machine.console.wait_until_ready()
        before, held, count = settings(machine), host_bytes(machine), machine.console.count()
        out = tmp_path / "vm.mig"
        result = save_outside(machine.monitor, out)
        assert (result.how, result.notes) == ("outside", ())
        assert (result.state_before, result.state_after) == ("running", "running")
        assert "pc.ram" in (result.blocks_mapped if way == "mapped" else result.blocks_copied)
        assert settings(machine) == before
        assert host_bytes(machine) - held < 8 * MiB, "looking at memory allocated some"
        assert_goes_on(machine)
        assert machine.console.digest() == digest
        assert verify(out).mismatches == ()
        waiting = start_machine(memory_bytes=GUEST_BYTES, backend="", guest=guest, incoming=True)
        load_by_qemu(waiting, out, multifd=way == "mapped")
        assert waiting.monitor.run_state() == "running"
        assert waiting.console.digest() == digest
        first = waiting.console.count()
        assert first >= count
        waiting.console.wait_for(rf"^UM count={first + 1}$")
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("then", [None, "cont", "leave"])
def test_what_becomes_of_the_guest(
    live: tuple[Machine, str], tmp_path: Path, then: Then | None, running: bool
) -> None:
    """Settings are as before, and a second save works right after."""
    machine, _ = live
    machine.monitor.execute("cont" if running else "stop")
    before = settings(machine)
    found = "running" if running else "paused"
    for _ in range(2):
        result = save_outside(machine.monitor, tmp_path / "vm.mig", then=then)
        expected = {None: found, "cont": "running", "leave": "paused"}[then]
        assert result.state_before == found
        assert result.state_after == machine.monitor.run_state() == expected
        assert (result.stopped_seconds > 0) == running
        assert result.notes == ()
        assert settings(machine) == before
        machine.monitor.execute("cont" if running else "stop")
    machine.monitor.execute("cont")
    assert_goes_on(machine)


def test_quit_ends_qemu(start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="")
    result = save_outside(machine.monitor, tmp_path / "vm.mig", then="quit")
    assert (result.state_before, result.state_after) == ("running", None)
    assert machine.process.wait(timeout=60) == 0


@pytest.mark.parametrize("phase", ["write", "bitmaps", "devices", "sync"])
@pytest.mark.parametrize("then", [None, "quit"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_save_leaves_the_guest_as_it_was(
    live: tuple[Machine, str],
    tmp_path: Path,
    phase: str,
    then: Then | None,
    error: type[BaseException],
) -> None:
    machine, _ = live
    before, out = settings(machine), tmp_path / "vm.mig"

    def interrupt(snapshot: Snapshot) -> None:
        if snapshot.phase == phase:
            raise error

    with pytest.raises(error):
        save_outside(machine.monitor, out, then=then, progress=interrupt)
    assert_nothing_left(out)
    assert settings(machine) == before
    assert machine.monitor.run_state() == "running"
    assert_goes_on(machine)


def test_the_guest_goes_on_before_the_disk_is_done(
    live: tuple[Machine, str], tmp_path: Path
) -> None:
    """It does not stand still while the file is synced and named."""
    machine, _ = live
    states: dict[str, str] = {}

    def look(snapshot: Snapshot) -> None:
        states.setdefault(snapshot.phase, machine.monitor.run_state())

    with Monitor(machine.qmp_path) as monitor:
        save_outside(monitor, tmp_path / "vm.mig", progress=look)
    assert states["write"] == "paused"
    assert {states[phase] for phase in ("bitmaps", "devices", "sync", "publish")} == {"running"}


def test_no_folder_to_save_to(live: tuple[Machine, str], tmp_path: Path) -> None:
    """What cannot be written at all shows before the guest is stopped."""
    machine, _ = live
    events = machine.monitor.run_events()
    with pytest.raises(StorageError):
        save_outside(machine.monitor, tmp_path / "none" / "vm.mig")
    machine.monitor.run_state()
    assert machine.monitor.run_events() == events


@pytest.mark.parametrize("stopped_again", [True, False])
def test_another_client_lets_the_guest_go_on(
    live: tuple[Machine, str], tmp_path: Path, stopped_again: bool
) -> None:
    """Its memory may be of two moments: such an image gets no name, and the guest stays theirs."""
    machine, _ = live
    before, out = settings(machine), tmp_path / "vm.mig"
    done: list[object] = []

    def meddle(snapshot: Snapshot) -> None:
        if snapshot.phase == "write" and not done:
            done.append(machine.monitor.execute("cont"))
            if stopped_again:
                machine.monitor.execute("stop")

    with (
        Monitor(machine.qmp_path) as monitor,
        pytest.raises(PeerError, match="another client let the guest go on"),
    ):
        save_outside(monitor, out, progress=meddle)
    assert_nothing_left(out)
    assert machine.monitor.run_state() == ("paused" if stopped_again else "running")
    assert settings(machine) == before
    machine.monitor.execute("cont")
    assert_goes_on(machine)


def test_a_paused_guest_that_is_let_go_on(start_machine: StartMachine, tmp_path: Path) -> None:
    """Found stopped, so its events are nobody's of ours: the clock tells."""
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", paused=True)
    done: list[object] = []

    def meddle(snapshot: Snapshot) -> None:
        if snapshot.phase == "write" and not done:
            done.append(machine.monitor.execute("cont"))
            machine.monitor.execute("stop")

    with (
        Monitor(machine.qmp_path) as monitor,
        pytest.raises(PeerError, match="another client let the guest go on"),
    ):
        save_outside(monitor, tmp_path / "vm.mig", progress=meddle)
    assert machine.monitor.run_state() == "paused"


def test_qemu_dies_during_the_save(start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="")
    out = tmp_path / "vm.mig"
    with pytest.raises(PeerError, match=r"went away|ended"):
        save_outside(machine.monitor, out, progress=lambda _: machine.kill())
    assert_nothing_left(out)


def test_two_saves_at_once(live: tuple[Machine, str], tmp_path: Path) -> None:
    """The second is told so, and may try again; the first is not disturbed."""
    machine, _ = live
    refused: list[PeerError] = []

    def second(snapshot: Snapshot) -> None:
        if snapshot.phase == "write" and not refused:
            with pytest.raises(PeerError, match="another save") as caught:
                save_outside(machine.monitor, tmp_path / "second.mig")
            refused.append(caught.value)

    with Monitor(machine.qmp_path) as monitor:
        save_outside(monitor, tmp_path / "first.mig", progress=second)
    assert refused[0].may_pass
    read_image(tmp_path / "first.mig")
    assert machine.monitor.run_state() == "running"


def test_a_device_that_cannot_be_saved(start_machine: StartMachine, tmp_path: Path) -> None:
    """QEMU would die of being asked for its state: it is refused by name, and QEMU lives."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    machine = start_machine(
        memory_bytes=SMALL_BYTES,
        backend="",
        arguments=[
            *["-drive", f"file={disk},if=none,id=d,format=raw"],
            *["-device", "nvme,drive=d,serial=1"],
        ],
    )
    with pytest.raises(PeerError, match="nvme"):
        save_outside(machine.monitor, tmp_path / "vm.mig")
    assert machine.monitor.run_state() == "running"
    assert_nothing_left(tmp_path / "vm.mig")


def test_the_pid_is_that_of_qemu_itself(start_machine: StartMachine, tmp_path: Path) -> None:
    """A manager made the socket and passed it on: its memory is not the guest's."""
    path = tmp_path / "passed"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        os.set_inheritable(listener.fileno(), True)
        # QEMU's parent, this process, has made the socket; SO_PEERCRED would name it.
        machine = start_machine(
            memory_bytes=SMALL_BYTES,
            backend="",
            pass_fds=[listener.fileno()],
            arguments=[
                *["-chardev", f"socket,id=c,fd={listener.fileno()},server=on,wait=off"],
                *["-mon", "chardev=c,mode=control"],
            ],
        )
    with Monitor(path) as monitor:
        assert monitor.peer_pid == machine.process.pid != os.getpid()
        save_outside(monitor, tmp_path / "vm.mig")
    read_image(tmp_path / "vm.mig")
