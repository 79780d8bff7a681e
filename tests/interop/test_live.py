"""Live saves: the guest runs while all is written, and stands still for what it changed since."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on, shared_path
from test_outside import BACKENDS, host_bytes, load_by_qemu, settings

from uringmig.options import PAGE_SIZE, WriteOptions
from uringmig.progress import Snapshot
from uringmig.qemu.outside import save_outside
from uringmig.testing.guestimage import GuestImage
from uringmig.units import MiB
from uringmig.verify import verify


@pytest.mark.parametrize(
    "name", ["-m alone", "memfd shared", "memfd private", "file shared", "file private"]
)
def test_a_guest_that_goes_on_is_saved_and_restored(
    name: str, guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    """It fills memory anew between the passes; what is restored is the moment of the second."""
    backend, way = BACKENDS[name]
    file = shared_path()
    try:
        if "{file}" in backend:
            file.touch()
        machine = start_machine(
            memory_bytes=GUEST_BYTES,
            backend=backend.format(file=file),
            guest=guest,
            fill_bytes=FILL_BYTES,
        )
        file.unlink(missing_ok=True)
        first = machine.console.wait_until_ready()
        before, held, count = settings(machine), host_bytes(machine), machine.console.count()
        states: dict[str, str] = {}

        def look(snapshot: Snapshot) -> None:
            states.setdefault(snapshot.phase, machine.monitor.run_state())

        out = tmp_path / "vm.mig"
        result = save_outside(machine.monitor, out, live=True, progress=look)
        assert (result.how, result.notes) == ("outside", ())
        assert result.passes >= 2
        assert (result.state_before, result.state_after) == ("running", "running")
        assert states["write"] == "running"
        assert states["catch-up"] == "paused"
        assert states["bitmaps"] == "running"
        assert settings(machine) == before
        assert host_bytes(machine) - held < 8 * MiB, "looking at memory allocated some"
        assert_goes_on(machine)
        assert machine.console.digest() == first
        assert verify(out).mismatches == ()
        waiting = start_machine(memory_bytes=GUEST_BYTES, backend="", guest=guest, incoming=True)
        load_by_qemu(waiting, out, multifd=way == "mapped")
        assert waiting.console.digest() == first
        assert waiting.console.count() >= count
        assert_goes_on(waiting)
    finally:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["-m alone", "memfd shared"])
def test_a_guest_that_writes_all_the_time(
    name: str, guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    """What it wrote before the save it finds again after the restore, and so it does here.

    Its writer makes sure of one file while it has written the other, so memory of two moments would
    be found, by itself or by its kernel.
    """
    backend, _ = BACKENDS[name]
    arguments = {"memory_bytes": GUEST_BYTES, "backend": backend, "guest": guest}
    machine = start_machine(**arguments, fill_bytes=FILL_BYTES)
    digest = machine.console.wait_until_ready()
    while machine.console.busy() < 2:
        time.sleep(0.1)
    # Paced, so that it writes a few rounds meanwhile.
    result = save_outside(machine.monitor, tmp_path / "vm.mig", options=WriteOptions(rate=24 * MiB))
    assert result.passes >= 2
    written = result.image.written_bytes - result.image.pages_set * PAGE_SIZE
    assert written > 4 * MiB, "it changed little; was it busy?"
    assert verify(tmp_path / "vm.mig").mismatches == ()
    count = machine.console.busy()
    waiting = start_machine(**arguments, incoming=True)
    load_by_qemu(waiting, tmp_path / "vm.mig")
    for each in (waiting, machine):
        while each.console.busy() < count + 3:
            time.sleep(0.1)
        assert each.console.digest() == digest
        assert_goes_on(each)
