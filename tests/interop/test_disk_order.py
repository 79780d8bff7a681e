"""The disks are kept while the guest stands still: between its stop and its going on, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from batchjobs import job, write_jobs
from guestdisks import qemu_img
from realguest import StartMachine

from uringmig.batch.attempt import carry_out
from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Attempt
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.saving import save_vm
from uringmig.testing.machine import Machine
from uringmig.units import MiB

#: Commands that matter here, in the order in which they have to come.
ORDER = ["stop", "xen-save-devices-state", "transaction", "xen-save-devices-state", "cont"]


@pytest.fixture
def machine(start_machine: StartMachine, tmp_path: Path) -> Machine:
    disk = tmp_path / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, MiB)
    arguments = ["-drive", f"file={disk},if=virtio,format=qcow2"]
    return start_machine(memory_bytes=16 * MiB, backend="", arguments=arguments)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What QEMU is told, of all that matters here."""
    told: list[str] = []
    real = Monitor.execute

    def execute(self: Monitor, command: str, /, **arguments: object) -> object:
        if command in ORDER:
            told.append(command)
        return real(self, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", execute)
    return told


@pytest.mark.parametrize("live", [False, True])
def test_of_a_save(live: bool, machine: Machine, commands: list[str], tmp_path: Path) -> None:
    """All disks at once, and the guest is asked afterwards whether it stood still."""
    save_vm(machine.qmp_path, tmp_path / "vm.mig", disks="internal", live=live)
    assert commands == ORDER


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_of_an_archive_job(
    tier: str, machine: Machine, commands: list[str], tmp_path: Path
) -> None:
    source = f"qmp = '{machine.qmp_path}'"
    path = write_jobs(tmp_path, job("a", source, tier=tier, level=1, disks="internal"))
    [parsed] = parse_jobs(path.read_text(), path=str(path)).jobs
    (tmp_path / "archive").mkdir()
    image = tmp_path / "archive" / "a.mig"
    order = Attempt(
        key="a", job=parsed, entry="a", image=str(image), journal=f"{image}.journal",
        previous=None, rate=0,
    )  # fmt: skip
    carry_out(order, lambda _: None)
    assert commands == ORDER
