"""The command line against real QEMUs: saves that leave the guest as asked, failures as it was."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commandline import finish, start, uringmig
from realguest import FILL_BYTES, GUEST_BYTES, SavedGuest, StartMachine, shared_path

from uringmig.qemu.monitor import Monitor
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

SMALL_BYTES = 64 * MiB


@pytest.fixture
def busy(start_machine: StartMachine) -> Machine:
    """A running machine whose RAM holds 32 MiB that no image can leave out."""
    shared = shared_path()
    machine = start_machine(memory_bytes=SMALL_BYTES, shared=shared)
    with shared.open("r+b") as file:
        file.seek(16 * MiB)
        file.write(np.random.default_rng(2).bytes(32 * MiB))
    assert machine.monitor.run_state() == "running"
    return machine


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def settings(monitor: Monitor) -> tuple[object, object]:
    return monitor.capabilities(), monitor.parameters()


def test_a_guest_saved_and_loaded_remembers_and_goes_on(
    guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    image = tmp_path / "vm.mig"
    source = start_machine(
        memory_bytes=GUEST_BYTES, shared=shared_path(), guest=guest, fill_bytes=FILL_BYTES
    )
    digest = source.console.wait_until_ready()
    count = source.console.count()
    saved = uringmig("save", "--qmp", source.qmp_path, image, "--then", "quit", "--json")
    assert (saved.code, saved.err) == (0, "")
    result = saved.result()
    assert (result["state_before"], result["state_after"]) == ("running", None)
    assert source.process.wait() == 0
    assert uringmig("verify", image).code == 0
    sections = uringmig("inspect", image, "--json").result()["sections"]
    assert {"timer", "cpu", "fw_cfg"} <= {section["idstr"] for section in sections}

    waiting = start_machine(
        memory_bytes=GUEST_BYTES, shared=shared_path(), guest=guest, incoming=True
    )
    loaded = uringmig("load", image, "--qmp", waiting.qmp_path, "--then", "cont", "--json")
    assert (loaded.code, loaded.err) == (0, "")
    assert loaded.result()["run_state"] == "running"
    assert waiting.console.digest() == digest
    first = waiting.console.count()
    assert first >= count
    waiting.console.wait_for(rf"^UM count={first + 2}$")


@pytest.mark.parametrize(
    ("then", "stopped", "state"),
    [
        ([], False, "running"),
        ([], True, "paused"),
        (["--then", "cont"], True, "running"),
        (["--then", "leave"], False, "paused"),
        (["--then", "leave", "--how", "migrate"], False, "postmigrate"),
    ],
)
def test_the_guest_is_left_as_asked(
    busy: Machine, tmp_path: Path, then: list[str], stopped: bool, state: str
) -> None:
    if stopped:
        busy.monitor.execute("stop")
    before = settings(busy.monitor)
    done = uringmig(
        "save", "--qmp", busy.qmp_path, tmp_path / "o.mig", *then, "--no-manifest", "-v"
    )
    assert (done.code, done.err) == (0, "")
    assert f"is {state}" in done.out
    assert busy.monitor.run_state() == state
    assert settings(busy.monitor) == before
    assert [path.name for path in tmp_path.iterdir()] == ["o.mig"]


def test_a_file_system_that_is_full_is_5_and_the_guest_goes_on(
    busy: Machine, full_folder: Path
) -> None:
    former = full_folder / "o.mig"
    former.write_text("former content")
    before = settings(busy.monitor)
    done = uringmig("save", "--qmp", busy.qmp_path, former, "--json")
    assert done.code == 5
    assert done.result()["errno"] == 28
    assert done.err.count("\n") == 1
    assert former.read_text() == "former content"
    assert [path.name for path in full_folder.iterdir()] == ["o.mig"]
    assert busy.monitor.run_state() == "running"
    assert settings(busy.monitor) == before


def test_a_folder_that_is_not_there_is_5_and_the_guest_goes_on(
    busy: Machine, tmp_path: Path
) -> None:
    done = uringmig("save", "--qmp", busy.qmp_path, tmp_path / "none" / "o.mig")
    assert done.code == 5
    assert busy.monitor.run_state() == "running"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_file_and_the_guest_as_it_was(
    busy: Machine, tmp_path: Path, number: signal.Signals
) -> None:
    before = settings(busy.monitor)
    process = start(
        *["save", "--qmp", busy.qmp_path, tmp_path / "o.mig", "--json"],
        *["--rate", "4M", "--depth", "1", "--block-size", "256K"],
    )
    assert process.stdout is not None
    for line in process.stdout:
        if '"in_flight_bytes"' in line and '"completed_bytes": 0,' not in line:
            break
    process.send_signal(number)
    done = finish(process)
    assert done.code == 128 + number
    assert done.err == f"uringmig: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []
    assert busy.monitor.run_state() == "running"
    assert settings(busy.monitor) == before


def test_private_ram_by_migration_is_4(start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES)
    done = uringmig(
        *["save", "--qmp", machine.qmp_path, tmp_path / "o.mig", "--json", "--how", "migrate"]
    )
    assert done.code == 4
    assert "share" in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert machine.monitor.run_state() == "running"


def test_an_image_of_another_size_is_3_and_one_that_is_loaded_is_4(
    saved_guest: SavedGuest, start_machine: StartMachine
) -> None:
    other = start_machine(memory_bytes=SMALL_BYTES, incoming=True)
    done = uringmig("load", saved_guest.image, "--qmp", other.qmp_path, "--json")
    assert done.code == 3
    assert done.result()["kind"] == "MismatchError"
    right = start_machine(memory_bytes=GUEST_BYTES, guest=saved_guest.guest, incoming=True)
    first = uringmig("load", saved_guest.image, "--qmp", right.qmp_path, "--channels", "0")
    assert (first.code, first.err) == (0, "")
    assert "no multifd" in first.out
    assert uringmig("load", saved_guest.image, "--qmp", right.qmp_path).code == 4
