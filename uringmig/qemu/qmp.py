"""QMP over a unix socket: JSON messages, one command at a time, synchronous.

Not the QEMU project's own client: that is built on asyncio, and the two take 50 ms of processor
time to load, a third of what a save may take before QEMU hears of it. What is needed of the
protocol is little: the greeting, commands that are answered by their id, descriptors. Of events
only those are kept that tell that the guest was stopped or went on. QEMU:
docs/interop/qmp-spec.rst.

A command that was given up, by its time or by a signal, may be answered later: that answer has
another id than is waited for, and is passed over too.
"""

from __future__ import annotations

import array
import errno
import json
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Final

from uringmig import signals
from uringmig.errors import BusyError, PeerError
from uringmig.units import KiB, MiB

#: No answer of QEMU's is longer; what is has no end.
_MESSAGE_BYTES_MAX: Final = 64 * MiB
_RECEIVE_BYTES: Final = 64 * KiB
_MISTAKES: Final = {
    errno.ENOENT: "no such QMP socket",
    errno.ECONNREFUSED: "nobody listens on this socket (QEMU ended, or it is no socket)",
    errno.EAGAIN: "other clients already wait for this QMP socket",
    errno.EACCES: "no permission to connect to this QMP socket",
}
#: QEMU: qapi/run-state.json, as the guest stops, goes on or begins anew, whoever made it.
_RUN_EVENTS: Final = frozenset({"STOP", "RESUME", "RESET"})
#: struct ucred, unix(7): process, user, group.
_CREDENTIALS: Final = struct.Struct("=iII")
#: A QEMU that is just being started listens in a moment; permission is not given in time.
_PASSING: Final = frozenset({errno.ECONNREFUSED, errno.EAGAIN})


class CommandError(PeerError):
    """QEMU understood a command and refused it.

    Attributes:
        command: its QMP name.
        description: QEMU's own words.
    """

    def __init__(self, command: str, description: str) -> None:
        self.command = command
        self.description = description
        super().__init__(f"QEMU refused {command}: {description}")

    def __reduce__(self) -> tuple[type[CommandError], tuple[str, str], dict[str, Any]]:
        """Be made again from its own arguments in another process, not from the message."""
        return type(self), (self.command, self.description), vars(self)


