"""Memory and disks of one moment: what was written before a save is there after the restore."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import uringmig
from guestdisks import (
    assert_sound,
    has,
    machine_with,
    make_disk,
    mount,
    qemu_img,
    snapshots_of,
    write,
)

from uringmig.image import manifest
from uringmig.image.guestfacts import GuestDisk
from uringmig.testing.guestimage import GuestImage


def disks_of(image: Path) -> list[GuestDisk]:
    said = manifest.decode(Path(f"{image}.manifest.json").read_bytes())
    assert said.guest
    assert said.guest.disks
    return said.guest.disks


def test_an_internal_snapshot_is_of_the_memorys_moment(
    guest: GuestImage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A guest that went on is restored with its disk as it was: before is there, after is not."""
    disk, image = make_disk(tmp_path / "d.qcow2"), tmp_path / "vm.mig"
    with machine_with(tmp_path_factory.mktemp("m"), guest, disk) as machine:
        mount(machine)
        write(machine, "before")
        done = uringmig("save", "--qmp", machine.qmp_path, image, "--disks", "internal")
        assert (done.code, done.err) == (0, "")
        write(machine, "after")
        assert machine.monitor.descriptors() == []
        machine.console.run("umount /d")
        machine.monitor.execute("quit")
        machine.process.wait()
    [told] = disks_of(image)
    assert snapshots_of(disk) == [told.snapshot]
    assert (told.kept, told.snapshot_id, told.name) == ("internal", "1", "disk0")
    assert (told.files[0].path, told.files[0].format) == (str(disk), "qcow2")
    qemu_img("snapshot", "-a", told.snapshot, disk)
    folder = tmp_path_factory.mktemp("m")
    with machine_with(folder, guest, disk, incoming=True) as machine:
        done = uringmig("load", image, "--qmp", machine.qmp_path, "--then", "cont")
        assert (done.code, done.err) == (0, "")
        assert has(machine, "before")
        assert not has(machine, "after")
        assert_sound(machine, disk)


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_an_overlay_is_put_over_the_disk_of_the_memorys_moment(
    form: str,
    guest: GuestImage,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The guest goes on in the overlay; beneath it the disk stays as it was, for restores."""
    disk, image = make_disk(tmp_path / f"d.{form}", form), tmp_path / "vm.mig"
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    first = tmp_path_factory.mktemp("m")
    with machine_with(first, guest, disk, form=form) as machine:
        mount(machine)
        write(machine, "before")
        way = f"external={overlays}"
        done = uringmig("save", "--qmp", machine.qmp_path, image, "--disks", way)
        assert done.code == 0, done.err
        [overlay] = overlays.iterdir()
        assert f"{overlay}: start it from there" in done.err
        write(machine, "after")
        [told] = disks_of(image)
        assert (told.kept, told.overlay, told.files[0].format) == ("external", str(overlay), form)
        # The guest that was saved goes on meanwhile: each writes to an overlay of its own.
        mine = tmp_path / "mine.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", told.files[0].path, "-F", form, mine)
        folder = tmp_path_factory.mktemp("m")
        with machine_with(folder, guest, mine, incoming=True) as restored:
            done = uringmig("load", image, "--qmp", restored.qmp_path, "--then", "cont")
            assert (done.code, done.err) == (0, "")
            assert has(restored, "before")
            assert not has(restored, "after")
            assert_sound(restored, mine)
        assert has(machine, "before")
        assert has(machine, "after")
        assert_sound(machine, overlay)


def test_disks_that_go_on_are_told(
    guest: GuestImage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Not kept and written to by a guest that goes on: one plain line, and no fault; else none."""
    disk = make_disk(tmp_path / "d.qcow2")
    with machine_with(tmp_path_factory.mktemp("m"), guest, disk) as machine:
        mount(machine)
        done = uringmig("save", "--json", "--qmp", machine.qmp_path, tmp_path / "a.mig")
        assert done.code == 0
        [line] = done.err.splitlines()
        assert f"disk0 ({disk})" in line
        assert "damages its file systems" in line
        assert [line] == [f"uringmig: note: {note}" for note in done.result()["notes"]]
        assert disks_of(tmp_path / "a.mig")[0].kept == "none"
        for then in ("leave", "quit"):
            done = uringmig("save", "--qmp", machine.qmp_path, tmp_path / "b.mig", "--then", then)
            assert (done.code, done.err) == (0, "")
