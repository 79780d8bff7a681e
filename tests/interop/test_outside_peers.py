"""Devices that have their work done by others, and devices that QEMU refuses to save."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from imagereader import read_image
from machinestates import assert_qemu_loads
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on

from uringmig.errors import PeerError
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB


def exported_disk(start_machine: StartMachine, folder: Path, name: str) -> Path:
    """A disk that another QEMU serves by vhost-user: the socket. That one maps the guest's RAM."""
    disk, socket = folder / f"{name}.disk", folder / f"{name}.sock"
    disk.write_bytes(bytes(16 * MiB))
    server = start_machine(
        memory_bytes=16 * MiB,
        paused=True,
        arguments=["-blockdev", f"driver=file,node-name=d,filename={disk}"],
    )
    server.monitor.execute(
        "block-export-add",
        **{"type": "vhost-user-blk", "id": "e", "node-name": "d", "writable": True},
        addr={"type": "unix", "path": str(socket)},
    )
    return socket


def test_vhost_user(guest: GuestImage, start_machine: StartMachine, tmp_path: Path) -> None:
    """The server is at rest while the guest is: its memory is saved, restored, and goes on."""
    folder = tmp_path / "s"
    folder.mkdir()
    machine, waiting = (
        start_machine(
            memory_bytes=GUEST_BYTES,
            backend="memory-backend-memfd,share=on",
            guest=guest,
            fill_bytes=FILL_BYTES,
            drivers=["virtio_blk"],
            incoming=incoming,
            arguments=[
                *("-chardev", f"socket,id=c,path={exported_disk(start_machine, folder, name)}"),
                *("-device", "vhost-user-blk-pci,chardev=c"),
            ],
        )
        for name, incoming in (("one", False), ("other", True))
    )
    digest = machine.console.wait_until_ready()
    with Monitor(machine.qmp_path) as monitor:
        result = save_outside(monitor, tmp_path / "vm.mig")
    assert "pc.ram" in result.blocks_mapped
    assert_goes_on(machine)
    assert_qemu_loads(waiting, tmp_path / "vm.mig")
    assert waiting.console.digest() == digest
    assert_goes_on(waiting)


def test_a_peer_of_shared_memory(start_machine: StartMachine, tmp_path: Path) -> None:
    """Shared memory (ivshmem) that is another's: QEMU refuses it, and its reason is told."""
    machine = start_machine(
        memory_bytes=64 * MiB,
        backend="",
        arguments=[
            *("-object", "memory-backend-ram,id=iv,size=16M,share=on"),
            *("-device", "ivshmem-plain,memdev=iv"),
        ],
    )
    assert_refused(machine, tmp_path, "peer mode.*ivshmem")


def assert_refused(machine: Machine, folder: Path, words: str) -> None:
    """By name, before the guest is stopped; nothing is left."""
    machine.monitor.run_state()
    events = machine.monitor.run_events()
    with Monitor(machine.qmp_path) as monitor, pytest.raises(PeerError, match=words):
        save_outside(monitor, folder / "vm.mig")
    assert machine.monitor.run_state() == "running"
    assert machine.monitor.run_events() == events
    assert [one.name for one in folder.iterdir() if one.name.startswith("vm.mig")] == []


