"""Disks of every kind: kept, or refused by name before the guest is stopped; never half of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from commandline import uringmig
from guestdisks import DISK_BYTES, chain, qemu_img, snapshots_of
from realguest import StartMachine, shared_path

from uringmig.errors import StorageError
from uringmig.image import manifest
from uringmig.image.guestfacts import GuestDisk
from uringmig.qemu.saving import save_vm
from uringmig.storage.mainfile import MainFile
from uringmig.testing.machine import Machine
from uringmig.units import MiB

SMALL_BYTES = 32 * MiB


def plain(path: Path) -> Path:
    path.write_bytes(bytes(MiB))
    return path


def qcow2(path: Path, *options: str) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, DISK_BYTES)
    return path


def drive(path: Path | str, *, form: str = "qcow2", more: str = "") -> list[str]:
    return [
        *["-drive", f"file={path},if=none,id=d,format={form}{more}"],
        *["-device", "virtio-blk-pci,drive=d,id=dev"],
    ]


def node(number: int = 0, **options: object) -> list[str]:
    """The same by -blockdev, which gives nodes names."""
    words = {name.replace("_", "-"): value for name, value in options.items()}
    return [
        *["-blockdev", json.dumps({"node-name": f"node{number}", **words})],
        *["-device", f"virtio-blk-pci,drive=node{number}"],
    ]


def qcow2_node(path: Path, number: int = 0) -> list[str]:
    return node(number, driver="qcow2", file={"driver": "file", "filename": str(path)})


def disks_of(image: Path) -> list[GuestDisk]:
    said = manifest.decode(Path(f"{image}.manifest.json").read_bytes())
    assert said.guest
    return said.guest.disks or []


def refused(machine: Machine, way: str, out: Path, *words: str, code: int = 4) -> None:
    """One line with these words; nothing was stopped, made or changed."""
    before, folder = chain(machine), sorted(out.parent.rglob("*"))
    done = uringmig("save", "--qmp", machine.qmp_path, out, "--disks", way)
    assert done.code == code, done.err
    [line] = done.err.splitlines()
    assert all(word in line for word in words), line
    assert machine.monitor.run_state() == "running"
    assert machine.monitor.run_events() == ()
    assert chain(machine) == before
    assert sorted(out.parent.rglob("*")) == folder


@pytest.fixture
def overlays(tmp_path: Path) -> Path:
    folder = tmp_path / "overlays"
    folder.mkdir()
    return folder


def raw_disk(folder: Path) -> list[str]:
    return drive(plain(folder / "d"), form="raw")


def temporary(folder: Path) -> list[str]:
    return drive(qcow2(folder / "d"), more=",snapshot=on")


def copy_on_read(folder: Path) -> list[str]:
    below = {"driver": "file", "filename": str(qcow2(folder / "d"))}
    return node(driver="copy-on-read", file={"driver": "qcow2", "file": below})


def throttled(folder: Path) -> list[str]:
    below = {"driver": "file", "filename": str(qcow2(folder / "d"))}
    return [
        *["-object", "throttle-group,id=slow,x-iops-total=100"],
        *node(driver="throttle", throttle_group="slow", file={"driver": "qcow2", "file": below}),
    ]


def data_file(folder: Path) -> list[str]:
    return drive(qcow2(folder / "d", "-o", f"data_file={folder / 'data'}"))


def encrypted(folder: Path) -> list[str]:
    path, secret = folder / "d", "secret,id=s,data=geheim"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", "--object", secret, "-f", "qcow2", "-o", options, path, DISK_BYTES)
    below = {"driver": "file", "filename": str(path)}
    key = {"format": "luks", "key-secret": "s"}
    return ["-object", secret, *node(driver="qcow2", encrypt=key, file=below)]


def quorum(folder: Path) -> list[str]:
    children = [
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(qcow2(folder / name))}}
        for name in ("a", "b")
    ]
    return node(driver="quorum", children=children, vote_threshold=2)


def no_file(_: Path) -> list[str]:
    return node(driver="null-co", size=MiB)


def removed(folder: Path) -> list[str]:
    """The test removes the file once QEMU has it open."""
    return drive(qcow2(folder / "removed"))


#: What is refused, by which way, and a word of the reason.
REFUSED = [
    (raw_disk, "internal", "is 'raw'"),
    (temporary, "internal", "snapshot=on"),
    (temporary, "external", "snapshot=on"),
    (copy_on_read, "internal", "'copy-on-read'"),
    (copy_on_read, "external", "'copy-on-read'"),
    (throttled, "internal", "'throttle'"),
    (throttled, "external", "'throttle'"),
    (data_file, "internal", "file of its own"),
    (encrypted, "external", "encrypted"),
    (quorum, "internal", "no file of that name"),
    (quorum, "external", "no file of that name"),
    (no_file, "internal", "no file of that name"),
    (no_file, "external", "no file of that name"),
    (removed, "internal", "no file of that name"),
    (removed, "external", "no file of that name"),
]


@pytest.mark.parametrize(("kind", "way", "reason"), REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(
    kind: Callable[[Path], list[str]],
    way: str,
    reason: str,
    start_machine: StartMachine,
    tmp_path: Path,
    overlays: Path,
) -> None:
    """Also beside a disk that could be kept: it is all of them or none."""
    good = qcow2(tmp_path / "good.qcow2")
    arguments = [*kind(tmp_path), *qcow2_node(good, 7)]
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=arguments)
    (tmp_path / "removed").unlink(missing_ok=True)
    text = f"external={overlays}" if way == "external" else way
    refused(machine, text, tmp_path / "vm.mig", f"cannot be kept by --disks {way}", reason)
    assert snapshots_of(good) == []


def test_a_disk_of_the_network(start_machine: StartMachine, tmp_path: Path, overlays: Path) -> None:
    socket = tmp_path / "nbd.sock"
    server = ["qemu-nbd", "-t", "-k", str(socket), "-f", "raw", str(qcow2(tmp_path / "d"))]
    with subprocess.Popen(server) as nbd:
        try:
            while not socket.exists():
                time.sleep(0.01)
            below = {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}}
            machine = start_machine(
                memory_bytes=SMALL_BYTES, backend="", arguments=node(driver="qcow2", file=below)
            )
            for way in ("internal", f"external={overlays}"):
                refused(machine, way, tmp_path / "vm.mig", "no file of that name")
        finally:
            nbd.terminate()


def test_what_needs_no_keeping(start_machine: StartMachine, tmp_path: Path) -> None:
    """What is read-only, has no medium, is no device's, or is flash; and a VM without any disk."""
    code = Path("/usr/share/seabios/bios-256k.bin")
    machine = start_machine(
        memory_bytes=SMALL_BYTES,
        backend="",
        arguments=[
            *["-drive", f"file={code},if=pflash,unit=0,format=raw,readonly=on"],
            *["-drive", f"file={plain(tmp_path / 'vars')},if=pflash,unit=1,format=raw"],
            *["-drive", f"file={plain(tmp_path / 'cd')},if=none,id=cd,format=raw,readonly=on"],
            *["-device", "ide-cd,drive=cd", "-device", "ide-cd,bus=ide.1"],
            *["-drive", f"file={plain(tmp_path / 'idle')},if=none,id=idle,format=raw"],
        ],
    )
    for way in ("none", "internal", f"external={tmp_path}"):
        done = uringmig("save", "--qmp", machine.qmp_path, tmp_path / "vm.mig", "--disks", way)
        assert (done.code, done.err) == (0, "")
        [flash] = disks_of(tmp_path / "vm.mig")
        assert (flash.kept, flash.files[0].path) == ("image", str(tmp_path / "vars"))
        assert chain(machine)[2:] == ([], [])
    bare = start_machine(memory_bytes=SMALL_BYTES, backend="")
    done = uringmig("save", "--qmp", bare.qmp_path, tmp_path / "bare.mig", "--disks", "internal")
    assert (done.code, done.err) == (0, "")
    assert disks_of(tmp_path / "bare.mig") == []


