"""A hundred saves in one process: no descriptor, thread or memory is left; small peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).parents[1])

#: Shared by both children: what the process has of its own, in KiB. Shared mappings are not in it.
OWN = """
import gc, json, os, sys, threading
sys.path.insert(0, sys.argv[1])
def own_kib():
    gc.collect()
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0])
"""

HUNDRED = (
    OWN
    + """
from smallguests import make_guest, ramblocks_of
from uringmig import MappedRamReader, MappedRamWriter, WriteOptions, verify
folder, engine = sys.argv[2:4]
guest = make_guest(ram_bytes=24 << 20)
options = WriteOptions(channels=2, engine=engine)
seen = []
for number in range(120):
    with MappedRamWriter(f"{folder}/vm", ramblocks_of(guest), options=options) as writer:
        writer.write_all()
        if number % 10 == 9:
            continue  # given up
        writer.finish()
    if number % 20 == 0:
        assert not verify(f"{folder}/vm").mismatches
    seen.append((own_kib(), len(os.listdir("/proc/self/fd")), threading.active_count()))
print(json.dumps(seen))
"""
)

PEAK = (
    OWN
    + """
import time
from uringmig import FileMemory, MappedRamWriter, RamBlock, WriteOptions
folder, guest = sys.argv[2:4]
memory = FileMemory(guest)
peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, own_kib())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
options = WriteOptions(channels=4, depth=16)
with MappedRamWriter(f"{folder}/vm", [RamBlock("ram", memory)], options=options) as writer:
    writer.write_all()
    writer.finish()
running = False
thread.join()
print(json.dumps(peak))
"""
)


def run_child(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, TESTS, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("engine", ["io_uring", "pwrite"])
def test_hundred_saves_leave_nothing(tmp_path: Path, engine: str) -> None:
    seen = run_child(HUNDRED, str(tmp_path), engine)
    assert len(seen) > 100
    memory, descriptors, threads = zip(*seen, strict=True)
    assert set(threads) == {1}
    assert len(set(descriptors)) == 1, descriptors
    settled, last = max(memory[10:20]), max(memory[-10:])
    assert last - settled < 2048, f"grew from {settled} to {last} KiB"


def test_peak_beside_the_guest_is_small(tmp_path: Path) -> None:
    """The guest is a shared file, which is not the process's own; nor is the page cache."""
    guest = tmp_path / "guest"
    piece = bytes(range(1, 256)) * 4096
    with guest.open("wb") as file:
        size = 0
        while size < 256 << 20:
            size += file.write(piece)
        file.truncate(256 << 20)
    peak_kib = run_child(PEAK, str(tmp_path), str(guest))
    assert peak_kib < 100 << 10
