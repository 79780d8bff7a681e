"""What the guardian of a stopped guest runs: waits for its saver's end, and lets the guest go on.

Run by its file's name, by `qemu.guardian`, with nothing but the standard library: it has to come up
fast, and to work whatever has become of the package since.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from typing import Any, Final

#: What it says when it listens.
READY: Final = b"r"
#: What it is told: should we die, let the guest go on; or only tidy up; all is well.
GO_ON: Final = b"g"
TIDY: Final = b"t"
DISARM: Final = b"d"
#: Opaque texts of the descriptors that QEMU is given for the time of a save begin so.
OURS: Final = "uringmig:"
#: Of the note, by what the saver was to do with the guest at last.
NOTES: Final = {
    GO_ON: f"{OURS} stopped for a save; to go on: cont",
    TIDY: f"{OURS} being saved",
}
#: Another client may be first at the socket, and QEMU be busy; for so long it is tried again.
_TRIES_SECONDS: Final = 600.0
_ANSWER_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.05


class _Connection:
    """As much of QMP as it takes."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_SECONDS)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command; None if it was refused."""
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
    if word == GO_ON and connection.execute("query-status")["status"] == "paused":
        connection.execute("cont")
    for entry in connection.execute("query-fdsets"):
        if any(fd.get("opaque", "").startswith(OURS) for fd in entry["fds"]):
            connection.execute("remove-fd", **{"fdset-id": entry["fdset-id"]})


def watch(path: str) -> None:
    """Wait for the end of whoever started us; act unless all is well by then."""
    os.write(sys.stdout.fileno(), READY)
    last = DISARM
    while word := os.read(sys.stdin.fileno(), 1):
        last = word
    deadline = time.monotonic() + _TRIES_SECONDS
    while last != DISARM and time.monotonic() < deadline:
        try:
            put_back(path, last)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # there is no QEMU any more
        except (OSError, ValueError, TypeError):
            select.select([], [], [], _PAUSE_SECONDS)
        else:
            return


if __name__ == "__main__":
    watch(sys.argv[1])
