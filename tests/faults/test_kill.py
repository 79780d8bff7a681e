"""kill -9 at every step and at random times: the name is the former image or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
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

from uringmig import MappedRamWriter, verify

#: Calls of the operating system that the storage modules make; each is a place to die at.
CALLS = (
    "open", "close", "ftruncate", "pwrite", "pwritev", "pread", "fdatasync", "fsync", "rename",
    "unlink", "fchmod", "fstat", "stat", "posix_fadvise",
)  # fmt: skip

#: Saves guest NUMBER to PATH; dies before its STEP-th call if that is not 0; prints the calls.
CHILD = """
import os, signal, sys, threading
tests, path, number, step, calls = sys.argv[1:6]
sys.path.insert(0, tests)
from smallguests import OPTIONS, PWRITE, make_guest, ramblocks_of
from uringmig import MappedRamWriter
from uringmig.storage import pwrite
lock, made = threading.Lock(), []
def deadly(name, call):
    def wrapped(*args, **named):
        with lock:
            made.append(name)
            if len(made) == int(step):
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **named)
    return wrapped
guest = make_guest(int(number), ram_bytes=int(sys.argv[6]))
for name in calls.split(","):
    setattr(os, name, deadly(name, getattr(os, name)))
made.clear()
print("ready", flush=True)
with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS, engine=PWRITE) as writer:
    writer.write_all()
    writer.finish()
print(" ".join(made))
"""


def start_child(
    path: Path, *, number: int, step: int, ram_bytes: int, calls: tuple[str, ...] = CALLS
) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    arguments = [tests, str(path), str(number), str(step), ",".join(calls), str(ram_bytes)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True
    )


def save(path: Path, number: int, *, ram_bytes: int) -> None:
    guest = make_guest(number, ram_bytes=ram_bytes)
    with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS, engine=PWRITE) as writer:
        writer.write_all()
        writer.finish()


def check_whole(path: Path, guests: list[dict[str, bytes]]) -> int:
    """Which of the guests the image is of; its manifest, if there is one, is its own."""
    for number, contents in enumerate(guests):
        try:
            check_image(path, contents)
        except AssertionError:
            continue
        assert not verify(path).mismatches
        return number
    raise AssertionError("the name is of an image that nobody saved")


def test_killed_at_every_single_step(tmp_path: Path) -> None:
    """Before any call, and with or without a former image: whole, and the next save succeeds."""
    size = MIB // 2
    guests = [copy_of(make_guest(number, ram_bytes=size)) for number in (0, 1)]
    path = tmp_path / "vm"
    save(path, 0, ram_bytes=size)
    found = []
    step = 0
    while True:
        step += 1
        child = start_child(path, number=1, step=step, ram_bytes=size)
        output, _ = child.communicate()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, output
        found.append(check_whole(path, guests))
        # What is left beside it is told by its name, and gone after the next save.
        others = {"vm.partial", "vm.manifest.json", "vm.manifest.json.partial"}
        others |= {"vm.former~", "vm.manifest.json.former~"}
        assert set(left_in(tmp_path)) <= {"vm"} | others
        save(path, 0, ram_bytes=size)
        assert check_whole(path, guests) == 0
        assert left_in(tmp_path) == ["vm", "vm.manifest.json"]
    assert step > 20
    # First always the former image, then always the new one, and both were seen.
    assert found == sorted(found)
    assert set(found) == {0, 1}
    assert check_whole(path, guests) == 1


@pytest.mark.parametrize("call", ["rename", "unlink", "fsync", "fdatasync"])
def test_killed_at_the_steps_of_publication_without_a_former_image(
    tmp_path: Path, call: str
) -> None:
    """There is no name, or it is of the whole new image."""
    size = MIB // 2
    guests = [copy_of(make_guest(1, ram_bytes=size))]
    path = tmp_path / "vm"
    for step in range(1, 20):
        child = start_child(path, number=1, step=step, ram_bytes=size, calls=(call,))
        child.communicate()
        if path.exists():
            check_whole(path, guests)
            path.unlink()
            Path(f"{path}.manifest.json").unlink(missing_ok=True)
        if child.returncode == 0:
            assert step > 1, f"{call} is never called"
            return
    raise AssertionError("more steps than there can be")


def test_killed_at_random_times(tmp_path: Path) -> None:
    """The seed gives the times; what the machine makes of them may be any moment of the save."""
    size = 24 * MIB
    source = random.Random(20)
    path = tmp_path / "vm"
    guests = [copy_of(make_guest(number, ram_bytes=size)) for number in (0, 1)]
    save(path, 0, ram_bytes=size)
    child = start_child(path, number=0, step=0, ram_bytes=size)
    assert child.stdout is not None
    child.stdout.readline()
    began = time.monotonic()
    child.communicate()
    longest = time.monotonic() - began
    now = 0
    ends = set()
    for _ in range(30):
        child = start_child(path, number=1 - now, step=0, ram_bytes=size)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(source.uniform(0, longest))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        ends.add(child.returncode)
        now = check_whole(path, guests)
    assert -signal.SIGKILL in ends
