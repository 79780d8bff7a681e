"""The monitor against real QEMUs, and against peers that refuse, hang, babble or die."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from realguest import StartMachine, shared_path

from uringmig.errors import PeerError
from uringmig.qemu.backing import open_backing
from uringmig.qemu.monitor import Monitor, RamBackend
from uringmig.qemu.qmp import CommandError
from uringmig.qemu.sharedram import mapped_memories
from uringmig.testing.machine import Machine
from uringmig.units import MiB

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}}


@contextmanager
def peer(folder: Path, behave: Callable[[socket.socket], None]) -> Iterator[Path]:
    """A unix socket whose first client meets ``behave``."""
    path = folder / "peer.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            # The monitor under test may hang up first, as it should on nonsense.
            with connection, suppress(ConnectionError):
                behave(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join()


def say(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\r\n")


def greet(connection: socket.socket) -> None:
    """Greet and accept the negotiation, as QEMU does."""
    say(connection, GREETING)
    connection.recv(4096)
    say(connection, {"return": {}})


def until_closed(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no such QMP socket") as caught:
        Monitor(tmp_path / "none")
    assert caught.value.exit_code == 4


def test_nobody_listens(tmp_path: Path) -> None:
    """A socket that a killed QEMU left behind, or a file that is no socket."""
    path = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    with pytest.raises(PeerError, match="nobody listens"):
        Monitor(path)
    (tmp_path / "file").touch()
    with pytest.raises(PeerError, match="nobody listens"):
        Monitor(tmp_path / "file")


@pytest.mark.parametrize(
    "babble",
    [b"QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) \r\n", b"\xff\n", b"[1]\n",
     b'{"hello": 1}\n', b'{"QMP": 5}\n', b'{"QMP": {"version": {}, "capabilities": []}}\n'],
)  # fmt: skip
def test_not_qmp(tmp_path: Path, babble: bytes) -> None:
    def behave(connection: socket.socket) -> None:
        connection.sendall(babble)
        connection.recv(4096)
        say(connection, {"return": {}})
        until_closed(connection)

    with peer(tmp_path, behave) as path, pytest.raises(PeerError, match="QMP") as caught:
        Monitor(path)
    assert "\n" not in str(caught.value)


def test_peer_hangs_up_at_once(tmp_path: Path) -> None:
    with peer(tmp_path, lambda _: None) as path, pytest.raises(PeerError, match="closed"):
        Monitor(path)


def test_peer_never_greets(tmp_path: Path) -> None:
    with peer(tmp_path, until_closed) as path, pytest.raises(PeerError, match="no QMP greeting"):
        Monitor(path, greeting_timeout_s=0.1)


def test_peer_never_answers(tmp_path: Path) -> None:
    def behave(connection: socket.socket) -> None:
        greet(connection)
        until_closed(connection)

    with (
        peer(tmp_path, behave) as path,
        Monitor(path, command_timeout_s=0.1) as monitor,
        pytest.raises(PeerError, match="did not answer query-status within"),
    ):
        monitor.run_state()


def test_a_late_answer_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """A command that was given up is answered all the same, beside events that nobody asked for."""

    def behave(connection: socket.socket) -> None:
        greet(connection)
        first = json.loads(connection.recv(4096))
        second = json.loads(connection.recv(4096))
        say(connection, {"event": "STOP", "timestamp": {}})
        say(connection, {"return": {"status": "late"}, "id": first["id"]})
        say(connection, {"return": {"status": "running"}, "id": second["id"]})
        until_closed(connection)

    with peer(tmp_path, behave) as path, Monitor(path, command_timeout_s=0.1) as monitor:
        with pytest.raises(PeerError, match="did not answer"):
            monitor.run_state()
        monitor._command_timeout_s = 60.0
        assert monitor.run_state() == "running"


@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_answer_comes_in_any_pieces(tmp_path: Path, size: int) -> None:
    answer = {"return": {"status": "running", "text": "\u2028 \n}\r\n { end"}, "id": 2}

    def behave(connection: socket.socket) -> None:
        greet(connection)
        connection.recv(4096)
        text = json.dumps(answer, indent=4).replace("\n", "\r\n").encode() + b"\r\n"
        for start in range(0, len(text), size):
            connection.sendall(text[start : start + size])
            time.sleep(0.001)
        until_closed(connection)

    with peer(tmp_path, behave) as path, Monitor(path) as monitor:
        assert monitor.execute("query-status") == answer["return"]


def test_peer_dies_during_a_command(tmp_path: Path) -> None:
    def behave(connection: socket.socket) -> None:
        greet(connection)
        connection.recv(4096)

    with peer(tmp_path, behave) as path, Monitor(path) as monitor:
        for _ in range(2):
            with pytest.raises(PeerError, match="went away during query-status"):
                monitor.run_state()


def test_a_second_client_is_told_so(start_machine: StartMachine) -> None:
    """QEMU serves one client a socket; the next is left waiting without a word."""
    machine = start_machine(paused=True)
    with Monitor(machine.qmp_path) as first:
        with pytest.raises(PeerError, match="another client is connected"):
            Monitor(machine.qmp_path, greeting_timeout_s=0.2)
        assert first.run_state() == "prelaunch"


def test_who_and_what_is_there(start_machine: StartMachine) -> None:
    ram = shared_path()
    machine = start_machine(memory_bytes=64 * MiB, shared=ram, paused=True)
    monitor = machine.monitor
    assert monitor.peer_pid == machine.process.pid
    assert monitor.qemu_version >= (9, 1, 0)
    assert monitor.run_state() == "prelaunch"
    assert monitor.migration().status == "none"
    blocks = {block.idstr: block for block in monitor.ram_blocks()}
    assert blocks["pc.ram"].used_length == blocks["pc.ram"].max_length == 64 * MiB
    tables = blocks["/rom@etc/acpi/tables"]
    assert tables.used_length == 128 * 1024
    assert tables.max_length == 2 * MiB
    (backend,) = monitor.ram_backends()
    assert backend == RamBackend(
        "pc.ram", "memory-backend-file", 64 * MiB, share=True, path=str(ram), offset=0,
        idstr="pc.ram",
    )  # fmt: skip


def test_backends_of_devices(start_machine: StartMachine) -> None:
    """A device may put its own path before the backend's id; memory nobody uses has no block."""
    machine = start_machine(
        memory_bytes=64 * MiB,
        paused=True,
        arguments=[
            *["-m", "64M,slots=2,maxmem=1G"],
            *["-object", "memory-backend-memfd,id=vm0,size=32M,share=on"],
            *["-device", "virtio-mem-pci,memdev=vm0,requested-size=16M"],
            *["-object", "memory-backend-ram,id=spare,size=16M"],
        ],
    )
    found = {backend.id: backend for backend in machine.monitor.ram_backends()}
    assert found["vm0"].idstr == "0000:00:01.0/vm0"
    assert found["vm0"].kind == "memory-backend-memfd"
    assert found["spare"].idstr is None
    assert found["pc.ram"].kind == "memory-backend-ram"
    assert not found["pc.ram"].share
    with pytest.raises(PeerError, match="not a named file"):
        open_backing(machine.monitor, found["vm0"])