def test_flash_is_in_the_image(start_machine: StartMachine, tmp_path: Path) -> None:
    """Why it needs no keeping: QEMU writes it to its file when it has loaded the image."""
    code = Path("/usr/share/seabios/bios-256k.bin")
    variables = tmp_path / "vars"

    def flash(content: bytes, *more: str) -> Machine:
        variables.write_bytes(content)
        return start_machine(
            memory_bytes=SMALL_BYTES,
            backend="",
            arguments=[
                *["-drive", f"file={code},if=pflash,unit=0,format=raw,readonly=on"],
                *["-drive", f"file={variables},if=pflash,unit=1,format=raw"],
                *more,
            ],
        )

    was = os.urandom(128 << 10)
    source = flash(was)
    done = uringmig("save", "--qmp", source.qmp_path, tmp_path / "vm.mig", "--then", "quit")
    assert done.code == 0, done.err
    source.process.wait()
    target = flash(bytes(128 << 10), "-incoming", "defer")
    done = uringmig("load", tmp_path / "vm.mig", "--qmp", target.qmp_path, "--then", "cont")
    assert (done.code, done.err) == (0, "")
    assert "kept: in the image" in done.out
    assert variables.read_bytes() == was


def test_disks_of_many_kinds_are_kept_together(
    start_machine: StartMachine, tmp_path: Path, overlays: Path
) -> None:
    """By -drive and by -blockdev, an sd card, a floppy, a disk without a format's node, a chain."""
    back = qcow2(tmp_path / "back.qcow2")
    top = qcow2(tmp_path / "top.qcow2", "-b", "back.qcow2", "-F", "qcow2")
    arguments = [
        *drive(qcow2(tmp_path / "d.qcow2"), more=",cache=none"),
        *qcow2_node(top, 1),
        *["-device", "sdhci-pci"],
        *["-drive", f"file={qcow2(tmp_path / 'sd.qcow2')},if=none,id=sd,format=qcow2"],
        *["-device", "sd-card,drive=sd"],
    ]
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=arguments)
    before = chain(machine)
    done = uringmig(
        "save", "--json", "--qmp", machine.qmp_path, tmp_path / "a.mig", "--disks", "internal"
    )
    assert (done.code, done.err) == (0, "")
    assert chain(machine) == before
    told = {one.name: one for one in disks_of(tmp_path / "a.mig")}
    assert {one.kept for one in told.values()} == {"internal"}
    assert done.result()["disks"] == json.loads(msgspec.json.encode(list(told.values())))
    [name] = {one.snapshot for one in told.values()}
    for disk in ("d", "top", "sd"):
        assert snapshots_of(tmp_path / f"{disk}.qcow2") == [name]
    assert snapshots_of(back) == []
    [chained] = [one for one in told.values() if len(one.files) == 2]
    assert [file.path for file in chained.files] == [str(top), str(back)]
    assert chained.node == "node1"

    done = uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "b.mig", "--disks", f"external={overlays}"
    )
    assert done.code == 0, done.err
    shown = uringmig("inspect", tmp_path / "b.mig").out
    for one in disks_of(tmp_path / "b.mig"):
        assert one.overlay
        said = json.loads(qemu_img("info", "-U", "--output=json", one.overlay))
        assert said["full-backing-filename"] == one.files[0].path
        assert f"beneath {one.overlay}" in shown
        assert one.files[0].path in shown
    # And once more, over the overlays.
    done = uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "c.mig", "--disks", f"external={overlays}"
    )
    assert done.code == 0, done.err
    assert {len(one.files) for one in disks_of(tmp_path / "c.mig")} == {2, 3}
    assert len(list(overlays.iterdir())) == 6
    assert machine.monitor.run_state() == "running"


