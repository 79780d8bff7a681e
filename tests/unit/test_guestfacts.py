"""Which ramblock each range of a guest's memory lies in: known, or the map is not made."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from uringmig.errors import FormatError
from uringmig.format.mtree import MappedRange, parse_mtree
from uringmig.qemu.guestfacts import describe_guest, place_ranges
from uringmig.qemu.monitor import HostBlock, Monitor
from uringmig.qemu.qmp import CommandError
from uringmig.units import MiB

TEXT = Path(__file__).parent / "mtree" / "q35big.txt"
FIRST, SECOND = "0000:00:01.0/vga.vram", "0000:00:03.0/vga.vram"
BLOCKS = (
    HostBlock("pc.ram", 6 << 30, 6 << 30, 0x7F6973E00000),
    HostBlock(FIRST, 16 * MiB, 16 * MiB, 0x7F6B3D200000),
    HostBlock(SECOND, 16 * MiB, 16 * MiB, 0x7F6972C00000),
    HostBlock("pc.bios", 256 << 10, 256 << 10, 0x7F6B3E600000),
)
HOST = {0xFC000000: 0x7F6972C00000, 0xFD000000: 0x7F6B3D200000}


def one(region: str, *, length: int = 4096, offset: int = 0) -> MappedRange:
    return MappedRange(0, length, region, offset, read_only=False)


def test_two_blocks_of_one_name_are_told_apart_by_where_they_are() -> None:
    """QEMU's table has the name alone: the map says which adapter's memory is at which address."""
    placed = place_ranges(parse_mtree(TEXT.read_text()), BLOCKS, HOST)
    assert {item.start: item.block for item in placed if item.region == "vga.vram"} == {
        0xFC000000: SECOND,
        0xFD000000: FIRST,
    }
    assert {item.block for item in placed} == {block.idstr for block in BLOCKS}


@pytest.mark.parametrize("host", [{}, HOST | {0xFC000000: 1}, dict.fromkeys(HOST, 0)])
def test_a_block_is_never_guessed(host: dict[int, int]) -> None:
    with pytest.raises(FormatError, match="blocks that it may be"):
        place_ranges(parse_mtree(TEXT.read_text()), BLOCKS, host)


def test_memory_that_is_no_block_stays_in_the_map_without_one() -> None:
    """An export has to know that there was memory it does not have."""
    (placed,) = place_ranges([one("vfio bar")], BLOCKS, {})
    assert (placed.block, placed.region) == (None, "vfio bar")


def test_part_of_a_name_is_not_the_name() -> None:
    (placed,) = place_ranges([one("ram")], BLOCKS, {})
    assert placed.block is None


def test_a_range_that_ends_past_its_block_is_refused() -> None:
    with pytest.raises(FormatError, match="ends past its block"):
        place_ranges([one("pc.bios", length=8192, offset=(256 << 10) - 4096)], BLOCKS, {})


class Strange:
    """A monitor whose QEMU answers every question in one strange way; None is to refuse it."""

    qemu_version = (99, 0, 0)
    peer_pid = 0

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def execute(self, command: str, /, **arguments: object) -> object:
        if self._answer is None:
            raise CommandError(command, "not in this build")
        return self._answer

    def human(self, command_line: str) -> str:
        return str(self.execute("human-monitor-command"))

    def ram_blocks(self) -> tuple[HostBlock, ...]:
        return BLOCKS


@pytest.mark.parametrize(
    "answer", [None, {}, [], "x" * 300, "a\nb", {"enabled": "yes", "UUID": 3}, [7], [{}], 5]
)
def test_what_qemu_does_not_say_stays_out_and_fails_no_save(answer: object) -> None:
    """A later QEMU, or one built without a command, is saved all the same, and a note says it."""
    facts, notes = describe_guest(cast(Monitor, Strange(answer)))
    assert facts.qemu_version == "99.0.0"
    assert (facts.memory_map, facts.kvm, facts.uuid, facts.name) == (None, None, None, None)
    assert notes[0].startswith("the manifest has no map of the guest's memory: ")
    # Only an empty list says that there are no disks.
    assert [note.split(":")[0] for note in notes[1:]] == (
        [] if answer in ([], {}) else ["the manifest does not tell the guest's disks"]
    )
    assert not facts.disks
    assert all(len(note) < 500 for note in notes)
