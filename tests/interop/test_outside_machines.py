"""Machines and run states saved from outside, compared with what QEMU itself saves of them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from imagereader import ReadImage, read_image
from realguest import StartMachine, put_to_sleep, save_by_qemu, shared_path

from uringmig.errors import PeerError
from uringmig.memory.mapping import FileMemory
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.testing.machine import Machine
from uringmig.units import MiB

#: Arguments, and what must be among the blocks.
MACHINES = {
    "q35 with VGA and devices": (
        ["-vga", "std", "-smp", "2", "-device", "qemu-xhci", "-device", "virtio-rng-pci",
         "-device", "virtio-balloon-pci", "-netdev", "user,id=n", "-device", "e1000e,netdev=n"],
        "vga.vram",
    ),
    "i440fx": (["-machine", "pc", "-vga", "std"], "pc.ram"),
    "microvm": (["-machine", "microvm"], "microvm.ram"),
    "two dimms": (
        ["-m", "64M,slots=4,maxmem=1G", "-object", "memory-backend-ram,id=d0,size=64M",
         "-device", "pc-dimm,memdev=d0", "-object", "memory-backend-memfd,id=d1,size=64M,share=on",
         "-device", "pc-dimm,memdev=d1"],
        "d1",
    ),
    "virtio-mem": (
        ["-m", "64M,slots=4,maxmem=1G", "-object", "memory-backend-ram,id=v,size=128M",
         "-device", "virtio-mem-pci,memdev=v,requested-size=128M"],
        "v",
    ),
    "an idle backend": (["-object", "memory-backend-ram,id=idle,size=64M"], "pc.ram"),
    "two NUMA nodes": (
        ["-object", "memory-backend-ram,id=n0,size=32M", "-object",
         "memory-backend-memfd,id=n1,size=32M,share=off", "-numa", "node,memdev=n0",
         "-numa", "node,memdev=n1"],
        "n1",
    ),
}  # fmt: skip


def sections_of(image: ReadImage) -> dict[tuple[str, int], bytes]:
    """The device sections, but for those that QEMU does not write twice alike."""
    return {
        (section.idstr, section.instance_id): section.raw
        for section in image.sections
        if section.kind == 4 and section.idstr not in ("mc146818rtc",)
    }


@pytest.mark.parametrize("name", MACHINES)
def test_as_qemu_saves_it(name: str, start_machine: StartMachine, tmp_path: Path) -> None:
    """The same blocks in the same order with the same bytes, and the same device sections."""
    arguments, block = MACHINES[name]
    machine = start_machine(memory_bytes=64 * MiB, backend="", paused=True, arguments=arguments)
    ours, theirs = tmp_path / "ours.mig", tmp_path / "theirs.mig"
    save_outside(machine.monitor, ours)
    save_by_qemu(machine, theirs, multifd=False, direct=False)
    mine, qemus = read_image(ours), read_image(theirs)
    assert (mine.machine, mine.capabilities) == (qemus.machine, ("mapped-ram",))
    assert any(idstr.endswith(block) for idstr in mine.contents)
    assert list(mine.contents) == list(qemus.contents)
    assert [n for n in mine.contents if mine.contents[n] != qemus.contents[n]] == []
    assert sections_of(mine) == sections_of(qemus)
    waiting = start_machine(memory_bytes=64 * MiB, backend="", incoming=True, arguments=arguments)
    waiting.monitor.set_capabilities(**{"mapped-ram": True})
    waiting.monitor.execute("migrate-incoming", uri=f"file:{ours}")
    assert waiting.monitor.wait_for_migration(timeout_s=300).status == "completed"
    assert waiting.monitor.run_state() == "prelaunch"


def test_private_copies_over_a_file(start_machine: StartMachine, tmp_path: Path) -> None:
    """share=off over a file with content: the file's pages where QEMU has written none."""
    ram = shared_path()
    try:
        with ram.open("xb") as file:
            file.truncate(64 * MiB)
        memory = FileMemory(ram, writable=True)
        memory.view[8 * MiB : 9 * MiB] = np.random.default_rng(1).integers(0, 256, MiB, np.uint8)
        memory.view[-1] = 1
        memory.close()
        machine = start_machine(
            memory_bytes=64 * MiB, backend=f"memory-backend-file,mem-path={ram},share=off"
        )
        machine.monitor.execute("stop")
        blocks = ram.stat().st_blocks
        ours, theirs = tmp_path / "ours.mig", tmp_path / "theirs.mig"
        assert save_outside(machine.monitor, ours).blocks_mapped == ()
        assert ram.stat().st_blocks == blocks
        save_by_qemu(machine, theirs, multifd=False, direct=False)
    finally:
        ram.unlink()
    mine, qemus = read_image(ours), read_image(theirs)
    assert [n for n in mine.contents if mine.contents[n] != qemus.contents[n]] == []


