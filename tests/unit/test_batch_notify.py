"""sd_notify to a real datagram socket, by path and in the abstract namespace."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from uringmig.batch import notify
from uringmig.batch.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def listener(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    name = f"@uringmig-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name.replace("@", "\0", 1))
        server.setblocking(False)
        yield server, {"NOTIFY_SOCKET": name}


def received(server: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(server.recv(4096).decode())
        except BlockingIOError:
            return found


def test_ready_status_stopping(listener: tuple[socket.socket, dict[str, str]]) -> None:
    server, environment = listener
    notifier = Notifier(environment)
    notifier.ready()
    notifier.status("1 of 3\njobs done")
    notifier.status("1 of 3 jobs done")
    notifier.status("x" * 1000)
    notifier.stopping()
    notifier.close()
    notifier.close()
    notifier.ready()
    assert received(server) == [
        "READY=1", "STATUS=1 of 3 jobs done", "STATUS=" + "x" * 512, "STOPPING=1",
    ]  # fmt: skip


def test_watchdog_is_fed_at_half_its_interval(
    listener: tuple[socket.socket, dict[str, str]],
) -> None:
    server, environment = listener
    notifier = Notifier({**environment, "WATCHDOG_USEC": "100000"})
    notifier.ready()
    notifier.alive()
    notifier.alive()
    assert received(server) == ["READY=1", "WATCHDOG=1"]
    time.sleep(0.06)
    notifier.alive()
    assert received(server) == ["WATCHDOG=1"]
    notifier.close()


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "100", "WATCHDOG_PID": str(os.getpid() + 1)},
    ],
)
def test_no_watchdog_for_this_process(
    listener: tuple[socket.socket, dict[str, str]], extra: dict[str, str]
) -> None:
    server, environment = listener
    notifier = Notifier({**environment, **extra})
    notifier.ready()
    notifier.alive()
    assert received(server) == ["READY=1"]
    notifier.close()


def test_watchdog_of_this_process(listener: tuple[socket.socket, dict[str, str]]) -> None:
    server, environment = listener
    notifier = Notifier({**environment, "WATCHDOG_USEC": "100", "WATCHDOG_PID": str(os.getpid())})
    notifier.ready()
    notifier.alive()
    assert received(server) == ["READY=1", "WATCHDOG=1"]
    notifier.close()


def test_a_long_start_asks_for_more_time(
    listener: tuple[socket.socket, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager ends a service that is not ready after 90 s, and a plan may take longer."""
    server, environment = listener
    monkeypatch.setattr(notify, "_EXTEND_SECONDS", 0.05)
    notifier = Notifier(environment)
    notifier.alive()
    notifier.alive()
    assert received(server) == ["EXTEND_TIMEOUT_USEC=60000000"]
    time.sleep(0.06)
    notifier.alive()
    notifier.ready()
    notifier.alive()
    assert received(server) == ["EXTEND_TIMEOUT_USEC=60000000", "READY=1"]
    notifier.close()


def test_nobody_listens_or_reads(tmp_path: Path) -> None:
    """Without a manager, with one that is gone and with one that never reads, the run goes on."""
    for name in ("", "relative", "@", str(tmp_path / "gone")):
        with_none = Notifier({"NOTIFY_SOCKET": name})
        with_none.ready()
        with_none.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "deaf"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "deaf")})
        for number in range(2000):
            notifier.status(f"{number}")
        notifier.close()
        assert server.recv(100) == b"STATUS=0"
