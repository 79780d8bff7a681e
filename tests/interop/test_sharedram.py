"""A VM with shared RAM saved by `save_shared`: restored by stock QEMU, or left as it was found."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagereader import read_image
from realguest import StartMachine, assert_goes_on, save_by_qemu, shared_path

from uringmig.errors import PeerError, StorageError
from uringmig.memory.mapping import FileMemory
from uringmig.progress import Snapshot
from uringmig.qemu import sharedram
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.restore import load_into
from uringmig.qemu.sharedram import save_shared
from uringmig.qemu.vmsave import Then
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

LIVE_BYTES = 512 * MiB
SMALL_BYTES = 64 * MiB


def settings(machine: Machine) -> tuple[dict[str, bool], dict[str, Any]]:
    return machine.monitor.capabilities(), machine.monitor.parameters()


def assert_nothing_left(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == []


@pytest.fixture(scope="module")
def live(
    guest: GuestImage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, str]]:
    """One booted guest of 512 MiB for all tests here, and its digest."""
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=LIVE_BYTES,
        shared=shared_path(),
        guest=guest,
        fill_bytes=96 * MiB,
    ) as machine:
        yield machine, machine.console.wait_until_ready()


def test_stock_qemu_restores_it_four_ways(
    live: tuple[Machine, str], guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Saved while running: the digest is the same, the counter goes on, here and there."""
    machine, digest = live
    count = machine.console.count()
    out = tmp_path / "vm.mig"
    result = save_shared(machine.monitor, out)
    assert (result.state_before, result.state_after) == ("running", "running")
    assert result.blocks_mapped == ("pc.ram",)
    assert result.notes == ()
    assert_goes_on(machine)
    assert machine.console.digest() == digest
    ways: list[dict[str, Any] | None] = [
        {"multifd": False},
        {"multifd": True},
        {"multifd": True, "direct-io": True},
        None,
    ]
    for way in ways:
        waiting = start_machine(
            memory_bytes=LIVE_BYTES, shared=shared_path(), guest=guest, incoming=True
        )
        if way is None:
            load_into(waiting.monitor, out, channels=2, direct="required")
        else:
            waiting.monitor.set_capabilities(**{"mapped-ram": True, "multifd": way["multifd"]})
            waiting.monitor.set_parameters(**{"direct-io": way.get("direct-io", False)})
            waiting.monitor.execute("migrate-incoming", uri=f"file:{out}")
            assert waiting.monitor.wait_for_migration(timeout_s=300).status == "completed"
        if waiting.monitor.run_state() != "running":
            waiting.monitor.execute("cont")
        assert waiting.console.digest() == digest, way
        first = waiting.console.count()
        assert first >= count, way
        waiting.console.wait_for(rf"^UM count={first + 1}$")
        waiting.close()


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
        result = save_shared(machine.monitor, tmp_path / "vm.mig", then=then)
        expected = {None: found, "cont": "running", "leave": "postmigrate"}[then]
        assert result.state_before == found
        assert result.state_after == machine.monitor.run_state() == expected
        assert result.notes == ()
        assert settings(machine) == before
        machine.monitor.execute("cont" if running else "stop")
        if then == "leave":
            machine.monitor.execute("cont")
            if not running:
                machine.monitor.execute("stop")
    machine.monitor.execute("cont")
    assert_goes_on(machine)


