"""The harness's instruments, held against what this test does itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from perf.host import PREFIX, check_same_host, describe_host, device_of
from perf.observe import Costs, ProcessMemory, Watch, cached_bytes, process_cpu
from uringmig.errors import MismatchError
from uringmig.units import MiB

QUIET = Costs(
    seconds=1.0, cpu_s=0.5, user_s=0.1, machine_cpu_s=0.6, steal_s=0.0, foreign_user_s=0.0,
    disk_written=100 * MiB, disk_read=0, cached_growth=0,
)  # fmt: skip


def costs(**changes: float) -> Costs:
    return replace(QUIET, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"steal_s": 0.019}, []),
        ({"steal_s": 0.05}, ["steal 0.05 s"]),
        ({"foreign_user_s": 0.14}, []),
        ({"foreign_user_s": 0.2}, ["others' cpu 0.20 s"]),
        ({"disk_written": 115 * MiB}, []),
        ({"disk_written": 140 * MiB}, ["others' disk traffic 40 MiB"]),
        ({"cache_drops": 1}, ["others dropped the page cache"]),
        ({"disk_read": 50 * MiB, "steal_s": 0.5}, ["steal 0.50 s", "others' disk traffic 50 MiB"]),
    ],
)
def test_disturbances_are_named(changes: dict[str, float], words: list[str]) -> None:
    assert costs(**changes).disturbances(own_written=100 * MiB, own_read=0) == words


def burn(seconds: float) -> None:
    deadline = time.thread_time() + seconds
    while time.thread_time() < deadline:
        pass


def test_processor_time_of_another_process_includes_threads_that_have_ended() -> None:
    program = (
        "import sys, threading, time\n"
        "def burn():\n    end = time.thread_time() + 0.15\n"
        "    while time.thread_time() < end: pass\n"
        "for _ in range(2):\n    t = threading.Thread(target=burn); t.start(); t.join()\n"
        "print(time.process_time(), flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = float(process.stdout.readline())
        seen = process_cpu(process.pid)
    assert told >= 0.3
    assert seen == pytest.approx(told, abs=0.1)


def test_own_work_is_not_foreign() -> None:
    watch = Watch(None)
    watch.start(os.getpid())
    thread = threading.Thread(target=burn, args=(0.2,))
    thread.start()
    thread.join()
    found = watch.stop()
    assert found.cpu_s >= 0.2
    assert found.machine_cpu_s >= 0.1
    assert found.disk_written == 0


def test_cpu_of_a_process_that_has_ended_is_taken_as_told() -> None:
    watch = Watch(None)
    watch.start(None)
    found = watch.stop(cpu=(0.25, 0.5))
    assert (found.cpu_s, found.user_s) == (0.75, 0.25)


def test_cached_bytes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 * MiB))
    cached = cached_bytes(path)
    if cached is None:
        pytest.skip("this kernel has no cachestat (Linux 6.5)")
    assert cached == 3 * MiB
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    assert cached_bytes(path) == 0


def test_memory_of_this_process() -> None:
    found = ProcessMemory.of(os.getpid())
    assert found.peak >= found.anonymous >= 10 * MiB


def test_host_says_what_results_depend_on(tmp_path: Path) -> None:
    host = describe_host(tmp_path)
    assert all(key.startswith(PREFIX) and value for key, value in host.items())
    assert host["host_kernel"] == os.uname().release
    assert list(tmp_path.iterdir()) == []
    shm = describe_host(Path("/dev/shm"))
    assert (shm["host_file_system"], shm["host_device"]) == ("tmpfs", "memory")
    assert device_of(Path("/dev/shm")) is None
    check_same_host(host, dict(host))
    with pytest.raises(MismatchError, match="differs"):
        check_same_host(host, {**host, "host_cpu": "another"})
