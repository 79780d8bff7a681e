"""Archive jobs of running VMs, whatever their RAM: the guest goes on while it is copied."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batchjobs import (
    check_archive,
    first_event,
    job,
    job_ends,
    run_jobs,
    start_jobs,
    write_jobs,
)
from commandline import Ended, finish, uringmig
from hugepool import pool_count, pool_of
from numpy.typing import NDArray
from realguest import (
    FILL_BYTES,
    GUEST_BYTES,
    StartMachine,
    assert_goes_on,
    put_to_sleep,
    shared_path,
)

from uringmig.testing.guestimage import GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import MiB

#: Backend and tier: each kind of RAM once, each tier with memory that is mapped and that is read.
KINDS = {
    "-m": ("", "hot"),
    "memfd": ("memory-backend-memfd,share=on", "cold"),
    "memfd private": ("memory-backend-memfd,share=off", "cold"),
    "file shared": ("memory-backend-file,mem-path={file},share=on", "hot"),
    "folder": ("memory-backend-file,mem-path=/dev/shm,share=on", "hot"),
}


def kept(machine: Machine) -> tuple[Any, ...]:
    """All that QEMU keeps and that a job might change."""
    monitor = machine.monitor
    return monitor.capabilities(), monitor.parameters(), monitor.descriptors()


def host_bytes(machine: Machine) -> int:
    rollup = Path(f"/proc/{machine.process.pid}/smaps_rollup").read_text()
    return 1024 * int(rollup.split("Rss:")[1].split()[0])


def restore(folder: Path, entry: str, target: Machine) -> None:
    done = uringmig(
        "archive", "restore", folder / "archive", entry, "--qmp", target.qmp_path, "--then", "cont"
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", KINDS)
def test_any_ram_is_archived_while_its_guest_goes_on(
    name: str, guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    """A low rate makes the copy long, and the guest stands still for a small part of it.

    The entry is of the end of the copy, not of its beginning; nothing of QEMU's is changed.
    """
    backend, tier = KINDS[name]
    file = shared_path()
    try:
        machine = start_machine(
            memory_bytes=GUEST_BYTES,
            backend=backend.format(file=file),
            guest=guest,
            fill_bytes=FILL_BYTES,
        )
        digest = machine.console.wait_until_ready()
    finally:
        file.unlink(missing_ok=True)
    before, held, count = kept(machine), host_bytes(machine), machine.console.count()
    one = job("vm", f"qmp = '{machine.qmp_path}'", rate="12M", tier=tier, verify=True, retries=0)
    path = write_jobs(tmp_path, one, defaults='entry = "{name}"\nlevel = 1')
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    end = job_ends(ended)["vm"]
    archived = end["archived"]
    assert (end["notes"], end["warnings"], archived["kind"]) == ([], [], "qmp")
    assert 0 < archived["stopped_seconds"] < archived["seconds"] / 2
    assert machine.monitor.run_state() == "running"
    assert machine.monitor.run_events() == ("STOP", "RESUME")
    assert kept(machine) == before
    assert host_bytes(machine) - held < 8 * MiB, "looking at memory allocated some"
    assert_goes_on(machine)
    entry = check_archive(tmp_path / "archive")["vm"]
    facts = json.loads(Path(entry.manifest).read_bytes())["guest"]
    assert any(one["block"] == "pc.ram" for one in facts["memory_map"])
    target = start_machine(memory_bytes=GUEST_BYTES, backend="", guest=guest, incoming=True)
    restore(tmp_path, "vm", target)
    assert target.console.digest() == digest
    assert target.console.count() > count + 1, "what it did during the copy is not in the entry"
    assert_goes_on(target)


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("state", ["paused", "prelaunch", "suspended", "guest-panicked"])
def test_a_guest_is_left_in_the_state_it_was_found_in(
    state: str, tier: str, start_machine: StartMachine, tmp_path: Path
) -> None:
    """And restored into it."""
    arguments = ["-device", "pvpanic", "-action", "panic=pause"]
    machine = start_machine(
        memory_bytes=64 * MiB, backend="", paused=state == "prelaunch", arguments=arguments
    )
    if state == "paused":
        machine.monitor.execute("stop")
    elif state == "suspended":
        put_to_sleep(machine)
    elif state == "guest-panicked":
        machine.monitor.human("o/b 0x505 1")
    while machine.monitor.run_state() != state:
        time.sleep(0.01)
    before = kept(machine)
    path = write_jobs(
        tmp_path,
        job("vm", f"qmp = '{machine.qmp_path}'", tier=tier, retries=0),
        defaults='entry = "{name}"',
    )
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    assert machine.monitor.run_state() == state
    assert kept(machine) == before
    stopped = job_ends(ended)["vm"]["archived"]["stopped_seconds"]
    assert (stopped > 0) == (state == "suspended")
    waiting = start_machine(memory_bytes=64 * MiB, backend="", incoming=True, arguments=arguments)
    done = uringmig(
        "archive", "restore", tmp_path / "archive", "vm", "--qmp", waiting.qmp_path, "--then",
        "leave",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert waiting.monitor.run_state() == state


def change_meanwhile(machine: Machine, folder: Path, change: Callable[[], object]) -> Ended:
    """Archive with a low rate and do something while the guest runs and is copied."""
    with machine_memory(machine) as memory:
        memory[:] = np.random.default_rng(1).integers(0, 256, len(memory), np.uint8)
    one = job("vm", f"qmp = '{machine.qmp_path}'", rate="8M", retries=3)
    process = start_jobs(write_jobs(folder, one, defaults='entry = "{name}"'))
    first_event(process, "progress", job="vm", phase="write")
    change()
    return finish(process)


@contextmanager
def machine_memory(machine: Machine) -> Iterator[NDArray[np.uint8]]:
    """The second half of a machine's RAM, to be filled."""
    address = machine.monitor.ram_blocks()[0].host_address
    assert address is not None
    memory = np.zeros(16 * MiB, np.uint8)
    yield memory
    with Path(f"/proc/{machine.process.pid}/mem").open("r+b", buffering=0) as file:
        file.seek(address + 32 * MiB)
        file.write(memory.tobytes())


