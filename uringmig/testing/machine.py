"""A real QEMU for tests, the demo and measurements: started, steered, and always cleaned up."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from uringmig.errors import HostError, PeerError
from uringmig.qemu.monitor import Monitor
from uringmig.testing.guestimage import GuestImage
from uringmig.units import MiB

QEMU: Final = "qemu-system-x86_64"
#: Booting and filling under TCG on a busy machine takes tens of seconds; this only ends hangs.
PATIENCE_S: Final = 300.0


def find_qemu() -> str | None:
    """The path of QEMU's x86 system emulator, or None."""
    return shutil.which(QEMU)


class Machine:
    """One QEMU (x86-64, q35) in a folder of its own; a context manager that leaves nothing.

    KVM is used only if the environment variable URINGMIG_KVM is set; otherwise TCG.

    Args:
        folder: for its sockets and logs; made if missing, kept for whoever looks into a failure.
        memory_bytes: RAM, in bytes.
        shared: file that is the RAM (shared), usually in /dev/shm; made, and removed on leaving.
            None: private RAM that QEMU allocates itself.
        keep_shared: ``shared`` is there already, is taken with its content, and stays.
        backend: another memory backend: its ``-object`` without id and size; ``""`` is ``-m``
            alone.
        guest: what to boot; None for a machine with nothing to run.
        fill_bytes: how much memory the guest fills.
        drivers: virtio drivers that the guest loads, for example ``virtio_mem``.
        least_bytes: memory that the guest waits for before it fills it.
        paused: start stopped (``-S``).
        incoming: wait for ``migrate-incoming`` (``-incoming defer``).
        arguments: more of QEMU's own, at the end of the command line.
        pass_fds: descriptors that they name.
        prefix: a command that QEMU is started by, for example ``setpriv`` or ``unshare``.

    Attributes:
        monitor: connected to it.
        console: its serial port.
        qmp_path: a second QMP socket, for the program under test.

    Raises:
        HostError: there is no QEMU here.
        PeerError: QEMU did not start; the message has what it said.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory_bytes: int = 128 * MiB,
        shared: Path | None = None,
        keep_shared: bool = False,
        backend: str | None = None,
        guest: GuestImage | None = None,
        fill_bytes: int = 0,
        drivers: Sequence[str] = (),
        least_bytes: int = 0,
        paused: bool = False,
        incoming: bool = False,
        arguments: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        program = find_qemu()
        if program is None:
            raise HostError(f"{QEMU} is not installed; ci/setup installs it")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_path = folder / "qemu.log"
        self.qmp_path = folder / "qmp.sock"
        steering = folder / "steer.sock"
        with ExitStack() as undo:
            listener = undo.enter_context(_listener(folder / "serial.sock"))
            if shared is not None and not keep_shared:
                undo.callback(shared.unlink, missing_ok=True)
                # Made here, so that it is fresh: QEMU would take an old file with its content.
                shared.unlink(missing_ok=True)
                shared.touch(mode=0o600)
            boot = []
            if guest is not None:
                words = guest.command_line(
                    fill_bytes=fill_bytes, drivers=drivers, least_bytes=least_bytes
                )
                boot = _boot(guest, words)
            command = [
                *prefix,
                program,
                *_hardware(memory_bytes, shared, backend),
                *boot,
                *(["-S"] if paused else []),
                *(["-incoming", "defer"] if incoming else []),
                *["-serial", f"unix:{folder / 'serial.sock'}"],
                *["-qmp", f"unix:{steering},server=on,wait=off"],
                *["-qmp", f"unix:{self.qmp_path},server=on,wait=off"],
                *arguments,
            ]
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=pass_fds,
                )
            undo.callback(self._end)
            self.console = Console(self._accept(listener), folder / "serial.log")
            undo.callback(self.console.close)
            self.monitor = self._connect(steering)
            undo.callback(self.monitor.close)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU at once and remove its RAM file; does nothing the second time."""
        self._undo.close()

    def kill(self) -> None:
        """End QEMU as a crash would, and wait for it."""
        self._end()

    def log(self) -> str:
        """What QEMU printed."""
        return self.log_path.read_text(errors="replace").strip()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _accept(self, listener: socket.socket) -> socket.socket:
        """Take the connection QEMU makes to its serial port, or say why it did not come."""
        deadline = time.monotonic() + PATIENCE_S
        listener.settimeout(0.1)
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                self._still_there(deadline)

    def _connect(self, path: Path) -> Monitor:
        """Connect to a socket that QEMU makes while it starts."""
        deadline = time.monotonic() + PATIENCE_S
        while not os.path.exists(path):
            self._still_there(deadline)
            time.sleep(0.01)
        return Monitor(path, greeting_timeout_s=PATIENCE_S, command_timeout_s=PATIENCE_S)

    def _still_there(self, deadline: float) -> None:
        """Raise if QEMU has ended or the time is over."""
        if self.process.poll() is not None:
            raise PeerError(f"QEMU ended with {self.process.returncode}: {self.log()}")
        if time.monotonic() > deadline:
            raise PeerError(f"QEMU did not start within {PATIENCE_S:g} s: {self.log()}")


