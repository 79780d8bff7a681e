"""Which of a guest's memory lies at which physical address: what tools of forensics ask for.  Pure.

The map is the manifest's, where QEMU said it. For images that others saved it is derived from the
machine type, by the rules of QEMU's hw/i386 (pc_q35.c, pc_piix.c, microvm.c), and the caller says
so: neither video memory nor ROMs are in it then, RAM is also where a VGA adapter hides it from the
guest, and nothing is known of options such as max-ram-below-4g.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from uringmig.errors import FormatError
from uringmig.image.guestfacts import MapRange, check_map
from uringmig.options import PAGE_SIZE
from uringmig.units import GiB, MiB, is_aligned

#: An x86 processor has at most 52 address lines.
_ADDRESS_MAX: Final = 1 << 52
#: Pieces of memory are seen at a second address (a BIOS, shadowed ROMs), but not all of it.
_ALIASED_BYTES_MAX: Final = 64 * MiB
#: 64 Ki are as many as an ELF header counts.
_SEGMENTS_MAX: Final = 65_000
_ABOVE: Final = 4 * GiB
#: With AMD's processors RAM that would reach up to here lies elsewhere.
_HYPERTRANSPORT: Final = 1012 * GiB
_NODE: Final = re.compile(r"(?:/objects/)?ram-node([0-9]+)")


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory that is in one piece both for the guest and in its block; in bytes.

    Attributes:
        start: guest-physical address.
        length: whole pages.
        block_index: of the image's blocks.
        offset: of ``start`` in that block.
    """

    start: int
    length: int
    block_index: int
    offset: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class GuestMap:
    """All of a guest's memory that is in an image and has an address.

    Attributes:
        segments: ascending, as few as possible.
        derived: from the machine type, not from QEMU's own word.
        notes: what the operator should know, one line each.
    """

    segments: tuple[Segment, ...]
    derived: bool
    notes: tuple[str, ...]


def said_map(ranges: Sequence[MapRange], lengths: Mapping[str, int]) -> GuestMap:
    """The map that a manifest has.

    Args:
        ranges: the manifest's.
        lengths: used length of every block, in the image's order.

    Raises:
        FormatError: they do not fit the blocks, or say more than a machine has.
    """
    check_map(ranges, lengths)
    numbers = {idstr: number for number, idstr in enumerate(lengths)}
    segments, notes = [], []
    for one in ranges:
        if one.start + one.length > _ADDRESS_MAX:
            raise FormatError("memory map: an address past any memory", found=hex(one.start))
        if one.block is None:
            notes.append(f"{one.region} at {one.start:#x} is not in the image, and left out")
        elif not all(
            is_aligned(number, PAGE_SIZE) for number in (one.start, one.length, one.offset)
        ):
            notes.append(f"{one.region} at {one.start:#x} is not whole pages, and left out")
        else:
            segments.append(Segment(one.start, one.length, numbers[one.block], one.offset))
    mapped = sum(one.length for one in segments)
    if mapped > 2 * sum(lengths.values()) + _ALIASED_BYTES_MAX:
        raise FormatError(
            "memory map: bytes with an address", expected=sum(lengths.values()), found=mapped
        )
    return _whole(segments, derived=False, notes=notes)


def derived_map(machine: str, lengths: Mapping[str, int]) -> GuestMap:
    """The map that a machine of this type has by itself.

    Args:
        machine: type of the machine, as the image has it.
        lengths: used length of every block, in the image's order.

    Raises:
        FormatError: it is not known of such a machine, or which of the blocks are its RAM.
    """
    ram = _ram_blocks(lengths)
    total = sum(length for _, length in ram)
    low = _below_4g(machine, total)
    if _ABOVE + total - low > _HYPERTRANSPORT:
        raise FormatError(
            "no map of the guest's memory: with so much RAM it depends on the processor",
            expected="a manifest with the map",
            found=f"{total} bytes",
        )
    spans = [(0, 0, low)]
    if total > low:
        spans.append((_ABOVE, low, total - low))
    names = " and ".join(repr(list(lengths)[number]) for number, _ in ram)
    note = (
        f"the map of the guest's memory is derived from the machine type {machine}: {names} is its "
        "RAM, and nothing else has an address"
    )
    return _whole(_over_blocks(spans, ram), derived=True, notes=[note])


def _ram_blocks(lengths: Mapping[str, int]) -> list[tuple[int, int]]:
    """Number and length of the blocks that are RAM, in the order of their addresses."""
    numbered = list(enumerate(lengths.items()))
    nodes = [
        (int(match[1]), number, length)
        for number, (idstr, length) in numbered
        if (match := _NODE.fullmatch(idstr)) is not None
    ]
    if nodes:
        return [(number, length) for _, number, length in sorted(nodes)]
    for number, (idstr, length) in numbered:
        if idstr in ("pc.ram", "microvm.ram"):
            return [(number, length)]
    number, (_, length) = max(numbered, key=lambda item: item[1][1])
    if sum(1 for _, other in lengths.items() if 2 * other > length) > 1:
        raise FormatError(
            "no map of the guest's memory: which block is its RAM cannot be told",
            found=", ".join(lengths),
        )
    return [(number, length)]


def _below_4g(machine: str, total: int) -> int:
    """How much of its RAM a machine has below 4 GiB."""
    if re.fullmatch(r"pc-q35-.+", machine):
        most = 2816 * MiB
        return min(total, 2 * GiB if total >= most else most)
    if re.fullmatch(r"pc-i440fx-.+", machine):
        most = 3584 * MiB
        return min(total, 3 * GiB if total >= most else most)
    if machine == "microvm":
        return min(total, 3 * GiB)
    raise FormatError(
        "no map of the guest's memory: the image has none, and of this machine it is not known",
        expected="a manifest with the map, or a PC",
        found=machine,
    )


def _over_blocks(
    spans: Sequence[tuple[int, int, int]], ram: Sequence[tuple[int, int]]
) -> list[Segment]:
    """Lay spans (address, offset in all of the RAM, length) over the blocks that the RAM is."""
    segments = []
    for address, offset, length in spans:
        begin = 0
        for number, size in ram:
            first, end = max(offset, begin), min(offset + length, begin + size)
            if first < end:
                segments.append(
                    Segment(address + first - offset, end - first, number, first - begin)
                )
            begin += size
    return segments


def _whole(segments: Sequence[Segment], *, derived: bool, notes: Sequence[str]) -> GuestMap:
    """Join segments that go on in both orders."""
    joined = list(segments[:1])
    for one, other in pairwise(segments):
        goes_on = one.block_index == other.block_index and one.offset + one.length == other.offset
        if goes_on and one.end == other.start:
            last = joined.pop()
            other = Segment(last.start, last.length + other.length, last.block_index, last.offset)
        joined.append(other)
    if not joined:
        raise FormatError("no map of the guest's memory: nothing in the image has an address")
    if len(joined) > _SEGMENTS_MAX:
        raise FormatError("memory map: pieces", expected=_SEGMENTS_MAX, found=len(joined))
    return GuestMap(tuple(joined), derived, tuple(notes))
