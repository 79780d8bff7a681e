"""Ctrl-C in a program of somebody else's that uses the library: Python's own KeyboardInterrupt.

It may strike anywhere, again and again, in clean-ups too: no name is published by half, nothing
hangs, and no channel goes on after its descriptor is closed.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from smallguests import (
    MIB,
    OPTIONS,
    PWRITE,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import MappedRamWriter, ReadOptions, Snapshot
from uringmig.contents.opening import open_contents
from uringmig.contents.source import all_rows

#: Saves a guest again and again until it is interrupted; then says so.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from smallguests import OPTIONS, PWRITE, make_guest, ramblocks_of
from uringmig import MappedRamWriter
guest = make_guest(1)
print("ready", flush=True)
try:
    while True:
        with MappedRamWriter(sys.argv[2], ramblocks_of(guest), options=OPTIONS) as writer:
            writer.write_all()
            writer.finish()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("phase", ["write", "bitmaps", "devices", "sync", "publish"])
def test_raised_by_a_callback(phase: str, tmp_path: Path) -> None:
    """Whatever the phase: nothing is there, and no thread is left."""

    def interrupt(snapshot: Snapshot) -> None:
        if snapshot.phase == phase:
            raise KeyboardInterrupt

    def save() -> None:
        with MappedRamWriter(
            tmp_path / "vm",
            ramblocks_of(make_guest()),
            options=OPTIONS,
            engine=PWRITE,
            progress=interrupt,
        ) as writer:
            writer.write_all()
            writer.finish()

    with pytest.raises(KeyboardInterrupt):
        save()
    assert left_in(tmp_path) == []
    assert not [one for one in threading.enumerate() if one.name.startswith("multifd")]


def test_of_whoever_reads_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is closed only when no channel reads it any more, though the wait is struck."""
    with MappedRamWriter(
        tmp_path / "vm", ramblocks_of(make_guest(ram_bytes=64 * MIB)), options=OPTIONS
    ) as writer:
        writer.write_all()
        writer.finish()
    join, strikes = threading.Thread.join, iter([KeyboardInterrupt, KeyboardInterrupt])

    def struck(thread: threading.Thread, timeout: float | None = None) -> None:
        if threading.current_thread() is threading.main_thread() and next(strikes, None):
            raise KeyboardInterrupt
        join(thread, timeout)

    def read_one() -> None:
        slow = ReadOptions(channels=2, rate=16 * MIB)
        with open_contents(tmp_path / "vm", options=slow) as contents:
            windows = contents.windows(all_rows(contents.blocks))
            next(iter(windows))
            monkeypatch.setattr(threading.Thread, "join", struck)
            windows.close()  # type: ignore[attr-defined]  # it is a generator

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        read_one()
    assert threading.active_count() == before
    assert next(strikes, None) is None, "the wait was struck"


def test_at_random_moments(tmp_path: Path) -> None:
    """One or several: it ends by itself, and what has the name is whole."""
    source = random.Random(20261126)
    contents = copy_of(make_guest(1, ram_bytes=9 * MIB))
    tests = str(Path(__file__).parents[1])
    for number in range(12):
        path = tmp_path / f"{number}"
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, tests, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            for _ in range(1 + number % 3):
                time.sleep(source.uniform(0, 0.2))
                child.send_signal(signal.SIGINT)
            _, errors = child.communicate()
        # A second one may meet the last line or the interpreter's own end: Python says so then.
        assert child.returncode in (0, 1, 130, -signal.SIGINT), errors
        assert "Error: " not in errors.replace("KeyboardInterrupt", ""), errors
        if path.exists():
            check_image(path, contents)
