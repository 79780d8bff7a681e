"""What one timed stretch cost: processor, disk, page cache, memory, and who else was busy.

The same instruments for every rival: a process is read from outside, by its CPU clock and /proc,
at the beginning and at the end of the stretch. Its io_uring workers (``iou-wrk``) are threads of
it and so are in both; kernel threads that serve it (write-back, loop devices) are not, and show in
``machine_cpu_s`` only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uringmig.options import PAGE_SIZE

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_SECTOR: Final = 512
#: cachestat(2), Linux 6.5; the same number on every architecture.
_SYS_CACHESTAT: Final = 451
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long

#: A round is called disturbed beyond these: share of the wall time stolen, processor seconds a
#: second of other processes (user part: kernel threads that serve the rival have none), and bytes
#: of others on the disk.
STEAL_MAX: Final = 0.02
FOREIGN_CPU_MAX: Final = 0.15
FOREIGN_DISK_SHARE: Final = 0.05
FOREIGN_DISK_LEAST: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Costs:
    """What a stretch cost; seconds and bytes.

    Attributes:
        seconds: its wall time.
        cpu_s: of the observed process, user and system, all of its threads.
        user_s: the user part, to the clock tick.
        machine_cpu_s: of the whole machine, whoever used it.
        steal_s: taken by the hypervisor, over all processors.
        foreign_user_s: user part of the machine's that is neither the process's nor ours.
        disk_written: bytes the device wrote.
        disk_read: bytes the device read.
        cached_growth: growth of the page cache of the machine.
        cache_drops: how often somebody dropped the machine's page cache, see `drop_page_cache`.
    """

    seconds: float
    cpu_s: float
    user_s: float
    machine_cpu_s: float
    steal_s: float
    foreign_user_s: float
    disk_written: int
    disk_read: int
    cached_growth: int
    cache_drops: int = 0

    def disturbances(self, *, own_written: int, own_read: int) -> list[str]:
        """Say what others did meanwhile that may have changed the result; empty is undisturbed.

        Args:
            own_written: bytes the rival wrote to the disk.
            own_read: bytes it read.
        """
        found = []
        if self.steal_s > max(STEAL_MAX * self.seconds, 2 * _TICK_S):
            found.append(f"steal {self.steal_s:.2f} s")
        if self.foreign_user_s > max(FOREIGN_CPU_MAX * self.seconds, 2 * _TICK_S):
            found.append(f"others' cpu {self.foreign_user_s:.2f} s")
        if self.cache_drops:
            found.append("others dropped the page cache")
        moved, own = self.disk_written + self.disk_read, own_written + own_read
        if moved - own > max(FOREIGN_DISK_LEAST, FOREIGN_DISK_SHARE * own):
            found.append(f"others' disk traffic {(moved - own) >> 20} MiB")
        return found


@dataclass(frozen=True, slots=True)
class _Reading:
    """All instruments at one moment."""

    at: float
    process_cpu: float
    process_user: float
    own_user: float
    machine: tuple[float, float, float]
    disk: tuple[int, int]
    cached: int
    cache_drops: int


class Watch:
    """Observes one stretch: `start`, then `stop`.

    Args:
        device: ``major:minor`` of the disk, or None where there is none (tmpfs).
    """

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._pid: int | None = None
        self._before: _Reading | None = None

    def start(self, pid: int | None) -> None:
        """Begin; ``pid`` is the rival's process, None one that does not run yet."""
        self._pid = pid
        self._before = self._read()

    def stop(self, *, cpu: tuple[float, float] | None = None) -> Costs:
        """End; ``cpu`` is (user, system) seconds of a process that has ended meanwhile."""
        assert self._before is not None, "stop() before start()"
        before, after = self._before, self._read()
        user = after.process_user - before.process_user
        total = after.process_cpu - before.process_cpu
        if cpu is not None:
            user, total = cpu[0], sum(cpu)
        busy, steal, machine_user = (
            new - old for old, new in zip(before.machine, after.machine, strict=True)
        )
        return Costs(
            seconds=after.at - before.at,
            cpu_s=total,
            user_s=user,
            machine_cpu_s=busy,
            steal_s=steal,
            foreign_user_s=max(0.0, machine_user - user - (after.own_user - before.own_user)),
            disk_written=after.disk[1] - before.disk[1],
            disk_read=after.disk[0] - before.disk[0],
            cached_growth=after.cached - before.cached,
            cache_drops=after.cache_drops - before.cache_drops,
        )

    def _read(self) -> _Reading:
        return _Reading(
            at=time.monotonic(),
            process_cpu=0.0 if self._pid is None else process_cpu(self._pid),
            process_user=0.0 if self._pid is None else _user_time(self._pid),
            own_user=os.times().user,
            machine=_machine(),
            disk=(0, 0) if self._device is None else disk_traffic(self._device),
            cached=_cached(),
            cache_drops=cache_drops(),
        )


