"""Disks of real guests: made with a file system on it, written to by the guest, looked at."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realguest import GUEST_BYTES

from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

DISK_BYTES = 32 * MiB


def qemu_img(*arguments: object) -> str:
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_disk(path: Path, form: str = "qcow2") -> Path:
    """A disk with an empty ext4 on it."""
    plain = path.with_suffix(".plain")
    plain.write_bytes(bytes(DISK_BYTES))
    subprocess.run(["mkfs.ext4", "-q", "-F", plain], check=True)
    qemu_img("convert", "-O", form, plain, path)
    plain.unlink()
    return path


def snapshots_of(path: Path) -> list[str]:
    """Names of a file's internal snapshots; QEMU may have it open."""
    said = json.loads(qemu_img("info", "-U", "--output=json", path))
    return [each["name"] for each in said.get("snapshots", [])]


def chain(machine: Machine) -> tuple[Any, ...]:
    """What is behind each of the machine's devices, and the nodes that there are."""
    return (
        [
            (one.get("qdev"), one["inserted"]["node-name"], one["inserted"]["file"])
            for one in machine.monitor.execute("query-block")
            if "inserted" in one
        ],
        {one["node-name"] for one in machine.monitor.execute("query-named-block-nodes", flat=True)},
        machine.monitor.execute("query-jobs"),
        machine.monitor.descriptors(),
    )


@contextmanager
def machine_with(
    folder: Path, guest: GuestImage, *disks: Path, form: str = "qcow2", **more: Any
) -> Iterator[Machine]:
    """A machine whose guest has these disks, from /dev/vda on; ``-drive`` of one format."""
    drives = [
        word
        for number, disk in enumerate(disks)
        for word in (
            *["-drive", f"file={disk},if=none,id=disk{number},format={form}"],
            *["-device", f"virtio-blk-pci,drive=disk{number},id=dev{number}"],
        )
    ]
    with Machine(
        folder, memory_bytes=GUEST_BYTES, backend="", guest=guest, fill_bytes=8 * MiB,
        drivers=["virtio_blk"],
        arguments=[*drives, *more.pop("arguments", [])], **more,
    ) as machine:  # fmt: skip
        yield machine


def mount(machine: Machine) -> None:
    machine.console.wait_until_ready()
    assert machine.console.run("mkdir /d && mount -t ext4 /dev/vda /d") == 0


def write(machine: Machine, name: str) -> None:
    """The guest writes a file, and all the way to its disk."""
    assert machine.console.run(f"echo {name} >/d/{name} && sync") == 0


def has(machine: Machine, name: str) -> bool:
    """Whether the guest finds a file with what it wrote on its disk, not in its memory."""
    assert machine.console.run("sync; echo 3 >/proc/sys/vm/drop_caches") == 0
    return machine.console.run(f'[ "$(cat /d/{name})" = {name} ]') == 0


def assert_sound(machine: Machine, disk: Path) -> None:
    """The guest goes on writing, and its file system is without a fault."""
    write(machine, "later")
    assert machine.console.run("umount /d && mount -t ext4 /dev/vda /d") == 0
    assert has(machine, "later")
    assert machine.console.run("umount /d") == 0
    machine.monitor.execute("quit")
    machine.process.wait()
    plain = disk.with_suffix(".checked")
    qemu_img("convert", "-O", "raw", disk, plain)
    done = subprocess.run(["e2fsck", "-fn", plain], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    plain.unlink()
