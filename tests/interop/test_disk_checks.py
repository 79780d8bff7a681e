"""A load refuses disks that it sees not to be those of the image's moment."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import Ended, uringmig
from guestdisks import machine_with, make_disk, mount, qemu_img, write

from uringmig.image import manifest
from uringmig.image.guestfacts import GuestDisk
from uringmig.testing.guestimage import GuestImage


@dataclass
class Saved:
    """An image, the disk that was kept for it, and what the guest wrote to afterwards."""

    image: Path
    disk: Path
    told: GuestDisk
    guest: GuestImage
    folder: Path

    def load(self, disk: Path, folder: Path) -> Ended:
        """Into a QEMU that has this disk."""
        with machine_with(folder, self.guest, disk, incoming=True) as machine:
            done = uringmig("load", self.image, "--qmp", machine.qmp_path)
            if done.code > 1:
                # It may still load, once it has the right disk.
                assert machine.monitor.migration().status == "none"
            return done

    def overlay(self, name: str) -> Path:
        """A new overlay over the disk that was kept."""
        path = self.folder / name
        form = self.told.files[0].format
        qemu_img("create", "-q", "-f", "qcow2", "-b", self.disk, "-F", form, path)
        return path


def save(way: str, guest: GuestImage, folder: Path, machines: Path) -> Saved:
    """A guest that is saved, writes to its disk, and ends."""
    disk, image = make_disk(folder / "d.qcow2"), folder / "vm.mig"
    (folder / "overlays").mkdir()
    with machine_with(machines, guest, disk) as machine:
        mount(machine)
        write(machine, "before")
        way = way.replace("DIR", str(folder / "overlays"))
        done = uringmig("save", "--qmp", machine.qmp_path, image, "--disks", way)
        assert done.code == 0, done.err
        write(machine, "after")
        machine.monitor.execute("quit")
        machine.process.wait()
    said = manifest.decode(Path(f"{image}.manifest.json").read_bytes())
    assert said.guest
    assert said.guest.disks
    return Saved(image, disk, said.guest.disks[0], guest, folder)


@pytest.fixture(scope="module")
def internal(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("internal")
    return save("internal", guest, folder, tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def external(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("external")
    return save("external=DIR", guest, folder, tmp_path_factory.mktemp("m"))


@pytest.fixture
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short folder, for sockets."""
    return tmp_path_factory.mktemp("m")


def right(done: Ended, saved: Saved) -> None:
    assert (done.code, done.err) == (0, "")
    assert f"disk disk0 ({saved.disk}) was kept: " in done.out


def wrong(done: Ended, *words: str) -> None:
    assert done.code == 3, done.out
    [line] = done.err.splitlines()
    assert all(word in line for word in ("disk disk0", *words)), line


def unseen(done: Ended, word: str) -> None:
    """It is loaded, with a warning: somebody may know better."""
    assert done.code == 1, done.err
    [line] = done.err.splitlines()
    assert "is not seen to be that of the image's moment" in line
    assert word in line


def copy_of(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved.disk, tmp_path / "copy.qcow2"))


def test_a_disk_that_went_on_since_its_snapshot(internal: Saved, machines: Path) -> None:
    """The line has the command that mends it."""
    assert internal.told.snapshot
    wrong(internal.load(internal.disk, machines), "qemu-img snapshot -a", internal.told.snapshot)


def test_a_disk_that_was_put_back(internal: Saved, tmp_path: Path, machines: Path) -> None:
    """Wherever it lies: the file itself tells, to the byte."""
    disk = copy_of(internal, tmp_path)
    qemu_img("snapshot", "-a", internal.told.snapshot, disk)
    right(internal.load(disk, machines), internal)


def test_a_disk_that_was_put_back_and_written_to_again(
    internal: Saved, tmp_path: Path, machines: Path
) -> None:
    """One sector is enough."""
    disk = copy_of(internal, tmp_path)
    qemu_img("snapshot", "-a", internal.told.snapshot, disk)
    io_write(disk, offset=4096)
    wrong(internal.load(disk, machines), "was written to since the snapshot")


def test_other_snapshots_do_not_matter(internal: Saved, tmp_path: Path, machines: Path) -> None:
    disk = copy_of(internal, tmp_path)
    qemu_img("snapshot", "-c", "another", disk)
    qemu_img("snapshot", "-a", internal.told.snapshot, disk)
    qemu_img("snapshot", "-c", "third", disk)
    qemu_img("snapshot", "-d", "another", disk)
    right(internal.load(disk, machines), internal)


def test_a_snapshot_that_is_gone(internal: Saved, tmp_path: Path, machines: Path) -> None:
    """In the file that had it this is wrong; of another file nothing is known."""
    kept = tmp_path / "kept"
    shutil.move(internal.disk, kept)
    try:
        shutil.copy(kept, internal.disk)
        qemu_img("snapshot", "-d", internal.told.snapshot, internal.disk)
        wrong(internal.load(internal.disk, machines), "has no snapshot", "any more")
    finally:
        shutil.move(kept, internal.disk)
    copy = tmp_path / "converted.qcow2"
    name = f"snapshot.name={internal.told.snapshot}"
    qemu_img("convert", "-l", name, "-O", "qcow2", internal.disk, copy)
    unseen(internal.load(copy, machines / "2"), "has no snapshot")