def process_cpu(pid: int) -> float:
    """Processor seconds of a process so far: all threads, also those that have ended."""
    # clock_getcpuclockid(3): CPUCLOCK_SCHED is 2, and a process clock has bit 2 clear.
    return time.clock_gettime((~pid << 3) | 2)


def _user_time(pid: int) -> float:
    """User part of it.  proc(5): field 14 of stat; the name before may hold anything."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[11]) * _TICK_S


def _machine() -> tuple[float, float, float]:
    """(busy, stolen, user) seconds of all processors so far.  proc(5): /proc/stat."""
    with Path("/proc/stat").open() as lines:
        fields = [int(word) * _TICK_S for word in next(lines).split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return user + nice + system + irq + softirq, steal, user + nice


def disk_traffic(device: str) -> tuple[int, int]:
    """(read, written) bytes of a device so far.  Kernel: Documentation/admin-guide/iostats.rst."""
    words = Path(f"/sys/dev/block/{device}/stat").read_text().split()
    return int(words[2]) * _SECTOR, int(words[6]) * _SECTOR


def _cached() -> int:
    """Bytes of page cache of the machine, tmpfs included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) << 10
    return 0


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of a process in bytes: the peak with the guest's mapped pages, and its own now."""

    peak: int
    anonymous: int

    @classmethod
    def of(cls, pid: int) -> ProcessMemory:
        """Read it.  proc(5): VmHWM and RssAnon of status."""
        values = {}
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                values[name] = int(value.split()[0]) << 10
        return cls(peak=values.get("VmHWM", 0), anonymous=values.get("RssAnon", 0))


def cached_bytes(path: Path) -> int | None:
    """Bytes of a file in the page cache, or None where the kernel cannot tell (before 6.5)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        everything = (ctypes.c_uint64 * 2)(0, 0)  # length 0 is "to the end"
        result = (ctypes.c_uint64 * 5)()
        status = _LIBC.syscall(
            _SYS_CACHESTAT, fd, ctypes.byref(everything), ctypes.byref(result), ctypes.c_uint(0)
        )
    finally:
        os.close(fd)
    return None if status else int(result[0]) * PAGE_SIZE


def wait_until_idle(*, timeout_s: float) -> None:
    """Wait until the processors have little to do, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        before, started = _machine()[0], time.monotonic()
        time.sleep(0.1)
        if _machine()[0] - before < 0.2 * (time.monotonic() - started):
            return


def cache_drops() -> int:
    """How often anybody has dropped the page cache since the machine started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("drop_pagecache "):
            return int(line.split()[1])
    return 0


def drop_page_cache() -> None:
    """Drop the clean pages of every file; without root nothing happens.

    Never while a guest's memory in /dev/shm is in use: the kernel marks pages of tmpfs that it
    cannot drop (PG_reclaim), and maps marked ones in singly instead of sixteen at a fault, which
    makes every save afterwards cost three times the processor time.
    """
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def drop_file_cache(path: Path) -> None:
    """Drop what of one file is in the page cache; it has to be durable already."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