@pytest.mark.parametrize("phase", ["write", "bitmaps", "devices", "sync"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_save_leaves_the_guest_as_it_was(
    live: tuple[Machine, str], tmp_path: Path, phase: str, error: type[BaseException]
) -> None:
    machine, _ = live
    before, out = settings(machine), tmp_path / "vm.mig"

    def interrupt(snapshot: Snapshot) -> None:
        if snapshot.phase == phase:
            raise error

    with pytest.raises(error):
        save_shared(machine.monitor, out, progress=interrupt)
    assert_nothing_left(out)
    assert settings(machine) == before
    assert machine.monitor.run_state() == "running"
    assert_goes_on(machine)


def test_no_folder_to_save_to(live: tuple[Machine, str], tmp_path: Path) -> None:
    machine, _ = live
    before = settings(machine)
    with pytest.raises(StorageError):
        save_shared(machine.monitor, tmp_path / "none" / "vm.mig")
    assert settings(machine) == before
    assert machine.monitor.run_state() == "running"
    assert_goes_on(machine)


def test_another_client_cancels(live: tuple[Machine, str], tmp_path: Path) -> None:
    """The guest runs again while its memory is read: such an image must not get its name."""
    machine, _ = live
    before, out = settings(machine), tmp_path / "vm.mig"
    done: list[object] = []

    def cancel(snapshot: Snapshot) -> None:
        if snapshot.phase == "write" and not done:
            done.append(machine.monitor.execute("migrate_cancel"))
            machine.monitor.wait_for_migration(timeout_s=60)

    with pytest.raises(PeerError, match="before the memory was read"):
        save_shared(machine.monitor, out, progress=cancel)
    assert_nothing_left(out)
    assert settings(machine) == before
    assert_goes_on(machine)


def test_qemu_dies_during_the_save(start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path())
    out = tmp_path / "vm.mig"
    with pytest.raises(PeerError, match="went away"):
        save_shared(machine.monitor, out, progress=lambda _: machine.kill())
    assert_nothing_left(out)


def test_settings_that_are_not_taken_back_leave_the_guest_as_asked(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is done, with a warning; the guest does not stand still for that."""
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path())

    def refuse(*_: object) -> None:
        raise PeerError("not taken back")

    monkeypatch.setattr(machine.monitor, "_put_back", refuse)
    result = save_shared(machine.monitor, tmp_path / "vm.mig", then="cont")
    assert result.state_after == machine.monitor.run_state() == "running"
    [note] = result.notes
    assert "durable, but: not taken back" in note


def test_guest_that_went_on_is_not_quit(start_machine: StartMachine, tmp_path: Path) -> None:
    """Another client cancels when the memory is read: the image is whole, the guest runs on."""
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path())

    def cancel(snapshot: Snapshot) -> None:
        if snapshot.phase == "sync":
            machine.monitor.execute("migrate_cancel")
            machine.monitor.wait_for_migration(timeout_s=60)

    with Monitor(machine.qmp_path) as monitor:
        result = save_shared(monitor, tmp_path / "vm.mig", then="quit", progress=cancel)
    assert result.state_after == machine.monitor.run_state() == "running"
    assert any("not quit" in note for note in result.notes)
    assert machine.process.poll() is None


def test_qemu_that_does_not_end_its_migration_is_told_to_cancel(
    start_machine: StartMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES)
    told: list[str] = []

    def never(**_: object) -> None:
        raise PeerError("the migration did not end")

    monkeypatch.setattr(machine.monitor, "wait_for_migration", never)
    monkeypatch.setattr(machine.monitor, "execute", told.append)
    ours, theirs = socket.socketpair()
    with theirs:
        sharedram._take_back(machine.monitor, ours)
    assert told == ["migrate_cancel"]


def test_another_clients_migration_is_left_alone(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins after we looked: QEMU refuses ours, and we neither wait for it nor cancel it."""
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path())
    configure = sharedram._configure

    def late(monitor: Monitor) -> None:
        machine.monitor.set_parameters(**{"max-bandwidth": 1})
        machine.monitor.execute("migrate", uri=f"file:{tmp_path / 'slow'}")
        configure(monitor)

    monkeypatch.setattr(sharedram, "_configure", late)
    monkeypatch.setattr(sharedram, "_ENDING_SECONDS", 0.2)
    with Monitor(machine.qmp_path) as monitor, pytest.raises(PeerError, match="refused"):
        save_shared(monitor, tmp_path / "vm.mig")
    while (status := machine.monitor.migration().status) == "setup":
        time.sleep(0.01)
    assert status == "active"
    machine.monitor.execute("migrate_cancel")
    machine.monitor.wait_for_migration(timeout_s=60)


def test_quit_ends_qemu(start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path(), paused=True)
    result = save_shared(machine.monitor, tmp_path / "vm.mig", then="quit")
    assert (result.state_before, result.state_after) == ("prelaunch", None)
    assert machine.process.wait(timeout=60) == 0


def test_settings_an_operator_left(start_machine: StartMachine, tmp_path: Path) -> None:
    """Whatever migration was prepared, the stream is plain, and the settings come back."""
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path(), paused=True)
    machine.monitor.set_parameters(mode="cpr-reboot")
    for names in (["postcopy-ram", "postcopy-preempt"], ["mapped-ram", "multifd", "release-ram"]):
        machine.monitor.set_capabilities(**dict.fromkeys(names, True))
        before = settings(machine)
        save_shared(machine.monitor, tmp_path / "vm.mig")
        assert settings(machine) == before
        machine.monitor.set_capabilities(**dict.fromkeys(names, False))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (None, "memory-backend-ram"),
        ("memory-backend-memfd,share=on", "memory-backend-memfd"),
        ("memory-backend-file,mem-path={file},share=off", "not shared"),
        ("memory-backend-file,mem-path={folder},share=on", "folder"),
    ],
)
def test_memory_that_is_not_a_shared_file(
    start_machine: StartMachine, tmp_path: Path, backend: str | None, words: str
) -> None:
    """One clear line, and nothing changed."""
    arguments = []
    if backend is not None:
        place = backend.format(file=tmp_path / "ram", folder=tmp_path)
        arguments = ["-object", f"{place},id=other,size=64M", "-machine", "memory-backend=other"]
    machine = start_machine(memory_bytes=SMALL_BYTES, paused=True, arguments=arguments)
    before, out = settings(machine), tmp_path / "vm.mig"
    with pytest.raises(PeerError, match=words) as caught:
        save_shared(machine.monitor, out)
    assert "\n" not in str(caught.value)
    assert (settings(machine), machine.monitor.migration().status) == (before, "none")
    assert_nothing_left(out)