def test_disks_of_every_bus(
    start_machine: StartMachine, tmp_path: Path, overlays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is found by its device, with a thread of its own too; one of two devices, kept once."""
    names = ("ide", "scsi", "usb", "thread", "shared")
    disks = {name: qcow2(tmp_path / f"{name}.qcow2") for name in names}
    floppy = tmp_path / "floppy"
    floppy.write_bytes(bytes(1440 << 10))
    arguments = [
        *["-object", "iothread,id=io", "-device", "virtio-scsi-pci", "-device", "qemu-xhci"],
        *["-drive", f"file={floppy},if=none,id=fd,format=raw"],
        *["-device", "isa-fdc,id=fdc", "-device", "floppy,drive=fd,bus=fdc.0"],
    ]
    for number, (device, disk) in enumerate(
        [
            ("ide-hd", "ide"),
            ("scsi-hd", "scsi"),
            ("usb-storage", "usb"),
            ("virtio-blk-pci,iothread=io", "thread"),
            ("virtio-blk-pci,share-rw=on", "shared"),
        ]
    ):
        below = {"driver": "file", "filename": str(disks[disk])}
        one = {"node-name": f"n{number}", "driver": "qcow2", "file": below}
        arguments += ["-blockdev", json.dumps(one), "-device", f"{device},drive=n{number}"]
    arguments += ["-device", "virtio-blk-pci,share-rw=on,drive=n4"]
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=arguments)
    refused(machine, "internal", tmp_path / "a.mig", "disk fd", str(floppy), "is 'raw'")
    before = chain(machine)

    def sync(file: MainFile) -> None:
        assert chain(machine) != before
        raise StorageError("no more", path=file.path)

    with monkeypatch.context() as failing:
        failing.setattr(MainFile, "sync", sync)
        with pytest.raises(StorageError) as caught:
            save_vm(machine.qmp_path, tmp_path / "a.mig", disks=f"external={overlays}")
    assert getattr(caught.value, "__notes__", []) == []  # that would say what was not undone
    assert chain(machine) == before
    assert list(overlays.iterdir()) == []

    saved = save_vm(machine.qmp_path, tmp_path / "a.mig", disks=f"external={overlays}")
    assert list(saved.disks) == disks_of(tmp_path / "a.mig")
    assert len(saved.disks) == 7
    assert len({one.overlay for one in saved.disks}) == len(list(overlays.iterdir())) == 6
    assert {one.files[0].path for one in saved.disks} == {*map(str, disks.values()), str(floppy)}

    saved = save_vm(machine.qmp_path, tmp_path / "b.mig", disks="internal")
    [name] = {one.snapshot for one in saved.disks}
    for kept in saved.disks:
        assert snapshots_of(Path(kept.files[0].path)) == [name]
    assert machine.monitor.run_state() == "running"


def test_a_disk_that_qemu_copies_to_as_it_is_read(
    start_machine: StartMachine, tmp_path: Path, overlays: Path
) -> None:
    """QEMU goes on copying beneath the overlay: what is told of the file's time were not true."""
    disk = qcow2(tmp_path / "d.qcow2", "-b", str(qcow2(tmp_path / "b.qcow2")), "-F", "qcow2")
    machine = start_machine(
        memory_bytes=SMALL_BYTES, backend="", arguments=drive(disk, more=",copy-on-read=on")
    )
    done = uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "b.mig", "--disks", f"external={overlays}"
    )
    assert done.code == 0, done.err
    [told] = disks_of(tmp_path / "b.mig")
    assert [file.modified_ns is None for file in told.files] == [True, False]


