"""Restores by stock QEMU through `load_into`: what must load, and what is refused beforehand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from realguest import GUEST_BYTES, SavedGuest, StartMachine, save_by_qemu, shared_path

from uringmig.errors import FormatError, MismatchError, PeerError, StateError
from uringmig.memory.mapping import FileMemory, create_memfd
from uringmig.pages import bitmap
from uringmig.qemu.restore import LoadResult, load_into, stale_pages
from uringmig.reader import MappedRamReader
from uringmig.testing.machine import Machine
from uringmig.units import MiB

PAGE = 4096


def load(machine: Machine, image: Path, *, offset: int = 0) -> LoadResult:
    return load_into(machine.monitor, image, offset=offset, channels=2, direct="preferred")


def clear_pages(image: Path) -> list[int]:
    """Pages of pc.ram that the image says are zero."""
    with MappedRamReader(image) as reader:
        packed = reader.bitmap("pc.ram")
        bits = bitmap.unpack(packed, first_page=0, page_count=GUEST_BYTES // PAGE)
    return [int(page) for page in np.flatnonzero(~bits)]


def assert_memory_is_the_images(machine: Machine, image: Path) -> None:
    """Every byte of the stopped guest's RAM is what our reader finds in the image."""
    (backend,) = machine.monitor.ram_backends()
    assert backend.path is not None
    expected = np.empty(GUEST_BYTES, np.uint8)
    with MappedRamReader(image) as reader:
        reader.read_into("pc.ram", expected)
    assert np.array_equal(np.fromfile(backend.path, np.uint8), expected)


@pytest.fixture
def waiting(saved_guest: SavedGuest, start_machine: StartMachine) -> Machine:
    return start_machine(
        memory_bytes=GUEST_BYTES, shared=shared_path(), guest=saved_guest.guest, incoming=True
    )


