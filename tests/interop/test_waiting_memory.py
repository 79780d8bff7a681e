"""The memory of a waiting QEMU: another process's, or what nobody may write to, takes no load."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from realguest import StartMachine, shared_path
from waitingloads import LOADS, assert_waits, by_mapped_ram

from uringmig.errors import PeerError
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.saving import save_vm
from uringmig.testing.machine import Machine
from uringmig.units import MiB

SIZE = 64 * MiB


@pytest.fixture
def ram() -> Iterator[Path]:
    path = shared_path()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def alive(ram: Path, start_machine: StartMachine) -> Machine:
    """A VM that has been stopped, and lives: its memory is a file in /dev/shm."""
    machine = start_machine(memory_bytes=SIZE, shared=ram)
    machine.monitor.execute("stop")
    return machine


@pytest.mark.parametrize("load", LOADS)
def test_memory_of_a_vm_that_lives_is_not_overwritten(
    load: Callable[[Monitor, Path], tuple[str, ...]],
    ram: Path,
    alive: Machine,
    start_machine: StartMachine,
    tmp_path: Path,
) -> None:
    """Both were started by one command line, so they have one memory; QEMU locks nothing."""
    image = tmp_path / "vm.mig"
    save_vm(alive.monitor, image)
    waiting = start_machine(memory_bytes=SIZE, shared=ram, keep_shared=True, incoming=True)
    with pytest.raises(PeerError) as caught:
        load(waiting.monitor, image)
    assert caught.value.exit_code == 4
    for word in ("pc.ram", str(ram), f"process {alive.process.pid}", "qemu-system", "of its own"):
        assert word in str(caught.value)
    assert_waits(waiting)
    own = start_machine(memory_bytes=SIZE, shared=shared_path(), incoming=True)
    assert load(own.monitor, image) == ()


@pytest.mark.parametrize("share", ["on", "off"])
def test_a_file_that_another_process_only_reads(
    share: str, ram: Path, alive: Machine, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Clones of a template map its file privately: to write to it would be to write to all of them.

    Into a private mapping a load may write: nobody else sees that.
    """
    image = tmp_path / "vm.mig"
    save_vm(alive.monitor, image, then="quit")
    alive.process.wait()
    waiting = start_machine(
        memory_bytes=SIZE,
        backend=f"memory-backend-file,mem-path={ram},share={share}",
        incoming=True,
    )
    child = start_machine(
        memory_bytes=SIZE,
        backend=f"memory-backend-file,mem-path={ram},share=off,readonly=on,rom=off",
        paused=True,
    )
    if share == "off":
        by_mapped_ram(waiting.monitor, image)
        return
    with pytest.raises(PeerError, match=f"process {child.process.pid} "):
        by_mapped_ram(waiting.monitor, image)
    assert_waits(waiting)


def test_our_own_mapping_is_none_of_another(
    ram: Path, alive: Machine, start_machine: StartMachine, tmp_path: Path
) -> None:
    """A program that has the memory mapped itself knows what it does."""
    image = tmp_path / "vm.mig"
    save_vm(alive.monitor, image, then="quit")
    alive.process.wait()
    waiting = start_machine(memory_bytes=SIZE, shared=ram, keep_shared=True, incoming=True)
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapped:
        assert by_mapped_ram(waiting.monitor, image) == ()
        assert len(mapped) == SIZE


@pytest.mark.parametrize("load", LOADS)
def test_memory_that_is_read_only_is_refused(
    load: Callable[[Monitor, Path], tuple[str, ...]], start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU would die of SIGSEGV while it loads."""
    file = tmp_path / "nv"
    file.write_bytes(b"nv" * (8 * MiB))
    nvdimm = [
        *["-machine", "nvdimm=on", "-m", "64M,slots=2,maxmem=1G"],
        *["-object", f"memory-backend-file,id=nv,mem-path={file},size=16M,share=on,readonly=on"],
        *["-device", "nvdimm,memdev=nv,unarmed=on"],
    ]
    source = start_machine(memory_bytes=SIZE, paused=True, arguments=nvdimm)
    image = tmp_path / "vm.mig"
    save_vm(source.monitor, image, then="quit")
    source.process.wait()
    waiting = start_machine(memory_bytes=SIZE, incoming=True, arguments=nvdimm)
    with pytest.raises(PeerError, match=r"ramblock '\S*nv' is read-only in the waiting QEMU"):
        load(waiting.monitor, image)
    assert_waits(waiting)


def test_who_cannot_be_looked_at_is_told(
    ram: Path,
    alive: Machine,
    start_machine: StartMachine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As another user we see what a process has in all, but not what that is."""
    image = tmp_path / "vm.mig"
    save_vm(alive.monitor, image)
    waiting = start_machine(memory_bytes=SIZE, shared=ram, keep_shared=True, incoming=True)
    hidden = f"/proc/{alive.process.pid}/maps"
    real_read_text = Path.read_text

    def refusing(path: Path, *arguments: object, **named: object) -> str:
        if str(path) == hidden:
            raise PermissionError
        return real_read_text(path, *arguments, **named)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(Path, "read_text", refusing)
    [note] = by_mapped_ram(waiting.monitor, image)
    assert "not seen whether another process uses" in note
    assert str(ram) in note