class Console:
    """A guest's serial console: lines in, lines out, all of it kept in a log file."""

    def __init__(self, connection: socket.socket, log_path: Path) -> None:
        self._connection = connection
        self._log = log_path.open("wb")
        self._pending = b""
        self._lines: deque[str] = deque()

    def close(self) -> None:
        """Close the connection and the log."""
        self._connection.close()
        self._log.close()

    def send(self, line: str) -> None:
        """Type one line."""
        self._connection.sendall(line.encode() + b"\n")

    def read_line(self, *, timeout_s: float = PATIENCE_S) -> str:
        """The next whole line, without its end.

        Raises:
            PeerError: the console was closed, or no line came in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._lines:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._connection.recv(65536)
            except TimeoutError:
                raise PeerError(f"no line on the console within {timeout_s:g} s") from None
            if not data:
                raise PeerError("the guest's console was closed")
            self._log.write(data)
            self._log.flush()
            *lines, self._pending = (self._pending + data).split(b"\n")
            self._lines.extend(line.rstrip(b"\r").decode(errors="replace") for line in lines)
        return self._lines.popleft()

    def wait_for(self, pattern: str, *, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Pass over lines until one has the pattern.

        Raises:
            PeerError: the console was closed, or the pattern did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise PeerError(f"no {pattern!r} on the console within {timeout_s:g} s")
            match = re.search(pattern, self.read_line(timeout_s=left_s))
            if match is not None:
                return match

    def wait_until_ready(self) -> str:
        """Wait until the guest has filled its memory; returns the first digest."""
        digest = self.wait_for(r"^UM digest=(\w+)$")[1]
        self.wait_for(r"^UM ready$")
        return digest

    def digest(self) -> str:
        """Ask the guest to read all it filled, and return the digest."""
        self._pass_over()
        self.send("digest")
        return self.wait_for(r"^UM digest=(\w+)$")[1]

    def count(self) -> int:
        """Ask the guest for its counter."""
        self._pass_over()
        self.send("count")
        return int(self.wait_for(r"^UM count=(\d+)$")[1])

    def run(self, command: str) -> int:
        """Have the guest's shell run a command; returns its exit status."""
        self._pass_over()
        self.send(f"run {command}")
        return int(self.wait_for(r"^UM ran=(\d+)$")[1])

    def busy(self) -> int:
        """Ask the guest how far its writer is; the first time that starts it.

        Raises:
            PeerError: memory that it had written was another by the next round.
        """
        self._pass_over()
        self.send("busy")
        found = self.wait_for(r"^UM busy=(\w*)$")[1]
        if not found.isdigit():
            raise PeerError(f"the guest's writer says {found!r}")
        return int(found)

    def _pass_over(self) -> None:
        """Drop the lines that came before a question."""
        self._lines.clear()


def _hardware(memory_bytes: int, shared: Path | None, backend: str | None) -> list[str]:
    """The machine itself, the same for a source and its destination."""
    accelerator = "kvm" if os.environ.get("URINGMIG_KVM") else "tcg"
    memory = []
    if backend is None:
        backend = "memory-backend-ram"
        if shared is not None:
            backend = f"memory-backend-file,mem-path={shared},share=on"
    if backend:
        memory = ["-object", f"{backend},id=pc.ram,size={memory_bytes}"]
    return [
        *["-accel", accelerator, "-machine", "q35" + (",memory-backend=pc.ram" if memory else "")],
        *["-m", f"{memory_bytes}B", *memory],
        *["-nodefaults", "-no-user-config", "-display", "none"],
    ]


def _boot(guest: GuestImage, command_line: str) -> list[str]:
    return [
        *["-kernel", str(guest.kernel), "-initrd", str(guest.initramfs)],
        *["-append", command_line],
    ]


def _listener(path: Path) -> socket.socket:
    """A listening unix socket; QEMU connects to it, so there is nothing to wait for."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener
