"""Saves that die: our process by SIGKILL, the disk by ENOSPC, QEMU by falling silent."""

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
from imagereader import read_image
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on, shared_path

from uringmig.errors import PeerError, StorageError
from uringmig.qemu import receiving, sharedram
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.sharedram import save_shared
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.testing.faults import WHOLE, faulty
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

SAVE = """
import sys
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.sharedram import save_shared
print("ready", flush=True)
with Monitor(sys.argv[1]) as monitor:
    save_shared(monitor, sys.argv[2])
"""


@pytest.fixture(scope="module")
def live(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One booted guest for all tests here."""
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=GUEST_BYTES,
        shared=shared_path(),
        guest=guest,
        fill_bytes=FILL_BYTES,
    ) as machine:
        machine.console.wait_until_ready()
        yield machine


def test_killed_at_random_moments(live: Machine, tmp_path: Path) -> None:
    """The guest runs on by itself; the image is absent or whole; the next save mends settings."""
    before = live.monitor.capabilities(), live.monitor.parameters()
    source = random.Random(20261124)
    for number in range(10):
        out = tmp_path / f"{number}.mig"
        command = [sys.executable, "-c", SAVE, str(live.qmp_path), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(source.uniform(0.0, 0.3))
            child.kill()
        live.monitor.wait_for_migration(timeout_s=60)
        while live.monitor.run_state() == "finish-migrate":
            time.sleep(0.01)
        assert live.monitor.run_state() == "running"
        if out.exists():
            read_image(out)
    assert_goes_on(live)
    notes = save_shared(live.monitor, tmp_path / "after.mig").notes
    assert all("were put back" in note for note in notes)
    assert (live.monitor.capabilities(), live.monitor.parameters()) == before
    read_image(tmp_path / "after.mig")


def test_full_disk(live: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of the pages: told with its number, nothing left, the guest goes on."""
    factory = faulty(PwriteEngine, lambda _: [WHOLE] * 5 + [-errno.ENOSPC])
    choice = EngineChoice("faulty", factory)
    monkeypatch.setattr("uringmig.writer.choose_engine", lambda _: choice)
    before = live.monitor.capabilities(), live.monitor.parameters()
    with pytest.raises(StorageError) as caught:
        save_shared(live.monitor, tmp_path / "vm.mig")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert (live.monitor.capabilities(), live.monitor.parameters()) == before
    assert live.monitor.run_state() == "running"
    assert_goes_on(live)


def test_qemu_that_falls_silent(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that is stopped in its stream; once it may go on, it has its guest back."""
    monkeypatch.setattr(receiving, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(sharedram, "_ENDING_SECONDS", 0.2)
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path())
    original = receiving.receive

    def stop_first(*arguments: object, **named: object) -> object:
        os.kill(machine.process.pid, signal.SIGSTOP)
        return original(*arguments, **named)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(sharedram, "receive", stop_first)
    with (
        Monitor(machine.qmp_path, command_timeout_s=0.2) as monitor,
        pytest.raises(PeerError, match=r"silent|before the end|did not answer"),
    ):
        save_shared(monitor, tmp_path / "vm.mig")
    assert list(tmp_path.iterdir()) == []
    os.kill(machine.process.pid, signal.SIGCONT)
    assert machine.monitor.wait_for_migration(timeout_s=60).status in ("failed", "cancelled")
    while machine.monitor.run_state() == "finish-migrate":
        time.sleep(0.01)
    assert machine.monitor.run_state() == "running"