def run_state_of(machine: Machine) -> str:
    return machine.monitor.run_state()


def put_to(machine: Machine, state: str) -> None:
    """Bring a machine into a run state."""
    monitor = machine.monitor
    if state == "paused":
        monitor.execute("stop")
    elif state in ("suspended", "paused asleep"):
        put_to_sleep(machine)
        if state == "paused asleep":
            monitor.execute("stop")
    elif state == "guest-panicked":
        monitor.human("o/b 0x505 1")
    elif state == "shutdown":
        time.sleep(3)
        monitor.human("o/h 0x604 0x2000")
    wanted = "paused" if state == "paused asleep" else state
    while monitor.run_state() != wanted:
        time.sleep(0.01)


@pytest.mark.parametrize(
    "state", ["running", "paused", "prelaunch", "suspended", "paused asleep", "guest-panicked",
              "shutdown"]
)  # fmt: skip
def test_run_states(state: str, start_machine: StartMachine, tmp_path: Path) -> None:
    """A guest is left in the state it was found in, and restored into it."""
    arguments = ["-device", "pvpanic", "-action", "panic=pause", "-no-shutdown"]
    machine = start_machine(
        memory_bytes=64 * MiB, backend="", paused=state == "prelaunch", arguments=arguments
    )
    put_to(machine, state)
    found = run_state_of(machine)
    # A guest that was shut down does not go on without a reset.
    for then in (None, "cont") if state != "shutdown" else (None,):
        result = save_outside(machine.monitor, tmp_path / "vm.mig", then=then)
        assert result.state_before == found
        if then is None:
            assert result.state_after == run_state_of(machine) == found
            image = tmp_path / "vm.mig"
            waiting = start_machine(
                memory_bytes=64 * MiB, backend="", incoming=True, arguments=arguments
            )
            waiting.monitor.set_capabilities(**{"mapped-ram": True})
            waiting.monitor.execute("migrate-incoming", uri=f"file:{image}")
            assert waiting.monitor.wait_for_migration(timeout_s=300).status == "completed"
            assert run_state_of(waiting) == found
            if "asleep" in state:
                waiting.monitor.execute("cont")
                assert run_state_of(waiting) == "suspended"
    asleep = state in ("suspended", "paused asleep")
    after = "suspended" if asleep else "shutdown" if state == "shutdown" else "running"
    assert run_state_of(machine) == after
    assert machine.process.poll() is None


def test_states_that_cannot_be_saved(start_machine: StartMachine, tmp_path: Path) -> None:
    waiting = start_machine(memory_bytes=64 * MiB, backend="", incoming=True)
    with pytest.raises(PeerError, match="'inmigrate'") as caught:
        save_outside(waiting.monitor, tmp_path / "vm.mig")
    assert caught.value.may_pass


@pytest.mark.parametrize("on", [True, False])
def test_the_uuid_is_told_where_it_is_validated(
    on: bool, start_machine: StartMachine, tmp_path: Path
) -> None:
    """As QEMU does with validate-uuid: another VM then does not take the image."""
    ours = "11111111-2222-3333-4444-555555555555"
    machine = start_machine(
        memory_bytes=64 * MiB, backend="", paused=True, arguments=["-uuid", ours]
    )
    machine.monitor.set_capabilities(**{"validate-uuid": on})
    with Monitor(machine.qmp_path) as monitor:
        save_outside(monitor, tmp_path / "vm.mig")
    other = start_machine(
        memory_bytes=64 * MiB,
        backend="",
        incoming=True,
        arguments=["-uuid", ours.replace("1", "9")],
    )
    other.monitor.set_capabilities(**{"validate-uuid": True, "mapped-ram": True})
    other.monitor.execute(
        "migrate-incoming", **{"uri": f"file:{tmp_path / 'vm.mig'}", "exit-on-error": False}
    )
    status = other.monitor.wait_for_migration(timeout_s=300).status
    assert status == ("failed" if on else "completed")