class QmpConnection:
    """One connection, past its greeting and the negotiation of capabilities.

    Args:
        path: the unix socket.
        timeout_s: for connecting, the greeting and the negotiation, in seconds each.

    Attributes:
        peer_pid: process id of QEMU, which the kernel put to its greeting (SCM_CREDENTIALS,
            unix(7)); 0 if it is in a process id namespace that is not visible here. Not
            SO_PEERCRED: that is who made the socket, which may be a manager that passed it on.
        greeting: what QEMU said first.
        run_events: ``STOP``, ``RESUME`` and ``RESET`` as they came, with the answers to commands.

    Raises:
        PeerError: no socket, nobody listens, not QMP, or no greeting in time.
    """

    def __init__(self, path: str, *, timeout_s: float) -> None:
        self._path = path
        self._received = b""
        self._last_id = 0
        self.run_events: list[str] = []
        self._socket = _connect(path, timeout_s=timeout_s)
        try:
            self.peer_pid = 0
            self.greeting = self._greet(timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the connection; does nothing the second time."""
        self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, Any], *, timeout_s: float) -> Any:
        """Run one command and return what it returns.

        Raises:
            CommandError: QEMU refused.
            PeerError: QEMU did not answer in time, closed the connection, or does not speak QMP.
            Interrupted: a signal asks to stop.
        """
        try:
            return self._answer(command, arguments, time.monotonic() + timeout_s)
        except TimeoutError:
            raise PeerError(f"QEMU did not answer {command} within {timeout_s:g} s") from None
        except (EOFError, OSError, ValueError) as error:
            raise PeerError(f"QEMU went away during {command} ({error})") from None

    def send_descriptor(self, fd: int) -> None:
        """Send a duplicate of ``fd``, which the next command may give a name (SCM_RIGHTS).

        Raises:
            PeerError: QEMU did not take it.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            # A byte has to go with it; a blank between two messages means nothing.
            self._socket.sendmsg([b" "], rights)
        except OSError as error:
            raise PeerError(f"QEMU did not take a descriptor ({error})") from None

    def _greet(self, timeout_s: float) -> dict[str, Any]:
        """Take the greeting and leave the negotiation mode."""
        deadline = time.monotonic() + timeout_s
        try:
            self._wait(select.POLLIN, deadline)
            self.peer_pid = _writer_pid(self._socket)
            greeting = self._receive(deadline)
            if "QMP" not in greeting:
                raise ValueError("it does not greet")
            self._answer("qmp_capabilities", {}, deadline)
        except TimeoutError:
            raise BusyError(
                f"{self._path}: no QMP greeting within {timeout_s:g} s; another client is "
                "connected to it, QEMU does not respond, or it is no QMP socket"
            ) from None
        except (EOFError, ConnectionError):
            raise PeerError(f"{self._path}: the peer closed the connection") from None
        except (OSError, ValueError) as error:
            raise PeerError(f"{self._path}: not a QMP socket ({error})") from None
        return greeting

    def _answer(self, command: str, arguments: Mapping[str, Any], deadline: float) -> Any:
        """Send a command, and wait for the answer that has its id."""
        self._last_id += 1
        message = {"execute": command, "arguments": arguments, "id": self._last_id}
        self._send(json.dumps(message).encode(), deadline)
        while True:
            answer = self._receive(deadline)
            if answer.get("event") in _RUN_EVENTS:
                self.run_events.append(str(answer["event"]))
            if answer.get("id", self._last_id) != self._last_id:
                continue
            if isinstance(error := answer.get("error"), dict):
                raise CommandError(command, str(error.get("desc")))
            if "return" in answer:
                return answer["return"]

    def _send(self, data: bytes, deadline: float) -> None:
        """Send all of it."""
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: it did not come in time.
            EOFError: the peer closed the connection.
            ValueError: what came is no message; says what it is.
        """
        while (end := _end_of_message(self._received)) is None:
            if len(self._received) > _MESSAGE_BYTES_MAX:
                raise ValueError("a message that does not end")
            self._wait(select.POLLIN, deadline)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            if not data:
                raise EOFError("the peer closed the connection")
            self._received += data
        text, self._received = self._received[:end], self._received[end:]
        if text.startswith(b"QEMU ") and b" monitor - " in text:
            raise ValueError("it is QEMU's human monitor; QMP has mode=control")
        try:
            message = json.loads(text)
        except RecursionError:
            raise ValueError("a message of too many parts in each other") from None
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message

    def _wait(self, event: int, deadline: float) -> None:
        """Wait until the socket is ready; a signal that asks to stop ends it too."""
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not signals.wait_until_ready(
            self._socket.fileno(), event, timeout_s=left_s
        ):
            raise TimeoutError


def _end_of_message(data: bytes) -> int | None:
    """Where the first message ends, after its line end; None: it has not come whole.

    With ``pretty=on`` a message has many lines, of which the first and the last are a brace.
    """
    end = data.find(b"\n") + 1
    if not end:
        return None
    if data[:end].strip() != b"{":
        return end
    closing = data.find(b"\n}", end - 1)
    end = data.find(b"\n", closing + 1) + 1
    return end if closing >= 0 and end else None


def _connect(path: str, *, timeout_s: float) -> socket.socket:
    """Connect to a unix socket; the error says which of the usual mistakes it is."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # With a limit the socket is non-blocking underneath: a full backlog then is EAGAIN at once.
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        reason = _MISTAKES.get(error.errno or 0, f"cannot connect: {error}")
        kind = BusyError if error.errno in _PASSING else PeerError
        raise kind(f"{path}: {reason}") from None
    connection.setblocking(False)
    return connection


def _writer_pid(connection: socket.socket) -> int:
    """The process that wrote what comes next, which is left there; 0: it is not visible here."""
    space = socket.CMSG_SPACE(_CREDENTIALS.size)
    for level, kind, packed in connection.recvmsg(1, space, socket.MSG_PEEK)[1]:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid: int = _CREDENTIALS.unpack(packed[: _CREDENTIALS.size])[0]
            return pid
    return 0
