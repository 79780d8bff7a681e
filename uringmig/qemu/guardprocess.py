"""What the guardian of a stopped guest runs: waits for its saver's end, and lets the guest go on.

Run by its file's name, by `qemu.guardian`, with nothing but the standard library: it has to work
whatever has become of the package since. And it has to come up fast, since the guest is stopped
only then: what it needs to act is loaded when it acts.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # that of typing, which takes as long to load as Python itself
if TYPE_CHECKING:
    from typing import Any

#: What it says when it listens.
READY = b"r"
#: What it is told: should we die, let the guest go on; or only tidy up; all is well.
GO_ON = b"g"
TIDY = b"t"
DISARM = b"d"
#: Run states of a guest that was stopped for a save: the second if it was reset since.
HALTED = frozenset({"paused", "prelaunch"})
#: Opaque texts of the descriptors that QEMU is given for the time of a save begin so.
OURS = "uringmig:"
#: Of the note, by what the saver was to do with the guest at last.
NOTES = {
    GO_ON: f"{OURS} stopped for a save; to go on: cont",
    TIDY: f"{OURS} being saved",
}
#: Of the file that QEMU writes the state of its devices to.
DEVICES = f"{OURS} state of the devices"
#: What does not outlive the save that it was given for.
OF_A_SAVE = frozenset({*NOTES.values(), DEVICES})
#: Another client may be first at the socket, and QEMU be busy; for so long it is tried again.
_TRIES_SECONDS = 600.0
_ANSWER_SECONDS = 60.0
_PAUSE_SECONDS = 0.05


class _Connection:
    """As much of QMP as it takes."""

    def __init__(self, path: str) -> None:
        import socket

        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_SECONDS)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command; None if it was refused."""
        import json

        message = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            line = self._lines.readline()
            if not line:
                raise ConnectionError("QEMU closed the connection")
            answer = json.loads(line)
            if "return" in answer or "error" in answer:
                return answer.get("return")


def put_back(path: str, word: bytes) -> None:
    """Do what the saver would have done, and take back what it gave QEMU.

    Raises:
        OSError: QEMU does not answer.
    """
    connection = _Connection(path)
    if word == GO_ON and connection.execute("query-status")["status"] in HALTED:
        connection.execute("cont")
    for entry in connection.execute("query-fdsets"):
        if any(fd.get("opaque") in OF_A_SAVE for fd in entry["fds"]):
            connection.execute("remove-fd", **{"fdset-id": entry["fdset-id"]})


def watch(path: str) -> None:
    """Wait for the end of whoever started us; act unless all is well by then."""
    # Whoever asks a whole service to end asks the saver, too, and its end is ours.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.write(sys.stdout.fileno(), READY)
    last = DISARM
    while word := os.read(sys.stdin.fileno(), 1):
        last = word
    if last == DISARM:
        return
    import time

    deadline = time.monotonic() + _TRIES_SECONDS
    while time.monotonic() < deadline:
        try:
            put_back(path, last)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # there is no QEMU any more
        except (OSError, ValueError, TypeError):
            time.sleep(_PAUSE_SECONDS)
        else:
            return


if __name__ == "__main__":
    watch(sys.argv[1])
    os._exit(0)  # whoever started us waits, and there is nothing to tidy up