def test_an_overlay_over_a_snapshot(internal: Saved, tmp_path: Path, machines: Path) -> None:
    """An empty one adds nothing; one that was written to does."""
    disk = copy_of(internal, tmp_path)
    qemu_img("snapshot", "-a", internal.told.snapshot, disk)
    over = tmp_path / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", over)
    right(internal.load(over, machines), internal)
    io_write(over)
    wrong(internal.load(over, machines / "2"), str(over), "was written to")


def test_the_disk_beneath_the_overlay(external: Saved, machines: Path) -> None:
    """Itself, or beneath a new overlay: either is the disk as it was."""
    right(external.load(external.overlay("new.qcow2"), machines), external)
    right(external.load(external.disk, machines / "2"), external)


def test_the_overlay_that_the_guest_went_on_in(external: Saved, machines: Path) -> None:
    """Nearest at hand for whoever starts the guest anew, and wrong; the line says what is right."""
    assert external.told.overlay
    wrong(
        external.load(Path(external.told.overlay), machines),
        "is where the guest went on",
        f"qemu-img create -f qcow2 -b {external.disk} -F qcow2",
    )


def test_an_overlay_that_was_written_to(external: Saved, machines: Path) -> None:
    over = external.overlay("used.qcow2")
    io_write(over)
    wrong(external.load(over, machines), str(over), "was written to")


def test_a_disk_that_was_written_to_beneath(
    external: Saved, tmp_path: Path, machines: Path
) -> None:
    """As by a guest that was started from it once more."""
    status, kept = external.disk.stat(), shutil.copy(external.disk, tmp_path)
    io_write(external.disk)
    try:
        wrong(external.load(external.overlay("late.qcow2"), machines), "was written to since")
    finally:
        with external.disk.open("r+b") as file:
            file.write(Path(kept).read_bytes())
        os.utime(external.disk, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_another_name_of_the_disk(external: Saved, tmp_path: Path, machines: Path) -> None:
    """It is the file that counts."""
    link = tmp_path / "link"
    link.symlink_to(external.disk)
    right(external.load(link, machines), external)


def test_a_file_put_in_the_disks_place(external: Saved, tmp_path: Path, machines: Path) -> None:
    """As from a backup: it may be the same, and may not."""
    kept = tmp_path / "kept"
    shutil.move(external.disk, kept)
    try:
        shutil.copy(kept, external.disk)
        unseen(external.load(external.disk, machines), "is not the file that it was")
    finally:
        shutil.move(kept, external.disk)


def test_what_is_behind_a_disk_was_written_to(
    guest: GuestImage, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A snapshot has only what is in its own file; also the rest is to be as it was."""
    back = make_disk(tmp_path / "back.qcow2")
    disk, image = tmp_path / "d.qcow2", tmp_path / "vm.mig"
    qemu_img("create", "-q", "-f", "qcow2", "-b", back, "-F", "qcow2", disk)
    with machine_with(tmp_path_factory.mktemp("m"), guest, disk) as machine:
        mount(machine)
        done = uringmig(
            "save", "--qmp", machine.qmp_path, image, "--disks", "internal", "--then", "quit"
        )
        assert done.code == 0, done.err
        machine.process.wait()
    said = manifest.decode(Path(f"{image}.manifest.json").read_bytes())
    assert said.guest
    assert said.guest.disks
    saved = Saved(image, disk, said.guest.disks[0], guest, tmp_path)
    right(saved.load(disk, tmp_path_factory.mktemp("m")), saved)
    io_write(back)
    wrong(saved.load(disk, tmp_path_factory.mktemp("m")), str(back), "was written to since")


def test_a_copy_elsewhere(external: Saved, tmp_path: Path, machines: Path) -> None:
    unseen(external.load(copy_of(external, tmp_path), machines), "is not among its files")


def test_a_disk_of_another_size(external: Saved, tmp_path: Path, machines: Path) -> None:
    disk = copy_of(external, tmp_path)
    qemu_img("resize", "-q", disk, "+1M")
    wrong(external.load(disk, machines), "another size")


def test_an_image_without_its_manifest_is_loaded(
    external: Saved, tmp_path: Path, machines: Path
) -> None:
    """Whoever knows better than the checks takes the manifest away."""
    image = Path(shutil.copy(external.image, tmp_path))
    saved = Saved(image, external.disk, external.told, external.guest, external.folder)
    assert external.told.overlay
    done = saved.load(Path(external.told.overlay), machines)
    assert (done.code, done.err) == (0, "")


def io_write(disk: Path, *, offset: int = 0) -> None:
    """Write a sector of a disk, as a guest does."""
    done = subprocess.run(
        ["qemu-io", "-c", f"write -P 0x5a {offset} 512", str(disk)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