def test_a_raw_disk_without_a_node_of_its_format(
    start_machine: StartMachine, tmp_path: Path, overlays: Path
) -> None:
    """-blockdev driver=file straight beneath a device; the overlay names it as raw."""
    disk = plain(tmp_path / "d")
    words = node(driver="file", filename=str(disk))
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=words)
    done = uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "b.mig", "--disks", f"external={overlays}"
    )
    assert done.code == 0, done.err
    [overlay] = overlays.iterdir()
    said = json.loads(qemu_img("info", "-U", "--output=json", overlay))
    assert (said["full-backing-filename"], said["backing-filename-format"]) == (str(disk), "raw")


def test_names_relative_to_qemus_folder(
    start_machine: StartMachine, tmp_path: Path, overlays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overlay in another folder names its disk absolutely, and so does the manifest."""
    disk = qcow2(tmp_path / "d.qcow2")
    qcow2(overlays / "d.qcow2")  # what a name relative to the overlay would find
    monkeypatch.chdir(tmp_path)
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=drive("d.qcow2"))
    monkeypatch.chdir("/")
    done = uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "b.mig", "--disks", f"external={overlays}"
    )
    assert done.code == 0, done.err
    [told] = disks_of(tmp_path / "b.mig")
    said = json.loads(qemu_img("info", "-U", "--output=json", told.overlay))
    assert said["backing-filename"] == told.files[0].path == str(disk)


def test_an_overlay_is_for_whom_the_disk_is(
    start_machine: StartMachine, tmp_path: Path, overlays: Path
) -> None:
    """It holds what the guest writes: nobody may read it who may not read the disk."""
    disk = qcow2(tmp_path / "d.qcow2")
    disk.chmod(0o600)
    os.chown(disk, 0, 12345)
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=drive(disk))
    uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "b.mig", "--disks", f"external={overlays}"
    )
    [overlay] = overlays.iterdir()
    assert (overlay.stat().st_mode & 0o777, overlay.stat().st_gid) == (0o600, 12345)


def test_a_folder_that_is_not_there(start_machine: StartMachine, tmp_path: Path) -> None:
    arguments = drive(qcow2(tmp_path / "d.qcow2"))
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=arguments)
    missing = tmp_path / "missing"
    refused(machine, f"external={missing}", tmp_path / "vm.mig", str(missing), code=5)


@pytest.mark.parametrize("text", ["", "all", "external", "external=", "internal=x", "none "])
def test_other_words_are_refused(text: str, start_machine: StartMachine, tmp_path: Path) -> None:
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="")
    refused(machine, text, tmp_path / "vm.mig", "none, internal or external=DIR", code=2)


def test_disks_are_not_kept_where_nothing_would_say_so(
    start_machine: StartMachine, tmp_path: Path
) -> None:
    """Without a manifest nobody knew what the snapshots belong to; a migration cannot keep them."""
    machine = start_machine(
        memory_bytes=SMALL_BYTES, shared=shared_path(), arguments=drive(qcow2(tmp_path / "d"))
    )
    out = tmp_path / "vm.mig"
    command = ["save", "--qmp", machine.qmp_path, out, "--disks", "internal"]
    done = uringmig(*command, "--no-manifest")
    assert (done.code, "manifest" in done.err) == (2, True)
    done = uringmig(*command, "--how", "migrate")
    assert (done.code, "only by a save from outside" in done.err) == (4, True)
    assert snapshots_of(tmp_path / "d") == []
    done = uringmig("save", "--qmp", machine.qmp_path, out, "--how", "migrate")
    assert (done.code, "goes on writing to its disks" in done.err) == (0, True)


def test_a_job_on_the_disks(start_machine: StartMachine, tmp_path: Path) -> None:
    """A mirror or a backup has the disk; this may pass, and says so."""
    disk = qcow2(tmp_path / "d.qcow2")
    machine = start_machine(memory_bytes=SMALL_BYTES, backend="", arguments=drive(disk))
    machine.monitor.execute(
        "drive-mirror", device="d", target=str(tmp_path / "copy"), sync="full", format="raw",
        **{"job-id": "copying"},
    )  # fmt: skip
    done = uringmig("save", "--qmp", machine.qmp_path, tmp_path / "vm.mig", "--disks", "internal")
    assert (done.code, "mirror job" in done.err) == (4, True)
    assert machine.monitor.run_events() == ()
