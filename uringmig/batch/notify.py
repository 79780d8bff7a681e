"""The service manager's notification protocol: datagrams to the socket in NOTIFY_SOCKET.

See sd_notify(3) and systemd.service(5), ``Type=notify`` and ``WatchdogSec=``. A manager that is not
there or does not listen changes nothing for the run.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

#: A watchdog is to hear twice as often as it asks for (sd_watchdog_enabled(3)).
_WATCHDOG_FACTOR: Final = 0.5
_STATUS_CHARS_MAX: Final = 512
#: How much longer a start may take each time that is asked for, and how often it is.
_START_SECONDS: Final = 60
_EXTEND_SECONDS: Final = 10.0


class Notifier:
    """Tells a service manager how things stand; silent where there is none.

    Args:
        environment: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are looked up.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._interval_s = _watchdog_seconds(environment) * _WATCHDOG_FACTOR
        self._fed_at = self._extended_at = float("-inf")
        self._ready = False
        self._status = ""
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # A manager that does not read must not stop the run, not even its watchdog's.
            self._socket.setblocking(False)

    def ready(self) -> None:
        """The run has begun: its plan fits and its archives are locked."""
        self._ready = True
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; said again only when it changes."""
        text = " ".join(text.split())[:_STATUS_CHARS_MAX]
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Feed the watchdog as often as it needs it, and before `ready` ask for more time to start.

        Call this from the loop that must go on.
        """
        now = time.monotonic()
        if not self._ready and now - self._extended_at >= _EXTEND_SECONDS:
            # Looking at every source may take longer than a manager lets a service start.
            self._extended_at = now
            self._send(f"EXTEND_TIMEOUT_USEC={_START_SECONDS * 1_000_000}")
        if self._interval_s > 0 and now - self._fed_at >= self._interval_s:
            self._fed_at = now
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The run ends."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket; harmless when called again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        """Send one datagram, or give it up."""
        if self._socket is None or self._address is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:
            # Nobody listens, or its queue is full: what counts are the archives.
            return


def _address(name: str) -> str | None:
    """The socket's address; a leading ``@`` is the abstract namespace."""
    if name.startswith("/"):
        return name
    return "\0" + name[1:] if name.startswith("@") and len(name) > 1 else None


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """How often the watchdog must hear of us, or 0.0 if there is none for this process."""
    pid = environment.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return 0.0
    number = environment.get("WATCHDOG_USEC", "")
    return int(number) / 1e6 if number.isdecimal() else 0.0
