"""Memory and disks of one moment: what was written before a save is there after the restore."""

from __future__ import annotations

import os
import re
import subprocess
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


def command(page: str, first: str) -> str:
    """The page's one command that begins so."""
    line: str
    [line] = re.findall(rf"^```sh\n({re.escape(first)}.*)\n```$", page, re.MULTILINE)
    return line


def run_as_told(line: str, **variables: object) -> None:
    """Run a command of a page as it stands."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(
        ["bash", "-euc", line], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["internal", "external"])
def test_the_commands_of_the_page_restore_a_guest_saved_live(
    way: str, guest: GuestImage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """docs/operations.md, word for word, after a live save, which has the disks of its second pass.

    The guest writes to its disk all the time; the memory that is restored and the disk agree.
    """
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    disk, image, copy = make_disk(tmp_path / "d.qcow2"), tmp_path / "vm.mig", tmp_path / "copy"
    (tmp_path / "over").mkdir()
    text = f"external={tmp_path / 'over'}" if way == "external" else way
    with machine_with(tmp_path_factory.mktemp("m"), guest, disk) as machine:
        mount(machine)
        write(machine, "before")
        loop = "while echo x >>/d/log && sync; do :; done & writer=$!"
        assert machine.console.run(loop) == 0
        options = ["--disks", text, "--live", "--rate", "16M"]
        done = uringmig("save", "--qmp", machine.qmp_path, image, *options)
        assert done.code == 0, done.err
        assert machine.console.run("kill $writer; wait $writer; true") == 0
        write(machine, "after")
        [told] = disks_of(image)
        if way == "external":
            line = command(page, "qemu-img create")
            run_as_told(line, DISK=told.files[0].path, FORMAT=told.files[0].format, COPY=copy)
        else:
            line = command(page, "qemu-img convert")
            run_as_told(line, DISK=told.files[0].path, SNAPSHOT=told.snapshot, COPY=copy)
        # While the guest that was saved goes on.
        restored(image, copy, guest, tmp_path_factory.mktemp("m"), code=int(way == "internal"))
        assert_sound(machine, Path(told.overlay or disk))
    if way == "internal":
        run_as_told(command(page, "qemu-img snapshot"), DISK=disk, SNAPSHOT=told.snapshot)
        restored(image, disk, guest, tmp_path_factory.mktemp("m"), code=0)


def restored(image: Path, disk: Path, guest: GuestImage, folder: Path, *, code: int) -> None:
    """Load an image with a disk; the guest finds what it wrote before, and no more."""
    with machine_with(folder, guest, disk, incoming=True) as machine:
        done = uringmig("load", image, "--qmp", machine.qmp_path, "--then", "cont")
        assert done.code == code, done.err
        assert machine.console.run("kill $writer; wait $writer; true") == 0
        assert has(machine, "before")
        assert not has(machine, "after")
        assert_sound(machine, disk)
