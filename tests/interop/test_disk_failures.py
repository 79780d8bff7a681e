"""Saves that keep disks and fail, or are killed: all is as it was, and the guest goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import uringmig
from guestdisks import (
    assert_sound,
    chain,
    has,
    machine_with,
    make_disk,
    mount,
    qemu_img,
    snapshots_of,
    write,
)
from realguest import StartMachine

from uringmig.errors import BusyError, StorageError
from uringmig.qemu.diskundo import NOTE
from uringmig.qemu.guardprocess import OF_A_SAVE
from uringmig.qemu.leftovers import heal
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.saving import save_vm
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.mainfile import MainFile
from uringmig.storage.pwrite import PwriteEngine
from uringmig.testing.faults import WHOLE, faulty
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

#: Saves with disks, and kills itself right after the n-th command to QEMU since its note is left.
SAVE = """
import os, signal, sys
from uringmig.qemu import diskundo
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.saving import save_vm
from uringmig.errors import BusyError, StorageError
from uringmig.writer import MappedRamWriter
qmp, out, way, when, fails = sys.argv[1:]
left = None
real = Monitor.execute
def execute(self, command, /, **arguments):
    global left
    answer = real(self, command, **arguments)
    if command == "add-fd" and arguments["opaque"].startswith(diskundo.NOTE):
        left = int(when) if when.isdigit() else -1
    elif left is not None:
        left -= 1
    if left is not None and (left == 0 or when == command):
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
Monitor.execute = execute
if fails == "fails":
    def finish(*_, **__):
        raise StorageError("no more")
    MappedRamWriter.finish = finish
if fails == "published":
    DiskMoment.keep = lambda _: os.kill(os.getpid(), signal.SIGKILL)
try:
    save_vm(qmp, out, disks=way)
except StorageError:
    pass
"""
WAYS = ["internal", "external"]


def text_of(way: str, folder: Path) -> str:
    """The option, with a folder of its own for overlays."""
    folder.mkdir(exist_ok=True)
    return f"external={folder}" if way == "external" else way


def wait_until_running(machine: Machine) -> None:
    while machine.monitor.run_state() != "running":
        time.sleep(0.005)


@pytest.fixture(scope="module")
def live(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A guest with a disk, for all tests here that leave it as it was."""
    disk = make_disk(tmp_path_factory.mktemp("disk") / "d.qcow2")
    with machine_with(tmp_path_factory.mktemp("m"), guest, disk) as machine:
        mount(machine)
        write(machine, "before")
        yield machine


def disk_of(machine: Machine) -> Path:
    return Path(machine.monitor.execute("query-block")[0]["inserted"]["file"])


