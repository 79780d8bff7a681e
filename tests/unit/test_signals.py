"""Signals as a number that is looked at: where it stops a run, and where it has to wait."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from uringmig import signals
from uringmig.cli.jobfile import read_job_text
from uringmig.errors import PeerError
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.receiving import receive
from uringmig.qemu.streamload import _send_piece
from uringmig.signals import Interrupted, Signals

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}}

WAITS = """
import sys, time
from uringmig.signals import Signals, look
with Signals(lambda: None):
    print("ready", flush=True)
    try:
        while True:
            look()
            time.sleep(0.01)
    finally:
        print("cleaning", flush=True)
        time.sleep(600)
"""


@contextlib.contextmanager
def waiting_program() -> Iterator[subprocess.Popen[str]]:
    """A program that cleans up for ever once a signal has come."""
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        yield one
        if one.poll() is None:
            one.kill()


def test_nothing_comes_out_of_a_handler_and_look_raises_once() -> None:
    """What follows is cleaning up, which may look too."""
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        assert noted.number == signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            signals.look()
        signals.look()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_one_counts() -> None:
    with Signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert noted.number == signal.SIGTERM


def test_commit_looks_for_the_last_time() -> None:
    """Before the point of no return a signal stops; after it, nothing does."""
    with Signals():
        signals.commit()
        signal.raise_signal(signal.SIGTERM)
        signals.look()
        signals.commit()
    with Signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signals.commit()


def test_after_a_commit_what_adds_nothing_may_be_stopped() -> None:
    with Signals():
        signals.commit()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), signals.after_commit():
            signals.look()
        signals.look()


def test_deferred_waits_until_the_end_of_the_block() -> None:
    with Signals():
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            with signals.deferred():
                signals.look()
            signals.look()
        with pytest.raises(Interrupted):
            signals.look()


def test_other_threads_and_no_handlers_are_unaffected() -> None:
    """A library's thread is nobody's to stop, and without `Signals` nothing happens."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with signals.deferred(), signals.after_commit():
                signals.look()
            signals.commit()
        except BaseException as error:
            raised.append(error)

    work()
    with Signals():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not raised
        # Nor has the thread's commit let this one past its own.
        with pytest.raises(Interrupted):
            signals.commit()


def test_settled_is_settled() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Signals() as noted:
            noted.settle()
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert noted.number is None
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hang_on_a_queue(_: Path) -> None:
    signals.take(queue.Queue[None]())


def hang_on_a_silent_stream(_: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receive(ours, {}, on_setup=lambda _: None)


def hang_on_a_full_socket(_: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        _send_piece(ours, memoryview(bytes(16 << 20)))


def hang_on_a_silent_monitor(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "qmp"))
        listener.listen(1)
        Monitor(folder / "qmp", greeting_timeout_s=600)


@pytest.mark.parametrize(
    "hang",
    [hang_on_a_queue, hang_on_a_silent_stream, hang_on_a_full_socket, hang_on_a_silent_monitor],
)
def test_every_wait_ends_by_a_signal(hang: Callable[[Path], None], tmp_path: Path) -> None:
    """A blocked system call goes on after a handler (PEP 475), so each wait has to look."""
    main_thread = threading.get_ident()
    timer = threading.Timer(0.2, signal.pthread_kill, [main_thread, signal.SIGTERM])
    with Signals():
        timer.start()
        with pytest.raises(Interrupted):
            hang(tmp_path)
        timer.join()


def test_a_monitor_answers_after_a_wait_was_interrupted(tmp_path: Path) -> None:
    """Giving a guest back takes commands, on the very connection whose wait was ended."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(json.dumps(GREETING).encode() + b"\n")
                # The client asks one thing at a time, and ends no line.
                while data := connection.recv(4096):
                    command = json.loads(data)
                    if command["execute"] == "never":
                        os.kill(os.getpid(), signal.SIGTERM)
                        continue
                    # The first one, which negotiates, has no id.
                    name = {key: command[key] for key in ("id",) if key in command}
                    answer = {"return": {"status": "running"}, **name}
                    connection.sendall(json.dumps(answer).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with Signals(), Monitor(tmp_path / "qmp") as monitor:
            with pytest.raises(Interrupted):
                monitor.execute("never")
            assert monitor.run_state() == "running"
        thread.join()


def test_a_silent_peer_without_signals_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("uringmig.qemu.receiving.SILENCE_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(PeerError, match="silent"):
        hang_on_a_silent_stream(Path())
    assert time.monotonic() - began >= 0.3


def test_ready_is_told_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not signals.wait_until_ready(ours.fileno(), select.POLLIN, timeout_s=0)
        theirs.send(b"x")
        assert signals.wait_until_ready(ours.fileno(), select.POLLIN, timeout_s=None)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_exits_at_once(second: signal.Signals) -> None:
    with waiting_program() as program:
        program.send_signal(signal.SIGINT)
        assert program.stdout is not None
        assert program.stdout.readline() == "cleaning\n"
        program.send_signal(second)
        assert program.wait() == 128 + second


def test_a_closed_terminal_sends_two_and_means_one() -> None:
    with waiting_program() as program:
        program.send_signal(signal.SIGHUP)
        assert program.stdout is not None
        assert program.stdout.readline() == "cleaning\n"
        program.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert program.poll() is None


def test_an_ignored_one_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_file_that_is_a_pipe_is_read_and_waited_for_until_a_signal(tmp_path: Path) -> None:
    """`archive run <(generate)`: opening a pipe may wait for ever for whoever writes it."""
    pipe = tmp_path / "jobs.toml"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("jobs = []\n" * 10_000,))
    writer.start()
    assert read_job_text(pipe) == "jobs = []\n" * 10_000
    writer.join()
    timer = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGTERM])
    with Signals():
        timer.start()
        with pytest.raises(Interrupted):
            read_job_text(pipe)
        timer.join()