def test_file_replaced_since(start_machine: StartMachine, tmp_path: Path) -> None:
    ram = shared_path()
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=ram, paused=True)
    ram.unlink()
    with pytest.raises(PeerError, match="has been removed"):
        save_shared(machine.monitor, tmp_path / "vm.mig")
    with ram.open("xb") as file:
        file.truncate(SMALL_BYTES)
    with pytest.raises(PeerError, match="replaced"):
        save_shared(machine.monitor, tmp_path / "vm.mig")


def test_states_that_cannot_be_saved(start_machine: StartMachine, tmp_path: Path) -> None:
    waiting = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path(), incoming=True)
    with pytest.raises(PeerError, match="'inmigrate'"):
        save_shared(waiting.monitor, tmp_path / "vm.mig")
    left = start_machine(memory_bytes=SMALL_BYTES, shared=shared_path(), paused=True)
    save_shared(left.monitor, tmp_path / "vm.mig", then="leave")
    with pytest.raises(PeerError, match="'postmigrate'"):
        save_shared(left.monitor, tmp_path / "vm.mig")


def test_page_for_page_as_qemu_saves_it(start_machine: StartMachine, tmp_path: Path) -> None:
    """Two shared blocks and a private video RAM; the oracle reads both files."""
    main, second = shared_path(), shared_path()
    dimm = f"memory-backend-file,id=dimm0,size=128M,mem-path={second},share=on"
    try:
        machine = start_machine(
            memory_bytes=SMALL_BYTES,
            shared=main,
            paused=True,
            arguments=[
                *["-m", "64M,slots=2,maxmem=1G", "-object", dimm],
                *["-device", "pc-dimm,memdev=dimm0", "-vga", "std"],
            ],
        )
        for seed, (path, length) in enumerate([(main, SMALL_BYTES), (second, 128 * MiB)]):
            memory = FileMemory(path, writable=True)
            memory.view[: 3 * MiB] = np.random.default_rng(seed).integers(0, 256, 3 * MiB, np.uint8)
            memory.view[length - 1] = 1
            memory.close()
        ours, theirs = tmp_path / "ours.mig", tmp_path / "theirs.mig"
        result = save_shared(machine.monitor, ours)
        assert set(result.blocks_mapped) == {"pc.ram", "dimm0"}
        save_by_qemu(machine, theirs, multifd=False, direct=False)
    finally:
        second.unlink(missing_ok=True)
    mine, qemus = read_image(ours), read_image(theirs)
    assert mine.capabilities == ("mapped-ram",)
    assert list(mine.contents) == list(qemus.contents)
    differing = [name for name in mine.contents if mine.contents[name] != qemus.contents[name]]
    assert differing == []
    for block in mine.blocks:
        if block.used_length <= 8 * MiB:
            assert len(block.bits) == block.used_length // 4096, block.idstr
