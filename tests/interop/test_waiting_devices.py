"""The devices of a waiting QEMU: the missing are refused before its only try, others are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from realguest import StartMachine, save_by_qemu
from waitingloads import LOADS, assert_waits, by_mapped_ram

from uringmig.errors import MismatchError, PeerError
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.saving import save_vm
from uringmig.units import MiB

SIZE = 64 * MiB
#: What all have; addresses are said, so that one device more moves no other.
GUEST = ["-smp", "2,maxcpus=4", "-device", "virtio-rng-pci,addr=5"]


@pytest.fixture(params=["ours", "QEMU's"])
def image(request: pytest.FixtureRequest, start_machine: StartMachine, tmp_path: Path) -> Path:
    source = start_machine(memory_bytes=SIZE, paused=True, arguments=GUEST)
    path = tmp_path / "vm.mig"
    if request.param == "ours":
        save_vm(source.monitor, path)
    else:
        save_by_qemu(source, path, multifd=True, direct=True)
    return path


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-smp", "1,maxcpus=4", *GUEST[2:]], ("fewer processors", "expected 2, found 1")),
        (GUEST[:2], ("device 0000:00:05.0/virtio-rng is in the image but not",)),
        ([*GUEST[:3], "virtio-rng-pci,addr=6"], ("device 0000:00:05.0/virtio-rng is in the",)),
    ],
)
def test_missing_is_refused_and_nothing_spent(
    load: Callable[[Monitor, Path], tuple[str, ...]],
    arguments: Sequence[str],
    words: Sequence[str],
    image: Path,
    start_machine: StartMachine,
) -> None:
    waiting = start_machine(memory_bytes=SIZE, incoming=True, arguments=arguments)
    with pytest.raises(MismatchError) as caught:
        load(waiting.monitor, image)
    for word in words:
        assert word in str(caught.value)
    assert_waits(waiting)


@pytest.mark.parametrize("load", LOADS)
def test_equal_is_loaded_without_a_word(
    load: Callable[[Monitor, Path], tuple[str, ...]], image: Path, start_machine: StartMachine
) -> None:
    waiting = start_machine(memory_bytes=SIZE, incoming=True, arguments=GUEST)
    assert load(waiting.monitor, image) == ()


def test_more_is_loaded_and_told(image: Path, start_machine: StartMachine) -> None:
    arguments = ["-smp", "3,maxcpus=4", *GUEST[2:], "-device", "virtio-balloon-pci,addr=7"]
    waiting = start_machine(memory_bytes=SIZE, incoming=True, arguments=arguments)
    notes = by_mapped_ram(waiting.monitor, image)
    assert notes[0] == "the waiting QEMU has 3 processors, the image 2"
    assert "not in the image" in notes[1]
    assert "0000:00:07.0/virtio-balloon" in notes[1]


def test_another_processor_is_told_where_both_sides_say(
    image: Path, start_machine: StartMachine
) -> None:
    """QEMU itself says nothing; an image of its own does not tell the model."""
    waiting = start_machine(memory_bytes=SIZE, incoming=True, arguments=[*GUEST, "-cpu", "n270"])
    notes = by_mapped_ram(waiting.monitor, image)
    if image.with_name(f"{image.name}.manifest.json").exists():
        [note] = notes
        assert "qemu64" in note
        assert "n270" in note
    else:
        assert notes == ()


@pytest.mark.parametrize("load", LOADS)
def test_a_qemu_that_can_load_nothing_is_not_tried(
    load: Callable[[Monitor, Path], tuple[str, ...]],
    image: Path,
    start_machine: StartMachine,
    tmp_path: Path,
) -> None:
    """A device that has no state, nvme, blocks every load; asked for its state QEMU 10.0 dies."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MiB))
    drive = ["-drive", f"file={disk},if=none,id=d,format=raw", "-device", "nvme,drive=d,serial=1"]
    waiting = start_machine(memory_bytes=SIZE, incoming=True, arguments=[*GUEST, *drive])
    with pytest.raises(PeerError, match=r"can load no image: non-migratable device: \S*nvme"):
        load(waiting.monitor, image)
    assert_waits(waiting)
