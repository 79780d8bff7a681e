"""Archive jobs keep the disks of a running VM as saves do, or say that they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batchjobs import check_archive, job, job_ends, run_jobs, write_jobs
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

from uringmig.archive.directory import Archive
from uringmig.batch.attempt import carry_out
from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Attempt
from uringmig.errors import BytesError
from uringmig.image import manifest
from uringmig.image.guestfacts import GuestDisk
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB
from uringmig.verify import verify

DEFAULTS = 'entry = "{name}"\nretries = 0'


def disks_of(archive: Path, name: str) -> list[GuestDisk]:
    with Archive.open(archive, write=False) as opened:
        entry = opened.find(name)
    text = Path(entry.manifest).read_bytes()
    said = (manifest.decode_cold if entry.tier == "cold" else manifest.decode)(text)
    assert said.guest
    return said.guest.disks or []


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_a_snapshot_belongs_to_an_entry(
    tier: str, guest: GuestImage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What was written before the run is there after the restore, what was written after is not."""
    disk = make_disk(tmp_path / "d.qcow2")
    with machine_with(tmp_path_factory.mktemp("m"), guest, disk) as machine:
        mount(machine)
        write(machine, "before")
        source = f"qmp = '{machine.qmp_path}'"
        one = job("a", source, tier=tier, level=1, disks="internal", verify=True)
        done = run_jobs(write_jobs(tmp_path, one, defaults=DEFAULTS))
        assert done.code == 0, done.err
        assert machine.monitor.descriptors() == []
        write(machine, "after")
        machine.console.run("umount /d")
        machine.monitor.execute("quit")
        machine.process.wait()
    [told] = disks_of(tmp_path / "archive", "a")
    assert snapshots_of(disk) == [told.snapshot]
    folder = tmp_path_factory.mktemp("m")
    with machine_with(folder, guest, disk, incoming=True) as machine:
        restore = ["archive", "restore", tmp_path / "archive", "a", "--qmp", machine.qmp_path]
        done = uringmig(*restore, "--then", "cont")
        assert (done.code, "qemu-img snapshot -a" in done.err) == (3, True)
        assert machine.monitor.run_state() == "inmigrate"
    qemu_img("snapshot", "-a", told.snapshot, disk)
    with machine_with(folder / "2", guest, disk, incoming=True) as machine:
        restore[-1] = machine.qmp_path
        done = uringmig(*restore, "--then", "cont")
        assert done.code == 0, done.err
        assert has(machine, "before")
        assert not has(machine, "after")
        assert_sound(machine, disk)


@pytest.fixture
def machine(start_machine: StartMachine, tmp_path: Path) -> Machine:
    disk = tmp_path / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, MiB)
    arguments = ["-drive", f"file={disk},if=virtio,format=qcow2"]
    return start_machine(memory_bytes=16 * MiB, backend="", arguments=arguments)


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_overlays_belong_to_an_entry(tier: str, machine: Machine, tmp_path: Path) -> None:
    """And are told in the job's notes, since the guest's disk is another file from now on."""
    (tmp_path / "over").mkdir()
    one = job("a", f"qmp = '{machine.qmp_path}'", tier=tier, level=1)
    one += f"disks = {{ external = '{tmp_path / 'over'}' }}\n"
    done = run_jobs(write_jobs(tmp_path, one, defaults=DEFAULTS))
    assert done.code == 0, done.err
    [overlay] = (tmp_path / "over").iterdir()
    [told] = disks_of(tmp_path / "archive", "a")
    assert (told.kept, told.overlay) == ("external", str(overlay))
    [note] = job_ends(done)["a"]["archived"]["notes"]
    assert f"{overlay}: start it from there" in note
    check_archive(tmp_path / "archive")


def test_disks_that_go_on_are_told(machine: Machine, tmp_path: Path) -> None:
    """In the job's notes, and only of a guest that goes on."""
    one = job("a", f"qmp = '{machine.qmp_path}'")
    done = run_jobs(write_jobs(tmp_path, one, defaults=DEFAULTS))
    assert done.code == 0, done.err
    [note] = job_ends(done)["a"]["archived"]["notes"]
    assert f"virtio0 ({tmp_path / 'd.qcow2'})" in note
    assert [one.kept for one in disks_of(tmp_path / "archive", "a")] == ["none"]
    machine.monitor.execute("stop")
    two = job("b", f"qmp = '{machine.qmp_path}'", tier="cold", level=1)
    done = run_jobs(write_jobs(tmp_path, two, defaults=DEFAULTS))
    assert job_ends(done)["b"]["archived"]["notes"] == []


def test_what_cannot_be_kept_fails_the_job_alone(
    start_machine: StartMachine, tmp_path: Path
) -> None:
    """Before its guest is stopped, with the disk's name."""
    disk = tmp_path / "d"
    disk.write_bytes(bytes(MiB))
    machine = start_machine(
        memory_bytes=16 * MiB, backend="",
        arguments=["-drive", f"file={disk},if=virtio,format=raw"],
    )  # fmt: skip
    before = chain(machine)
    source = f"qmp = '{machine.qmp_path}'"
    path = write_jobs(
        tmp_path, job("a", source, disks="internal"), job("b", source), defaults=DEFAULTS
    )
    done = run_jobs(path)
    ends = job_ends(done)
    assert "cannot be kept by --disks internal" in ends["a"]["error"]
    assert ends["b"]["archived"]
    assert chain(machine) == before
    assert set(check_archive(tmp_path / "archive")) == {"b"}


@pytest.mark.parametrize("way", ["internal", "external"])
def test_an_entry_that_differs_when_it_is_read_back(
    way: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed, and what was kept of the disks for it goes with it."""
    over = tmp_path / "over"
    over.mkdir()
    (tmp_path / "archive").mkdir()
    disks = f"{{ external = '{over}' }}" if way == "external" else "'internal'"
    one = job("a", f"qmp = '{machine.qmp_path}'", verify=True) + f"disks = {disks}\n"
    path = write_jobs(tmp_path, one, defaults=DEFAULTS)
    [parsed] = parse_jobs(path.read_text(), path=str(path)).jobs
    image = tmp_path / "archive" / "a.mig"
    order = Attempt(
        key="a", job=parsed, entry="a", image=str(image), journal=f"{image}.journal",
        previous=None, rate=0,
    )  # fmt: skip
    seen = []

    def spoil(name: str, **options: Any) -> Any:
        seen.append(chain(machine)[:2] if way == "external" else snapshots_of(tmp_path / "d.qcow2"))
        with Path(name).open("r+b") as file:
            file.seek(20)
            file.write(b"?")
        return verify(name, **options)

    monkeypatch.setattr("uringmig.batch.attempt.verify", spoil)
    before = chain(machine)
    with pytest.raises(BytesError):
        carry_out(order, lambda _: None)
    assert seen not in ([], [[]], [before[:2]])  # they were kept until then
    assert not image.exists()
    assert chain(machine) == before
    assert snapshots_of(tmp_path / "d.qcow2") == []
    assert list(over.iterdir()) == []
