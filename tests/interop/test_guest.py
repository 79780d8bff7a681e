"""The real guest says what it remembers, and goes on after QEMU's own save and restore."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from realguest import GUEST_BYTES, SavedGuest, StartMachine, shared_path

from uringmig.errors import PeerError
from uringmig.testing.guestimage import GuestImage
from uringmig.units import MiB


def test_guest_remembers_and_goes_on(saved_guest: SavedGuest, start_machine: StartMachine) -> None:
    """QEMU's own restore of its own image: the yardstick for every restore of ours."""
    machine = start_machine(memory_bytes=GUEST_BYTES, guest=saved_guest.guest, incoming=True)
    assert machine.monitor.run_state() == "inmigrate"
    machine.monitor.set_capabilities(**{"mapped-ram": True})
    machine.monitor.execute("migrate-incoming", uri=f"file:{saved_guest.image}")
    assert machine.monitor.wait_for_migration(timeout_s=300).status == "completed"
    machine.monitor.execute("cont")
    assert machine.console.digest() == saved_guest.digest
    first = machine.console.count()
    assert first >= saved_guest.count
    machine.console.wait_for(rf"^UM count={first + 2}$")


def test_the_digest_tells_memory_apart(guest: GuestImage, start_machine: StartMachine) -> None:
    """A digest that could not differ would prove nothing: a byte changed under the guest shows."""
    ram = shared_path()
    machine = start_machine(memory_bytes=128 * MiB, shared=ram, guest=guest, fill_bytes=16 * MiB)
    before = machine.console.wait_until_ready()
    assert machine.console.digest() == before
    machine.monitor.execute("stop")
    change_filled_pages(ram)
    machine.monitor.execute("cont")
    assert machine.console.digest() != before


def change_filled_pages(ram: Path) -> None:
    """Flip a byte in every page that does not compress: the fill does not, code and text do."""
    data = bytearray(ram.read_bytes())
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096]
        if any(page) and len(zlib.compress(page, level=1)) >= len(page):
            data[start] ^= 0xFF
    with ram.open("r+b") as file:
        file.write(data)


def test_nothing_is_left(start_machine: StartMachine) -> None:
    """The RAM file and the process go with the machine, also after a crash of QEMU."""
    ram = shared_path()
    machine = start_machine(memory_bytes=64 * MiB, shared=ram, paused=True)
    assert ram.exists()
    machine.kill()
    machine.close()
    assert not ram.exists()
    assert machine.process.returncode is not None
    machine.close()


def test_a_machine_that_cannot_start_says_why(start_machine: StartMachine) -> None:
    with pytest.raises(PeerError, match="no-such-option"):
        start_machine(arguments=["-no-such-option"])
