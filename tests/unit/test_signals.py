"""Signals as an exception: raised where it helps, held back where it would do harm."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from uringmig.signals import Interrupted, Signals

WAITS = """
import signal, sys, time
from uringmig.signals import Signals
class Slow:
    def __enter__(self): return self
    def __exit__(self, *exception):
        print("cleaning", flush=True)
        time.sleep(600)
with Signals(), Slow():
    print("ready", flush=True)
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


def test_raised_and_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_waits_for_the_end_of_a_clean_up() -> None:
    steps = []

    class CleanUp:
        def __enter__(self) -> None: ...
        def __exit__(self, *exception: object) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
            steps.append("clean")

    def work() -> None:
        with CleanUp():
            steps.append("body")
        time.sleep(60)
        steps.append("never")

    with pytest.raises(Interrupted), Signals():
        work()
    assert steps == ["body", "clean"]


def test_waits_for_the_end_of_an_event_loop_callback() -> None:
    """A background task would keep the exception to itself, and be dead afterwards."""
    steps = []

    async def callback() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        steps.append("worked")

    def work() -> None:
        asyncio.run(callback())
        time.sleep(60)

    with pytest.raises(Interrupted), Signals():
        work()
    assert steps == ["worked"]


def test_is_raised_out_of_a_loop_that_waits() -> None:
    main_thread = threading.get_ident()

    async def wait() -> None:
        threading.Timer(0.1, signal.pthread_kill, [main_thread, signal.SIGINT]).start()
        await asyncio.sleep(60)

    with pytest.raises(Interrupted), Signals(), asyncio.Runner() as runner:
        runner.run(wait())


def test_held_back_past_the_point_of_return() -> None:
    with Signals() as signals:
        signals.hold()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)


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
