"""Real QEMUs and a real guest: fixtures that conftest loads. A skip says what is missing."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from uringmig.testing.guestimage import GuestImage, build_guest
from uringmig.testing.machine import Machine, find_qemu
from uringmig.units import MiB

#: The real guest of these tests: small, so that a boot and a fill take seconds under TCG.
GUEST_BYTES = 160 * MiB
FILL_BYTES = 48 * MiB

_numbers = itertools.count()

StartMachine = Callable[..., Machine]


@dataclass(frozen=True)
class SavedGuest:
    """A guest that QEMU itself saved with mapped-ram, and what it knew."""

    image: Path
    guest: GuestImage
    digest: str
    count: int


def shared_path() -> Path:
    """A new name in /dev/shm for a guest's RAM."""
    return Path(f"/dev/shm/uringmig-test-{os.getpid()}-{next(_numbers)}")


@pytest.fixture(scope="session")
def qemu() -> str:
    program = find_qemu()
    if program is None:
        pytest.skip("qemu-system-x86_64 is not installed (ci/setup installs it)")
    return program


@pytest.fixture(scope="session")
def guest(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    image = build_guest(tmp_path_factory.mktemp("guest"))
    if image is None:
        pytest.skip("no guest kernel and busybox (ci/setup fetches them)")
    return image


@pytest.fixture
def start_machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartMachine]:
    """Start machines (arguments of `Machine`) that end with the test; sockets in a short folder."""
    with ExitStack() as machines:

        def start(**arguments: Any) -> Machine:
            return machines.enter_context(Machine(tmp_path_factory.mktemp("m"), **arguments))

        yield start


@pytest.fixture(scope="session")
def saved_guest(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> SavedGuest:
    """Boot, fill, stop and save one guest for all tests that only restore."""
    image = tmp_path_factory.mktemp("saved") / "qemu.mig"
    folder = tmp_path_factory.mktemp("m")
    with Machine(folder, memory_bytes=GUEST_BYTES, guest=guest, fill_bytes=FILL_BYTES) as machine:
        digest = machine.console.wait_until_ready()
        count = machine.console.count()
        machine.monitor.execute("stop")
        save_by_qemu(machine, image, multifd=False, direct=False)
    return SavedGuest(image, guest, digest, count)


def assert_goes_on(machine: Machine) -> None:
    """The guest's counter is seen to go up by one."""
    first = machine.console.count()
    machine.console.wait_for(rf"^UM count={first + 1}$")


def save_by_qemu(machine: Machine, image: Path, *, multifd: bool, direct: bool) -> None:
    """QEMU's own mapped-ram save, not throttled."""
    monitor = machine.monitor
    monitor.set_capabilities(**{"mapped-ram": True, "multifd": multifd})
    monitor.set_parameters(**{"max-bandwidth": 0, "direct-io": direct})
    monitor.execute("migrate", uri=f"file:{image}")
    outcome = monitor.wait_for_migration(timeout_s=300)
    assert outcome.status == "completed", outcome


def put_to_sleep(machine: Machine) -> None:
    """Have a q35 without a guest enter S3, as a guest does by its power management."""
    while machine.monitor.run_state() != "suspended":
        # In vain until the firmware has set power management up.
        machine.monitor.human("o/h 0x604 0x2400")
        time.sleep(0.1)