class Legacy:
    """A virtio device of a machine that runs nothing, driven by its ports from outside.

    VIRTIO 1.2, 4.1.4.8 and 2.7.2; one queue, its memory above the firmware's.
    """

    QUEUE = 32 * MiB
    BUFFERS = 33 * MiB

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        [pci] = machine.monitor.execute("query-pci")
        [device] = [one for one in pci["devices"] if one["id"]["vendor"] == 0x1AF4]
        [self._ports] = [one["address"] for one in device["regions"] if one["type"] == "io"]
        # Ports, memory and a bus master, in its PCI configuration; without that it is disabled.
        place = 1 << 31 | device["slot"] << 11 | device["function"] << 8 | 4
        machine.monitor.human(f"o/w 0xcf8 {place:#x}")
        machine.monitor.human("o/h 0xcfc 7")
        self._out(18, 1, 1)
        self._out(18, 3, 1)
        self._out(4, 0, 4)
        self._out(14, 0, 2)
        self._size = int(machine.monitor.human(f"i/h {self._ports + 12:#x}").split("=")[1], 16)
        self._out(8, self.QUEUE // 4096, 4)
        self._out(18, 7, 1)
        self._sent = 0
        [ram] = [one for one in machine.monitor.ram_blocks() if one.idstr == "pc.ram"]
        assert ram.host_address is not None
        self._ram = ram.host_address

    def _out(self, at: int, value: int, width: int) -> None:
        size = {1: "b", 2: "h", 4: "w"}[width]
        self._machine.monitor.human(f"o/{size} {self._ports + at:#x} {value:#x}")

    def _write(self, at: int, data: bytes) -> None:
        """Into the guest's RAM."""
        path = Path(f"/proc/{self._machine.process.pid}/mem")
        with path.open("r+b", buffering=0) as memory:
            memory.seek(self._ram + at)
            memory.write(data)

    def _used(self) -> int:
        """How many requests have been answered."""
        with Path(f"/proc/{self._machine.process.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(self._ram + self.QUEUE + 4096 + 2)
            return int.from_bytes(memory.read(2), "little")

    def send(self, message: bytes) -> None:
        """One request, with room for its answer, which is waited for."""
        self._write(self.BUFFERS, message)
        chain = (self.BUFFERS, len(message), 1, 1), (self.BUFFERS + 65536, 8192, 2, 0)
        self._write(self.QUEUE, b"".join(_descriptor(*one) for one in chain))
        self._sent += 1
        ring = self.QUEUE + 16 * self._size
        self._write(ring + 4 + 2 * ((self._sent - 1) % self._size), bytes(2))
        self._write(ring + 2, self._sent.to_bytes(2, "little"))
        self._out(16, 0, 2)
        while self._used() != self._sent:
            time.sleep(0.01)


def _descriptor(address: int, length: int, flags: int, following: int) -> bytes:
    parts = (address, 8), (length, 4), (flags, 2), (following, 2)
    return b"".join(value.to_bytes(width, "little") for value, width in parts)


def _message(kind: int, body: bytes) -> bytes:
    """Of 9P2000.L."""
    return (7 + len(body)).to_bytes(4, "little") + bytes([kind, 0, 0]) + body


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("mounted", [False, True])
def test_9p(mounted: bool, start_machine: StartMachine, tmp_path: Path) -> None:
    """A folder of the host's that the guest has mounted cannot be saved; one it has not can."""
    (tmp_path / "exported").mkdir()
    machine = start_machine(
        memory_bytes=64 * MiB,
        backend="",
        arguments=[
            *("-machine", "pc"),
            *("-fsdev", f"local,id=f,path={tmp_path / 'exported'},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=f,mount_tag=tag,disable-modern=on"),
        ],
    )
    if not mounted:
        save_outside(machine.monitor, tmp_path / "vm.mig")
        read_image(tmp_path / "vm.mig")
        return
    while not _has_ports(machine):  # until the firmware has given it some
        time.sleep(0.01)
    device = Legacy(machine)
    device.send(_message(100, (8192).to_bytes(4, "little") + _text("9P2000.L")))
    nobody = b"\xff" * 4
    device.send(_message(104, bytes(4) + nobody + _text("root") + _text("") + bytes(4)))
    while not machine.monitor.migration().info.get("blocked-reasons"):
        time.sleep(0.01)
    assert_refused(machine, tmp_path, "VirtFS export path .* is mounted in the guest")


def _has_ports(machine: Machine) -> bool:
    [pci] = machine.monitor.execute("query-pci")
    return any(
        one["type"] == "io" and one["address"] > 0
        for device in pci["devices"]
        if device["id"]["vendor"] == 0x1AF4
        for one in device["regions"]
    )
