"""Where the guest's memory lies in its physical addresses, from HMP ``info mtree -f``.  Pure.

QEMU: system/memory.c, mtree_print_flatview. The text has a view for each set of address spaces;
the one of the address space ``memory`` is what the guest's processors see. What is in no other view
is not looked at. In that view every line must be understood: a map that lacks a range without a
word is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from uringmig.errors import FormatError
from uringmig.format.constants import MAPPED_RANGES_MAX

#: No processor has more address lines; up to there sums of addresses are safe too.
ADDRESS_MAX: Final = (1 << 63) - 1

_VIEW: Final = re.compile(r"FlatView #[0-9]+")
_SPACE: Final = re.compile(r' AS "(?P<name>.*)", root: .*')
_ROOT: Final = " Root memory region: "
#: An offset of zero is left out. Under KVM each range that KVM knows is marked.
_RANGE: Final = re.compile(
    r"  (?P<start>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) "
    r"\(prio -?[0-9]+, (?:nv-)?(?P<kind>[^,)]+)\): "
    r"(?P<region>.+?)(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)*"
)
#: A name has at most 255 bytes, and what stands around it a hundred.
_LINE_MAX: Final = 512
_SYSTEM: Final = "memory"
#: QEMU's word, and whether the guest can only read there. QEMU: memory_region_type.
_MEMORY: Final = {"ram": False, "ramd": False, "rom": True, "romd": True}
_DEVICE: Final = "i/o"


@dataclass(frozen=True, slots=True)
class MappedRange:
    """Guest-physical addresses behind which memory lies; in bytes.

    Attributes:
        start: the first address.
        length: not zero.
        region: QEMU's name of the memory, which is its ramblock's without what stands before it.
        offset: of ``start`` in that memory.
        read_only: the guest's writes do not reach it.
    """

    start: int
    length: int
    region: str
    offset: int
    read_only: bool


def parse_mtree(text: str) -> tuple[MappedRange, ...]:
    """Read the memory of the guest's processors, ascending and without overlap.

    Args:
        text: what ``info mtree -f`` printed.

    Raises:
        FormatError: there is not exactly one such view, or something in it is not understood.
    """
    views = [lines for names, lines in _views(text) if _SYSTEM in names]
    if len(views) != 1:
        raise FormatError("info mtree: views of the guest's memory", expected=1, found=len(views))
    ranges = []
    end = 0
    for line in views[0]:
        match = _RANGE.fullmatch(line) if len(line) <= _LINE_MAX else None
        if match is None:
            raise FormatError("info mtree: not a line of a view", found=line[:200])
        start, last = int(match["start"], 16), int(match["last"], 16)
        offset = int(match["offset"] or "0", 16)
        if not end <= start <= last:
            raise FormatError("info mtree: ranges are not in order", found=line[:200])
        end = last + 1
        if match["kind"] == _DEVICE:
            continue
        if match["kind"] not in _MEMORY:
            raise FormatError("info mtree: kind of memory", found=match["kind"][:200])
        if max(last, offset + (last - start)) > ADDRESS_MAX:
            raise FormatError("info mtree: an address past any memory", found=line[:200])
        ranges.append(
            MappedRange(start, end - start, match["region"], offset, _MEMORY[match["kind"]])
        )
    if not 0 < len(ranges) <= MAPPED_RANGES_MAX:
        raise FormatError("info mtree: number of ranges of memory", found=len(ranges))
    return tuple(ranges)


def _views(text: str) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Each view's address spaces, and its lines after them; an empty line ends a view."""
    names: list[str] = []
    lines: list[str] | None = None
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        if _VIEW.fullmatch(line) or not line:
            if lines is not None:
                yield names, lines
            names, lines = [], [] if line else None
        elif lines is None:
            continue
        elif not lines and (space := _SPACE.fullmatch(line)):
            names.append(space["name"])
        elif not (line.startswith(_ROOT) and not lines):
            lines.append(line)