def test_memory_that_is_plugged_in_meanwhile(start_machine: StartMachine, tmp_path: Path) -> None:
    """The copy would lack it: it begins anew, and has it."""
    machine = start_machine(
        memory_bytes=64 * MiB,
        backend="",
        arguments=["-m", "64M,slots=2,maxmem=256M", "-object", "memory-backend-ram,id=m,size=64M"],
    )
    ended = change_meanwhile(
        machine,
        tmp_path,
        lambda: machine.monitor.execute("device_add", driver="pc-dimm", id="d", memdev="m"),
    )
    assert ended.code == 0, ended.err
    end = job_ends(ended)["vm"]
    assert (end["attempts"], machine.monitor.run_state()) == (2, "running")
    assert any("RAM changed" in note for note in end["notes"])
    assert end["archived"]["memory_bytes"] > 128 * MiB
    check_archive(tmp_path / "archive")


def test_a_device_that_cannot_be_saved_comes_meanwhile(
    start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU would die of being asked for its state; the guest is not even stopped."""
    disk = "driver=null-co,read-zeroes=on,node-name=disk,size=1048576"
    machine = start_machine(
        memory_bytes=64 * MiB,
        backend="",
        arguments=["-device", "pcie-root-port,id=rp", "-blockdev", disk],
    )
    ended = change_meanwhile(
        machine,
        tmp_path,
        lambda: machine.monitor.execute(
            "device_add", driver="nvme", id="d", drive="disk", serial="1", bus="rp"
        ),
    )
    assert ended.code == 4
    assert "nvme" in job_ends(ended)["vm"]["error"]
    assert machine.monitor.run_state() == "running"
    assert "STOP" not in machine.monitor.run_events()
    assert not check_archive(tmp_path / "archive")


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("share", ["on", "off"])
def test_huge_pages_of_a_running_guest(
    share: str, tier: str, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Looking at them again and again takes none of those that its guest has not touched."""
    backend = f"memory-backend-memfd,hugetlb=on,share={share}"
    with pool_of(40):
        machine = start_machine(memory_bytes=64 * MiB, backend=backend)
        with machine_memory(machine) as memory:
            memory[:] = np.random.default_rng(1).integers(0, 256, len(memory), np.uint8)
        free = pool_count("Free")
        one = job("vm", f"qmp = '{machine.qmp_path}'", rate="12M", tier=tier, retries=0)
        ended = run_jobs(write_jobs(tmp_path, one, defaults='entry = "{name}"\nlevel = 1'))
        assert ended.code == 0, ended.err
        assert pool_count("Free") > free // 2, "holes were looked at; the firmware takes one or two"
        archived = job_ends(ended)["vm"]["archived"]
        assert 0 < archived["stopped_seconds"] < archived["seconds"] / 2
        assert archived["stored_bytes"] > len(memory)
        check_archive(tmp_path / "archive")
        machine.close()