@pytest.fixture(scope="module")
def small_image(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine of 64 MiB that never ran."""
    folder = tmp_path_factory.mktemp("m")
    image = folder / "small.mig"
    with Machine(folder, memory_bytes=64 * MiB, paused=True) as machine:
        save_by_qemu(machine, image, multifd=False, direct=False)
    return image


@pytest.mark.parametrize(
    ("channels", "direct"), [(0, "off"), (2, "off"), (3, "required"), (1, "preferred")]
)
def test_the_guest_remembers_and_goes_on(
    saved_guest: SavedGuest, waiting: Machine, channels: int, direct: str
) -> None:
    before = waiting.monitor.capabilities(), waiting.monitor.parameters()
    result = load_into(
        waiting.monitor,
        saved_guest.image,
        channels=channels,
        direct=direct,  # type: ignore[arg-type]  # one of the literals, by the parameters above
    )
    assert (waiting.monitor.capabilities(), waiting.monitor.parameters()) == before
    assert result.direct == (direct != "off")
    assert result.channels == channels
    assert result.run_state == waiting.monitor.run_state() == "paused"
    assert result.machine.startswith("pc-q35-")
    assert result.notes == ()
    assert GUEST_BYTES < result.memory_bytes < GUEST_BYTES + 8 * MiB
    assert 48 * MiB < result.page_bytes < result.memory_bytes
    assert_memory_is_the_images(waiting, saved_guest.image)
    waiting.monitor.execute("cont")
    assert waiting.console.digest() == saved_guest.digest
    first = waiting.console.count()
    assert first >= saved_guest.count
    waiting.console.wait_for(rf"^UM count={first + 2}$")


def test_image_inside_a_file(
    small_image: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU's ``offset=``: the image begins behind something else."""
    source = start_machine(memory_bytes=64 * MiB, paused=True)
    image = tmp_path / "inside.mig"
    image.write_bytes(b"x" * 12345)
    source.monitor.set_capabilities(**{"mapped-ram": True})
    source.monitor.execute("migrate", uri=f"file:{image},offset=12345")
    assert source.monitor.wait_for_migration(timeout_s=60).status == "completed"
    machine = start_machine(memory_bytes=64 * MiB, incoming=True)
    with pytest.raises(FormatError, match="not a migration stream"):
        load(machine, image)
    assert load(machine, image, offset=12345).run_state in ("prelaunch", "paused", "running")


@pytest.mark.parametrize("name", [b"a,offset=5", b"a,,b", b"\xff", b"fd:5", b"a" * 240])
def test_image_of_any_name(
    name: bytes, small_image: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU is given the file, not its name, which it would take apart."""
    image = tmp_path / os.fsdecode(name)
    shutil.copy(small_image, image)
    machine = start_machine(memory_bytes=64 * MiB, incoming=True)
    assert load(machine, image).notes == ()
    assert machine.monitor.descriptors() == []


@pytest.mark.parametrize("channels", [0, 2])
def test_image_that_qemu_may_not_open(
    channels: int, small_image: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    """In vain it would spend the only try that QEMU has."""
    folder = tmp_path / "ours alone"
    folder.mkdir(mode=0o700)
    image = folder / "vm.mig"
    shutil.copy(small_image, image)
    image.chmod(0o600)
    machine = start_machine(
        memory_bytes=64 * MiB, incoming=True, arguments=["-run-with", "user=nobody"]
    )
    result = load_into(
        machine.monitor, image, channels=channels, direct="required" if channels else "off"
    )
    assert result.direct == bool(channels)
    assert machine.monitor.descriptors() == []


def test_refused_before_anything_happened(
    saved_guest: SavedGuest, small_image: Path, waiting: Machine, tmp_path: Path
) -> None:
    """Each refusal leaves QEMU waiting: in the end the same one loads the right image."""
    settings = waiting.monitor.capabilities(), waiting.monitor.parameters()
    with pytest.raises(MismatchError, match=r"pc\.ram.*size") as caught:
        load(waiting, small_image)
    assert (caught.value.expected, caught.value.found) == (64 * MiB, GUEST_BYTES)
    assert caught.value.exit_code == 3

    cut = tmp_path / "cut.mig"
    shutil.copy(saved_guest.image, cut)
    os.truncate(cut, cut.stat().st_size - 100)
    with pytest.raises(FormatError):
        load(waiting, cut)

    with pytest.raises(StateError, match="must not be negative"):
        load(waiting, saved_guest.image, offset=-1)
    with pytest.raises(StateError, match="needs multifd"):
        load_into(waiting.monitor, saved_guest.image, channels=0, direct="required")

    assert waiting.monitor.run_state() == "inmigrate"
    assert (waiting.monitor.capabilities(), waiting.monitor.parameters()) == settings
    load(waiting, saved_guest.image)
    with pytest.raises(PeerError, match="does not wait for a load"):
        load(waiting, saved_guest.image)


def test_block_missing_on_either_side(
    small_image: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    """QEMU notices only one of the two, and only in the middle of the load."""
    more = [
        *["-m", "64M,slots=1,maxmem=1G"],
        *["-object", "memory-backend-ram,id=dimm0,size=32M", "-device", "pc-dimm,memdev=dimm0"],
    ]
    larger = start_machine(memory_bytes=64 * MiB, incoming=True, arguments=more)
    with pytest.raises(MismatchError, match="'dimm0': is in the waiting QEMU but not in the image"):
        load(larger, small_image)
    source = start_machine(memory_bytes=64 * MiB, paused=True, arguments=more)
    save_by_qemu(source, tmp_path / "larger.mig", multifd=False, direct=False)
    smaller = start_machine(memory_bytes=64 * MiB, incoming=True)
    with pytest.raises(MismatchError, match="'dimm0': is in the image but not in the waiting"):
        load(smaller, tmp_path / "larger.mig")
    assert load(larger, tmp_path / "larger.mig").seconds > 0


def test_other_machine_type(small_image: Path, start_machine: StartMachine) -> None:
    machine = start_machine(
        memory_bytes=64 * MiB, incoming=True, arguments=["-machine", "pc-q35-9.0"]
    )
    with pytest.raises(MismatchError, match="machine type") as caught:
        load(machine, small_image)
    assert caught.value.found == "pc-q35-9.0"


def test_old_bytes_in_shared_memory(saved_guest: SavedGuest, waiting: Machine) -> None:
    """Old bytes under a clear bit would survive the load; under a set bit they are overwritten."""
    (backend,) = waiting.monitor.ram_backends()
    assert backend.path is not None
    clear = clear_pages(saved_guest.image)
    with Path(backend.path).open("r+b") as ram:
        set_page = next(page for page in range(len(clear)) if page not in clear)
        ram.seek(set_page * PAGE)
        ram.write(b"old" * 1000)
        for page in (clear[40], clear[-1]):
            ram.seek(page * PAGE + PAGE - 1)
            ram.write(b"x")
    with pytest.raises(MismatchError, match="old bytes in 2 pages") as caught:
        load(waiting, saved_guest.image)
    assert f"{clear[40] * PAGE:#x}" in str(caught.value)
    assert waiting.monitor.run_state() == "inmigrate"
    with Path(backend.path).open("r+b") as ram:
        for page in (clear[40], clear[-1]):
            ram.seek(page * PAGE)
            ram.write(bytes(PAGE))
    load(waiting, saved_guest.image)
    waiting.monitor.execute("cont")
    assert waiting.console.digest() == saved_guest.digest


def test_old_bytes_in_private_memory(small_image: Path, start_machine: StartMachine) -> None:
    """A private mapping shows what its file has, and QEMU's load leaves it."""
    old = shared_path()
    with old.open("xb") as file:
        file.truncate(64 * MiB)
        file.seek(33 * MiB)
        file.write(b"x")
    backend = f"memory-backend-file,id=pc.ram1,size=64M,mem-path={old}"
    try:
        source = start_machine(
            memory_bytes=64 * MiB,
            paused=True,
            arguments=[
                *["-object", "memory-backend-ram,id=pc.ram1,size=64M"],
                *["-machine", "memory-backend=pc.ram1"],
            ],
        )
        image = source.folder / "private.mig"
        save_by_qemu(source, image, multifd=False, direct=False)
        machine = start_machine(
            memory_bytes=64 * MiB,
            incoming=True,
            arguments=["-object", backend, "-machine", "memory-backend=pc.ram1"],
        )
        with pytest.raises(MismatchError, match="old bytes in 1 pages, the first at 0x2100000"):
            load(machine, image)
        old.unlink()
        result = load(machine, image)
        assert "not checked for old bytes" in result.notes[0]
    finally:
        old.unlink(missing_ok=True)


def test_load_that_fails_inside_qemu(start_machine: StartMachine, tmp_path: Path) -> None:
    """QEMU outlives it, has its settings back, and its words are told."""
    legacy = ["-device", "virtio-rng-pci,disable-modern=on"]
    source = start_machine(memory_bytes=64 * MiB, paused=True, arguments=legacy)
    image = tmp_path / "rng.mig"
    save_by_qemu(source, image, multifd=True, direct=True)
    machine = start_machine(
        memory_bytes=64 * MiB, incoming=True, arguments=["-device", "virtio-rng-pci"]
    )
    settings = machine.monitor.capabilities(), machine.monitor.parameters()
    with pytest.raises(PeerError, match=r"^QEMU failed to load the image: .+; start that"):
        load(machine, image)
    assert machine.process.poll() is None
    assert (machine.monitor.capabilities(), machine.monitor.parameters()) == settings
    with pytest.raises(PeerError, match="already begun a load"):
        load(machine, image)


def test_qemu_that_dies_during_a_load(
    saved_guest: SavedGuest, waiting: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_instead(**_: object) -> None:
        waiting.kill()

    monkeypatch.setattr(waiting.monitor, "set_parameters", die_instead)
    with pytest.raises(PeerError, match="went away") as caught:
        load(waiting, saved_guest.image)
    assert "not put back" in caught.value.__notes__[0]


def test_stale_pages_are_counted_whole_and_holes_not_touched() -> None:
    """Any byte of a page makes it stale; a set bit excuses it; a hole stays a hole."""
    fd = create_memfd("stale", 64 * MiB)
    memory = FileMemory(fd, writable=True)
    pages = [0, 1, 1023, 1024, 9000, 16383]
    for page in pages:
        os.pwrite(fd, b"x", page * PAGE + PAGE - 1)
    os.pwrite(fd, bytes(PAGE), 5 * PAGE)
    before = os.fstat(fd).st_blocks
    bits = np.zeros(16384, np.bool_)
    assert stale_pages(memory, bitmap.pack(bits)) == (len(pages), 0)
    bits[[0, 1023, 16383]] = True
    assert stale_pages(memory, bitmap.pack(bits)) == (3, 1 * PAGE)
    bits[:] = True
    assert stale_pages(memory, bitmap.pack(bits)) == (0, None)
    assert os.fstat(fd).st_blocks == before
    memory.close()
    os.close(fd)
