"""Saves while QEMU's disks are in use by others than the guest; and QEMUs that see other files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from batchjobs import job, job_ends, run_jobs, write_jobs
from realguest import StartMachine, shared_path

from uringmig.errors import BusyError
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.qemu.sharedram import save_shared
from uringmig.testing.machine import Machine
from uringmig.units import MiB


def back_up(machine: Machine) -> str:
    """A backup that goes on for long."""
    machine.monitor.execute(
        "blockdev-backup", **{"job-id": "nightly", "device": "disk", "target": "copy",
                              "sync": "full", "speed": 1}
    )  # fmt: skip
    return "a backup job (nightly)"


def export(machine: Machine) -> str:
    """A disk that others may write to."""
    path = str(machine.folder / "nbd.sock")
    machine.monitor.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    machine.monitor.execute(
        "block-export-add", **{"type": "nbd", "id": "out", "node-name": "disk", "writable": True}
    )
    return "a nbd export (out)"


@pytest.mark.parametrize("use", [back_up, export])
def test_disks_in_use(
    use: Callable[[Machine], str], start_machine: StartMachine, tmp_path: Path
) -> None:
    """By a migration QEMU cannot give them away: it is said who uses them, and that it may pass.

    From outside nothing is asked of its disks, so a nightly archive runs beside a nightly backup.
    """
    arguments = []
    for name in ("disk", "copy"):
        file = tmp_path / name
        file.write_bytes(bytes(16 * MiB))
        node = f"driver=raw,node-name={name},file.driver=file,file.filename={file}"
        arguments += ["-blockdev", node]
    arguments += ["-device", "virtio-blk-pci,drive=disk,share-rw=on"]
    machine = start_machine(memory_bytes=64 * MiB, shared=shared_path(), arguments=arguments)
    user = use(machine)
    with Monitor(machine.qmp_path) as monitor:
        before = monitor.capabilities(), monitor.parameters()
        with pytest.raises(BusyError) as caught:
            save_shared(monitor, tmp_path / "vm.mig")
        assert str(caught.value).startswith(f"QEMU's disks are in use by {user}: ")
        assert (monitor.capabilities(), monitor.parameters()) == before
        assert save_outside(monitor, tmp_path / "vm.mig").state_after == "running"
    path = write_jobs(tmp_path, job("vm", f"qmp = '{machine.qmp_path}'", retries=0))
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    assert job_ends(ended)["vm"]["archived"]["stopped_seconds"] > 0
    assert machine.monitor.run_state() == "running"
    jobs = machine.monitor.execute("query-block-jobs")
    assert [one["device"] for one in jobs] == (["nightly"] if use is back_up else [])


def test_files_of_another_mount_namespace(
    start_machine: StartMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's path is looked up as QEMU sees it; here another file, and then none, has that name."""
    program = shutil.which("qemu-system-x86_64")
    wrapper = tmp_path / "bin" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    script = f'mount -t tmpfs none /dev/shm && exec {program} "$@"'
    wrapper.write_text(f"#!/bin/sh\nexec unshare -m sh -c '{script}' sh \"$@\"\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    ram = shared_path()
    machine = start_machine(
        memory_bytes=64 * MiB, backend=f"memory-backend-file,mem-path={ram},share=on"
    )
    assert not ram.exists()
    result = save_shared(machine.monitor, tmp_path / "vm.mig")
    assert "pc.ram" in result.blocks_mapped
    ram.write_bytes(bytes(64 * MiB))
    try:
        assert save_shared(machine.monitor, tmp_path / "vm.mig").notes == ()
    finally:
        ram.unlink()