def assert_as_before(machine: Machine, before: tuple[Any, ...], folder: Path) -> None:
    """No snapshot, no overlay, no job and no note; and the guest reads and writes its disk."""
    assert chain(machine) == before
    assert snapshots_of(disk_of(machine)) == []
    assert list(folder.iterdir()) == []
    assert machine.monitor.run_state() == "running"


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_while_the_guest_stands_still(
    way: str, live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the transaction: overlays that were made ready go again."""
    factory = faulty(PwriteEngine, lambda _: [WHOLE] * 5 + [-errno.ENOSPC])
    monkeypatch.setattr("uringmig.writer.choose_engine", lambda _: EngineChoice("f", factory))
    before = chain(live)
    with pytest.raises(StorageError) as caught:
        save_vm(live.qmp_path, tmp_path / "vm.mig", disks=text_of(way, tmp_path / "o"))
    assert caught.value.errno == errno.ENOSPC
    assert_as_before(live, before, tmp_path / "o")
    write(live, "went_on")
    assert has(live, "went_on")


@pytest.mark.parametrize("way", WAYS)
def test_a_failing_disk_after_the_guest_went_on(
    way: str, live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guest wrote to the overlay meanwhile is in its disk, and the overlay is gone."""
    before = chain(live)

    def sync(file: MainFile) -> None:
        # The guest goes on already; its disk is kept, and it writes to it.
        assert chain(live) != before or snapshots_of(disk_of(live))
        write(live, f"meanwhile_{way}")
        raise StorageError("fdatasync failed", errno=errno.EIO, path=file.path)

    monkeypatch.setattr(MainFile, "sync", sync)
    with pytest.raises(StorageError) as caught:
        save_vm(live.qmp_path, tmp_path / "vm.mig", disks=text_of(way, tmp_path / "o"))
    assert caught.value.errno == errno.EIO
    assert getattr(caught.value, "__notes__", []) == []
    assert_as_before(live, before, tmp_path / "o")
    assert has(live, f"meanwhile_{way}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("healer", ["save", "repair"])
def test_killed_once_the_disks_were_kept(
    way: str, healer: str, live: Machine, tmp_path: Path
) -> None:
    """The guest goes on by its guardian; what it writes is there when all has been undone."""
    before, folder = chain(live), tmp_path / "o"
    kill(live, tmp_path / "vm.mig", text_of(way, folder), "transaction")
    wait_until_running(live)
    kept = [*folder.iterdir()] if way == "external" else snapshots_of(disk_of(live))
    assert len(kept) == 1
    write(live, f"{healer}_{way}")
    if healer == "repair":
        done = uringmig("repair", "--qmp", live.qmp_path)
        assert "a killed save had made were taken back" in done.out
    else:
        done = uringmig("save", "--qmp", live.qmp_path, tmp_path / "next.mig", "--then", "leave")
        assert "a killed save had made were taken back" in done.err
        live.monitor.execute("cont")
    assert done.code == (healer == "save")
    assert_as_before(live, before, folder)
    assert has(live, f"{healer}_{way}")
    assert "nothing was left changed" in uringmig("repair", "--qmp", live.qmp_path).out


def test_the_guests_file_system_is_sound_after_all_that(live: Machine) -> None:
    """The last of this module: it ends the guest."""
    for name in ("before", *(f"meanwhile_{way}" for way in WAYS)):
        assert has(live, name)
    assert_sound(live, disk_of(live))


def kill(machine: Machine, out: Path, way: str, when: int | str, fails: str = "") -> int:
    """Run a save that kills itself; its exit status."""
    command = [sys.executable, "-c", SAVE, machine.qmp_path, out, way, when, fails]
    return subprocess.run(list(map(str, command)), check=False).returncode


def settled(machine: Machine) -> tuple[Any, ...]:
    """The state of a machine once the guardian of a killed save has done its part."""
    while machine.monitor.run_state() != "running" or any(
        opaque in OF_A_SAVE for _, opaque, _ in machine.monitor.descriptors()
    ):
        time.sleep(0.005)
    return chain(machine)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", ["", "fails"])
def test_killed_after_each_command(
    way: str, fails: str, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Whichever was the last that QEMU got, of the save or of its undoing, repair undoes it all."""
    disk, folder = tmp_path / "d.qcow2", tmp_path / "o"
    qemu_img("create", "-q", "-f", "qcow2", disk, MiB)
    arguments = ["-drive", f"file={disk},if=virtio,format=qcow2"]
    machine = start_machine(memory_bytes=8 * MiB, backend="", arguments=arguments)
    before, text = chain(machine), text_of(way, folder)
    when, undone = 1, 0
    while kill(machine, out := tmp_path / f"{when}.mig", text, when, fails):
        notes = settled(machine)[3]
        if out.exists():
            assert notes == []  # that was the last
            break
        undone += any("taken back" in line for line in healed(machine))
        assert_as_before(machine, before, folder)
        assert healed(machine) == ()
        when += 1
    assert undone
    if fails:
        assert_as_before(machine, before, folder)
        assert not out.exists()


def healed(machine: Machine) -> tuple[str, ...]:
    with Monitor(machine.qmp_path) as monitor:
        return heal(monitor)


@pytest.mark.parametrize("way", WAYS)
def test_killed_once_the_image_has_its_name(
    way: str, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Then what was kept of the disks belongs to it, though nobody has said so: it stays."""
    disk, folder, out = tmp_path / "d.qcow2", tmp_path / "o", tmp_path / "vm.mig"
    qemu_img("create", "-q", "-f", "qcow2", disk, MiB)
    arguments = ["-drive", f"file={disk},if=virtio,format=qcow2"]
    machine = start_machine(memory_bytes=8 * MiB, backend="", arguments=arguments)
    assert kill(machine, out, text_of(way, folder), "none", "published")
    found = settled(machine)
    [told] = healed(machine)
    assert f"{out} has its name" in told
    assert chain(machine) == (*found[:3], [])
    assert len(snapshots_of(disk) if way == "internal" else [*folder.iterdir()]) == 1
    assert healed(machine) == ()


def test_nothing_is_touched_while_the_save_lives(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another save, or repair, finds a note whose save goes on though its guest does, too."""
    disk = tmp_path / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, MiB)
    arguments = ["-drive", f"file={disk},if=virtio,format=qcow2"]
    machine = start_machine(memory_bytes=8 * MiB, backend="", arguments=arguments)
    real = MainFile.sync
    seen: list[str] = []

    def sync(file: MainFile) -> None:
        if not seen:
            seen.append(machine.monitor.run_state())
            with pytest.raises(BusyError, match="another save"):
                heal(machine.monitor)
        real(file)

    monkeypatch.setattr(MainFile, "sync", sync)
    save_vm(machine.qmp_path, tmp_path / "vm.mig", disks="internal")
    assert seen == ["running"]
    assert len(snapshots_of(disk)) == 1


def test_a_note_that_is_not_ours_removes_no_file(
    start_machine: StartMachine, tmp_path: Path
) -> None:
    """It comes from QEMU, which a guest may have taken over: names are checked to be ours."""
    victim = tmp_path / "passwd"
    name = "uringmig-20261127T000000Z-01234567"
    second = tmp_path / f"{name}-1.qcow2"  # of a second disk, said to be the first one's
    machine = start_machine(memory_bytes=8 * MiB, backend="")
    for overlay, called in ((victim, name), (victim, "passwd"), (second, name)):
        overlay.touch()
        one = {"node": "n", "file": "f", "overlay": str(overlay), "overlay_node": "o"}
        note = {"kind": "external", "name": called, "out": "/nowhere", "disks": [one]}
        with Path(os.devnull).open() as file:
            machine.monitor.add_descriptor(file.fileno(), f"{NOTE}{json.dumps(note)}")
        assert healed(machine) == ()
        assert overlay.exists()
