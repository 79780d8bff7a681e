"""Which memory lies at which physical address: of a PC by its type, of a manifest by its word."""

from __future__ import annotations

import pytest

from uringmig.errors import FormatError
from uringmig.export.guestmap import Segment, derived_map
from uringmig.units import GiB, MiB

ABOVE = 4 * GiB


def spans(machine: str, ram: int) -> list[tuple[int, int, int]]:
    """Address, length and offset of each segment of a machine with this much RAM."""
    found = derived_map(machine, {"vga.vram": 16 * MiB, "pc.ram": ram})
    assert found.derived
    assert "derived" in found.notes[0]
    assert all(one.block_index == 1 for one in found.segments)
    return [(one.start, one.length, one.offset) for one in found.segments]


@pytest.mark.parametrize(
    ("machine", "ram", "low"),
    [
        ("pc-q35-10.0", 256 * MiB, 256 * MiB),
        ("pc-q35-7.2", 2815 * MiB, 2815 * MiB),
        ("pc-q35-9.1", 2816 * MiB, 2 * GiB),
        ("pc-q35-10.0", 5 * GiB, 2 * GiB),
        ("pc-i440fx-8.2", 3583 * MiB, 3583 * MiB),
        ("pc-i440fx-8.2", 3584 * MiB, 3 * GiB),
        ("pc-i440fx-10.0", 64 * GiB, 3 * GiB),
        ("microvm", 2 * GiB, 2 * GiB),
        ("microvm", 4 * GiB, 3 * GiB),
    ],
)
def test_ram_of_a_pc_is_split_as_qemu_splits_it(machine: str, ram: int, low: int) -> None:
    """QEMU: hw/i386, the part below 4 GiB; the rest begins at 4 GiB, and nothing is lost."""
    expected = [(0, low, 0)]
    if ram > low:
        expected.append((ABOVE, ram - low, low))
    assert spans(machine, ram) == expected


def test_nodes_follow_each_other() -> None:
    """RAM of several NUMA nodes is one after the other, whatever their order in the image."""
    found = derived_map("pc-q35-10.0", {"ram-node1": 2 * GiB, "ram-node0": 3 * GiB})
    assert found.segments == (
        Segment(0, 2 * GiB, 1, 0),
        Segment(ABOVE, GiB, 1, 2 * GiB),
        Segment(ABOVE + GiB, 2 * GiB, 0, 0),
    )


def test_ram_of_another_name_is_the_one_large_block() -> None:
    found = derived_map("pc-q35-10.0", {"pc.bios": MiB, "/objects/mem": 64 * MiB})
    assert found.segments == (Segment(0, 64 * MiB, 1, 0),)
    with pytest.raises(FormatError, match="which block is its RAM"):
        derived_map("pc-q35-10.0", {"a": 64 * MiB, "b": 40 * MiB})


@pytest.mark.parametrize(
    ("machine", "ram"), [("virt-10.0", GiB), ("pc-q35-10.0", 1100 * GiB), ("", GiB)]
)
def test_nothing_is_guessed_of_others(machine: str, ram: int) -> None:
    """Other machines, and RAM whose place depends on the processor, need a manifest."""
    with pytest.raises(FormatError, match="no map of the guest's memory"):
        derived_map(machine, {"pc.ram": ram})
