"""The rivals: each saves the same guest to a fresh file in the same folder, or loads one image.

A rival says what it is (`Rival.settings`), runs once, and gives back a `Measured`. Its clock and
its costs begin when it is ready: what it takes to start a Python or a QEMU is told apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec

from perf.child import Answer, Job
from perf.observe import Costs, ProcessMemory, Watch
from perf.workloads import GuestRam, backend_of
from uringmig.errors import HostError, PeerError
from uringmig.options import PAGE_SIZE, DirectMode, WriteOptions
from uringmig.qemu.restore import load_into
from uringmig.testing.machine import Machine
from uringmig.units import KiB, MiB

Kind = Literal["save", "load"]
#: How a file is made ready before fio writes it.
Preparation = Literal["sized", "extended", "fallocated"]
#: Who a rival is, for ratios: the ceiling is of ``fio``, QEMU's best of ``qemu``.
Group = Literal["uringmig", "twin", "qemu", "fio"]

ROOT: Final = Path(__file__).parents[1]
_BRIDGE: Final = WriteOptions().bridge
#: Longer than any save here; for hangs.
_PATIENCE_S: Final = 900.0
#: Between two looks at QEMU's migration: an error of 2.5 ms on average, and hardly any processor.
_POLL_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Task:
    """What a rival is given.

    Attributes:
        ram: the guest's memory.
        image: the file to make or, for a load, to read.
        scratch: an empty folder with a short name, for sockets and logs.
        device: ``major:minor`` of the disk, or None.
        direct: O_DIRECT where rivals may choose: off on a file system without it.
    """

    ram: GuestRam
    image: Path
    scratch: Path
    device: str | None
    direct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one run of a rival took; seconds and bytes.

    Attributes:
        completed_s: until the last byte was written, or the load was done.
        durable_s: and until the end of ``fdatasync``; ours with rename and manifest besides.
        startup_s: of the process, before its clock began.
        moved_bytes: guest pages written or read.
        requests: 0 where the rival does not tell.
        account: seconds by activity; ours only.
        timeline: (seconds, bytes) while it ran.
    """

    completed_s: float
    durable_s: float
    costs: Costs
    memory: ProcessMemory
    startup_s: float = 0.0
    moved_bytes: int = 0
    requests: int = 0
    account: dict[str, float] = field(default_factory=dict)
    timeline: list[tuple[float, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Rival(Protocol):
    """One way to do the work."""

    @property
    def name(self) -> str:
        """Short and unique; also what ``--rivals`` matches."""

    @property
    def group(self) -> Group:
        """Who it is."""

    @property
    def kind(self) -> Kind:
        """What it does."""

    @property
    def settings(self) -> dict[str, str | int]:
        """All that distinguishes it; two results are compared only if equal."""

    def run(self, task: Task) -> Measured:
        """Do the work once.

        Raises:
            UringmigError: it failed; the message has the cause.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """uringmig in a process of its own.

    Attributes:
        label: for the name, where the settings are not what it is about.
        route: the RAM file alone, or a whole machine over QMP, its memory read from outside.
        twin: an engine that has no disk: our own overhead alone.
        rate: limit in bytes a second, see `TransferOptions`.
        bridge: shorter gaps are written through; 0 makes a request of every run of pages.
    """

    channels: int = 2
    depth: int = 8
    block_size: int = MiB
    bridge: int = _BRIDGE
    engine: Literal["io_uring", "pwrite"] = "io_uring"
    direct: DirectMode = "preferred"
    manifest: bool = False
    route: Literal["file", "machine"] = "file"
    twin: Literal["null", "memory"] | None = None
    kind: Kind = "save"
    label: str = ""
    rate: int = 0

    @property
    def group(self) -> Group:
        """Twins move no byte to the disk and are no contestants."""
        return "twin" if self.twin else "uringmig"

    @property
    def name(self) -> str:
        """For example ``uringmig io_uring 2x8x1M``: channels, depth, block size."""
        words = ["uringmig", self.label or self.twin or self.engine]
        words.append(f"{self.channels}x{self.depth}x{size_name(self.block_size)}")
        words += ["unbridged"] if not self.bridge else []
        words += ["+manifest"] if self.manifest else []
        words += ["buffered"] if self.direct == "off" else []
        return " ".join(words)

    @property
    def settings(self) -> dict[str, str | int]:
        """Every option that is not the default of all."""
        return {
            "channels": self.channels,
            "depth": self.depth,
            "block_size": self.block_size,
            "engine": self.twin or self.engine,
            "direct": self.direct,
            "manifest": int(self.manifest),
            "route": self.route,
            "rate": self.rate,
            "bridge": self.bridge,
        }

    def run(self, task: Task) -> Measured:
        """Have a child do it."""
        options: dict[str, int | str | bool] = {
            "channels": self.channels,
            "depth": self.depth,
            "block_size": self.block_size,
            "bridge": self.bridge,
            "engine": self.engine,
            "direct": self.direct if task.direct else "off",
            "rate": self.rate,
        }
        if self.kind == "save":
            options["manifest"] = self.manifest
        job = Job(
            action="save" if self.kind == "save" else "read",
            ram=str(task.ram.path),
            image=str(task.image),
            engine=self.twin,
            options=options,
        )
        if self.route == "file":
            return _run_child(job, task)
        with machine_of(task) as machine:
            job.qmp = str(machine.qmp_path)
            return _run_child(job, task)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """QEMU's own writer or loader.

    Attributes:
        mapped: mapped-ram; otherwise a plain stream in a file.
        channels: multifd channels; 0 is without multifd.
        direct: its direct-io.
        touched: its memory is mapped in before, as after a guest has used it (``-mem-prealloc``);
            otherwise QEMU meets it for the first time, as we do.
    """

    mapped: bool = True
    channels: int = 0
    direct: bool = False
    touched: bool = False
    kind: Kind = "save"

    @property
    def group(self) -> Group:
        """QEMU's."""
        return "qemu"

    @property
    def name(self) -> str:
        """For example ``qemu mapped-ram multifd x2 direct``."""
        words = ["qemu", "mapped-ram" if self.mapped else "plain"]
        words += [f"multifd x{self.channels}"] if self.channels else []
        words += ["direct"] if self.direct else []
        return " ".join([*words, *(["touched"] if self.touched else [])])

    @property
    def settings(self) -> dict[str, str | int]:
        """Its capabilities and parameters."""
        return {
            "mapped": int(self.mapped),
            "channels": self.channels,
            "direct": int(self.direct),
            "touched": int(self.touched),
        }

    def run(self, task: Task) -> Measured:
        """Have a QEMU do it."""
        started = time.monotonic()
        arguments = ["-mem-prealloc"] if self.touched else []
        with machine_of(task, incoming=self.kind == "load", arguments=arguments) as machine:
            startup_s = time.monotonic() - started
            monitor = machine.monitor
            monitor.set_capabilities(**{"mapped-ram": self.mapped, "multifd": self.channels > 0})
            # 0 lifts the limit of 128 MiB/s that is meant for networks.
            parameters: dict[str, object] = {"max-bandwidth": 0}
            parameters |= {"multifd-channels": self.channels} if self.channels else {}
            parameters |= {"direct-io": True} if self.direct and task.direct else {}
            monitor.set_parameters(**parameters)
            verb = "migrate" if self.kind == "save" else "migrate-incoming"
            watch = Watch(task.device)
            watch.start(machine.process.pid)
            began = time.monotonic()
            monitor.execute(verb, uri=f"file:{task.image}")
            timeline, info = _follow(machine, began)
            completed_s = time.monotonic() - began
            if self.kind == "save":
                _sync(task.image)
            durable_s = time.monotonic() - began
            ram = info.get("ram", {})
            return Measured(
                completed_s=completed_s,
                durable_s=durable_s,
                costs=watch.stop(),
                memory=ProcessMemory.of(machine.process.pid),
                startup_s=startup_s,
                moved_bytes=_pages_moved(task, ram, self.kind),
                timeline=timeline,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """``uringmig load``: our checks, then QEMU's own loader with the best settings."""

    channels: int = 2
    direct: DirectMode = "preferred"

    @property
    def group(self) -> Group:
        """Ours, though QEMU reads the file."""
        return "uringmig"

    @property
    def kind(self) -> Kind:
        """It loads."""
        return "load"

    @property
    def name(self) -> str:
        """For example ``uringmig load x2``."""
        return f"uringmig load x{self.channels}"

    @property
    def settings(self) -> dict[str, str | int]:
        """Its options."""
        return {"channels": self.channels, "direct": self.direct}

    def run(self, task: Task) -> Measured:
        """Load into a waiting QEMU, the checks before included."""
        started = time.monotonic()
        with machine_of(task, incoming=True) as machine:
            startup_s = time.monotonic() - started
            watch = Watch(task.device)
            watch.start(machine.process.pid)
            began = time.monotonic()
            result = load_into(
                machine.monitor,
                task.image,
                channels=self.channels,
                direct=self.direct if task.direct else "off",
            )
            seconds = time.monotonic() - began
            return Measured(
                completed_s=seconds,
                durable_s=seconds,
                costs=watch.stop(),
                memory=ProcessMemory.of(machine.process.pid),
                startup_s=startup_s,
                moved_bytes=result.page_bytes,
                notes=list(result.notes),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fio:
    """The ceiling: fio writes as many bytes as the guest has, from one buffer it reuses."""

    engine: Literal["io_uring", "psync"] = "io_uring"
    jobs: int = 1
    depth: int = 16
    block_size: int = MiB
    preparation: Preparation = "sized"

    @property
    def group(self) -> Group:
        """The ceiling's."""
        return "fio"

    @property
    def kind(self) -> Kind:
        """It writes."""
        return "save"

    @property
    def name(self) -> str:
        """For example ``fio io_uring 1x16x1M sized``."""
        size = size_name(self.block_size)
        return f"fio {self.engine} {self.jobs}x{self.depth}x{size} {self.preparation}"

    @property
    def settings(self) -> dict[str, str | int]:
        """Its options."""
        return {
            "engine": self.engine,
            "jobs": self.jobs,
            "depth": self.depth,
            "block_size": self.block_size,
            "preparation": self.preparation,
        }

    def run(self, task: Task) -> Measured:
        """Prepare the file, then write it."""
        total = task.ram.workload.memory_bytes
        _prepare(task.image, total, self.preparation)
        share = total // self.jobs
        command = [
            *["fio", "--name=ceiling", f"--filename={task.image}", "--rw=write", "--thread"],
            *[f"--ioengine={self.engine}", f"--direct={int(task.direct)}", "--fallocate=none"],
            *[f"--bs={self.block_size}", f"--iodepth={self.depth}", f"--numjobs={self.jobs}"],
            *[f"--size={share}", f"--offset_increment={share}"],
            *["--group_reporting", "--output-format=json"],
        ]
        _call_fio(["fio", "--version"], task.scratch)  # brings the program into the cache
        watch = Watch(task.device)
        watch.start(None)
        used = os.times()
        output = _call_fio(command, task.scratch)
        now = os.times()
        spent = now.children_user - used.children_user, now.children_system - used.children_system
        began = time.monotonic()
        _sync(task.image)
        sync_s = time.monotonic() - began
        # A warning of fio's may stand before its JSON.
        [report] = json.loads(output[output.index("{") :])["jobs"]
        completed_s = report["write"]["runtime"] / 1000
        run_s = report["job_runtime"] / 1000
        # The watch is told all that fio spent, so that none of it counts as others' work. The
        # figure is only what fio's job spent: getting ready is left out.
        costs = replace(
            watch.stop(cpu=spent),
            cpu_s=(report["usr_cpu"] + report["sys_cpu"]) / 100 * run_s,
            user_s=report["usr_cpu"] / 100 * run_s,
        )
        return Measured(
            completed_s=completed_s,
            durable_s=completed_s + sync_s,
            costs=costs,
            memory=ProcessMemory(peak=0, anonymous=0),
            moved_bytes=int(report["write"]["io_bytes"]),
            requests=int(report["write"]["total_ios"]),
        )


def size_name(size_bytes: int) -> str:
    """A block size as in names of rivals: ``512K``, ``1M``."""
    return f"{size_bytes // MiB}M" if size_bytes % MiB == 0 else f"{size_bytes // KiB}K"


@contextmanager
def machine_of(
    task: Task, *, incoming: bool = False, arguments: Sequence[str] = ()
) -> Iterator[Machine]:
    """A stopped QEMU with the guest's memory; a waiting one has fresh memory of its own."""
    workload = task.ram.workload
    of_file = workload.ram == "file" and not incoming
    with ExitStack() as stack:
        with backend_of(workload.ram) as backend:
            machine = stack.enter_context(
                Machine(
                    task.scratch,
                    memory_bytes=workload.memory_bytes,
                    shared=task.ram.path if of_file else None,
                    keep_shared=of_file,
                    backend=backend,
                    paused=True,
                    incoming=incoming,
                    arguments=arguments,
                )
            )
        if not of_file and not incoming:
            task.ram.copy_into(machine.monitor, machine.process.pid)
        yield machine


def _run_child(job: Job, task: Task) -> Measured:
    """Start a child, wait until it is ready, give it the job, and observe it until it answers."""
    errors = task.scratch / "child.log"
    started = time.monotonic()
    with (
        errors.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "perf.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise PeerError(f"uringmig's process did not start: {_tail(errors)}")
            startup_s = time.monotonic() - started
            watch = Watch(task.device)
            watch.start(process.pid)
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise PeerError(f"uringmig's process ended without an answer: {_tail(errors)}")
            costs = watch.stop()
            answer = msgspec.json.decode(line, type=Answer)
            if answer.error is not None:
                raise PeerError(answer.error)
            memory = ProcessMemory.of(process.pid)
        except BaseException:
            process.kill()
            raise
        process.stdin.close()
    return Measured(
        completed_s=answer.completed_s,
        durable_s=answer.durable_s,
        costs=costs,
        memory=memory,
        startup_s=startup_s,
        moved_bytes=answer.written_bytes + answer.read_bytes,
        requests=answer.requests,
        account=answer.account,
        timeline=answer.timeline,
        notes=answer.notes,
    )


def _tail(log: Path) -> str:
    """The last words of a process."""
    return log.read_text(errors="replace").strip()[-500:] or "it said nothing"


def _follow(machine: Machine, began: float) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """Wait for the end of QEMU's migration, noting how it goes on."""
    timeline: list[tuple[float, int]] = []
    while True:
        migration = machine.monitor.migration()
        seconds = time.monotonic() - began
        ram = migration.info.get("ram", {})
        timeline.append((seconds, int(ram.get("transferred", 0))))
        if migration.status == "completed":
            return timeline, dict(migration.info)
        if migration.ended and migration.status != "none":
            raise PeerError(f"QEMU's migration {migration.status}: {migration.error}")
        if seconds > _PATIENCE_S:
            raise PeerError(f"QEMU's migration did not end within {_PATIENCE_S:g} s")
        time.sleep(_POLL_S)


def _pages_moved(task: Task, ram: Mapping[str, Any], kind: Kind) -> int:
    """Bytes of pages QEMU moved; of a load it does not tell, but then it read the guest's."""
    if kind == "load":
        return task.ram.nonzero_pages * PAGE_SIZE
    return int(ram.get("normal-bytes", 0))


def _sync(path: Path) -> None:
    """Make a file that somebody else wrote durable."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _call_fio(command: Sequence[str], folder: Path) -> str:
    """Run fio and return what it prints.

    Raises:
        HostError: there is no fio here.
        PeerError: it failed, with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except FileNotFoundError:
        raise HostError("fio is not installed; ci/setup installs it") from None
    if done.returncode:
        raise PeerError(f"fio failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _prepare(path: Path, size: int, preparation: Preparation) -> None:
    """Make the file that fio finds."""
    if preparation == "extended":
        return
    path.touch(mode=0o600)
    if preparation == "sized":
        os.truncate(path, size)
    else:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