def test_refused_command_has_qemus_words(start_machine: StartMachine) -> None:
    machine = start_machine(paused=True)
    with pytest.raises(CommandError, match="QEMU refused no-such: The command no-such has not"):
        machine.monitor.execute("no-such")
    assert machine.monitor.run_state() == "prelaunch"


def test_settings_are_put_back(start_machine: StartMachine) -> None:
    monitor = start_machine(paused=True).monitor
    monitor.set_parameters(**{"multifd-channels": 5})
    capabilities, parameters = monitor.capabilities(), monitor.parameters()

    def change() -> None:
        monitor.set_capabilities(**{"mapped-ram": True, "multifd": True})
        monitor.set_parameters(**{"direct-io": True, "max-bandwidth": 0, "multifd-channels": 2})

    with monitor.saved_settings():
        change()
        assert monitor.capabilities()["multifd"]
        assert monitor.parameters()["direct-io"]
    assert (monitor.capabilities(), monitor.parameters()) == (capabilities, parameters)

    def change_and_fail() -> None:
        with monitor.saved_settings():
            change()
            monitor.execute("no-such")

    with pytest.raises(CommandError, match="no-such"):
        change_and_fail()
    assert (monitor.capabilities(), monitor.parameters()) == (capabilities, parameters)


def test_the_blocks_own_error_wins(start_machine: StartMachine) -> None:
    """QEMU is gone, so nothing can be put back: the first error is told, with a note."""
    machine = start_machine(paused=True)

    def fail() -> None:
        with machine.monitor.saved_settings():
            machine.kill()
            raise KeyError("first")

    with pytest.raises(KeyError, match="first") as caught:
        fail()
    assert "not put back" in caught.value.__notes__[0]


class TestBackingFile:
    """The path of shared RAM is trusted only if it is what QEMU has mapped."""

    def only_backend(self, machine: Machine) -> RamBackend:
        (backend,) = machine.monitor.ram_backends()
        return backend

    def refusal(self, machine: Machine) -> str:
        with pytest.raises(PeerError) as caught:
            open_backing(machine.monitor, self.only_backend(machine))
        return str(caught.value)

    def test_the_right_file(self, start_machine: StartMachine) -> None:
        ram = shared_path()
        machine = start_machine(shared=ram, paused=True)
        backing = open_backing(machine.monitor, self.only_backend(machine))
        assert os.fstat(backing.fd).st_ino == ram.stat().st_ino
        assert backing.note is None
        os.close(backing.fd)

    def test_what_cannot_be_proved_is_said(
        self, start_machine: StartMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of another user's QEMU the mappings may be hidden (here: of a process that is none)."""
        machine = start_machine(shared=shared_path(), paused=True)
        backend = self.only_backend(machine)
        monkeypatch.setattr(machine.monitor, "peer_pid", 1 << 22)
        backing = open_backing(machine.monitor, backend)
        os.close(backing.fd)
        assert backing.note is not None
        assert "not proved" in backing.note
        notes: list[str] = []
        with mapped_memories(machine.monitor, notes):
            assert notes == [backing.note]

    def test_removed(self, start_machine: StartMachine) -> None:
        ram = shared_path()
        machine = start_machine(shared=ram, paused=True)
        ram.unlink()
        assert self.refusal(machine).endswith("has been removed")

    def test_replaced(self, start_machine: StartMachine) -> None:
        ram = shared_path()
        machine = start_machine(shared=ram, memory_bytes=64 * MiB, paused=True)
        ram.unlink()
        with ram.open("xb") as file:
            file.truncate(64 * MiB)
        assert "not the file QEMU has mapped" in self.refusal(machine)

    def test_replaced_by_a_shorter_one(self, start_machine: StartMachine) -> None:
        ram = shared_path()
        machine = start_machine(shared=ram, memory_bytes=64 * MiB, paused=True)
        ram.unlink()
        ram.write_bytes(b"x")
        assert "1 bytes, fewer than the 67108864" in self.refusal(machine)

    def test_folder(self, start_machine: StartMachine, tmp_path: Path) -> None:
        backend = f"memory-backend-file,id=ram1,size=64M,mem-path={tmp_path},share=on"
        machine = start_machine(
            paused=True,
            arguments=["-object", backend, "-machine", "memory-backend=ram1", "-m", "64M"],
        )
        (found,) = (one for one in machine.monitor.ram_backends() if one.id == "ram1")
        with pytest.raises(PeerError, match="is a folder; QEMU made a nameless file"):
            open_backing(machine.monitor, found)

    def test_not_shared(self, start_machine: StartMachine) -> None:
        ram = shared_path()
        with ram.open("xb") as file:
            file.truncate(64 * MiB)
        backend = f"memory-backend-file,id=ram1,size=64M,mem-path={ram}"
        try:
            machine = start_machine(
                paused=True,
                arguments=["-object", backend, "-machine", "memory-backend=ram1", "-m", "64M"],
            )
            (found,) = (one for one in machine.monitor.ram_backends() if one.id == "ram1")
            with pytest.raises(PeerError, match="not shared"):
                open_backing(machine.monitor, found)
        finally:
            ram.unlink()
