"""Where QEMU puts things in a mapped-ram file; the only place that computes file offsets.

QEMU: migration/ram.c, mapped_ram_setup_ramblock(). The main stream starts at ``base``. After each
block's header comes its bitmap, then, at the next boundary of 1 MiB, a slot for every page; the
main stream goes on where the slots end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from msgspec import Struct

from uringmig.errors import FormatError, StateError
from uringmig.format import constants as c
from uringmig.format.cursor import BE64
from uringmig.format.headers import (
    Configuration,
    MappedRamHeader,
    SectionHeader,
    StreamHeader,
    pack_lstr,
)
from uringmig.options import PAGE_SIZE
from uringmig.units import align_up, div_ceil, is_aligned


def bitmap_length(used_length: int) -> int:
    """Bytes of a block's bitmap: whole 64-bit words with a bit for each page."""
    return div_ceil(div_ceil(used_length, PAGE_SIZE), 64) * 8


class BlockLayout(Struct, frozen=True):
    """One ramblock's place in the file.

    Attributes:
        idstr: its name.
        used_length: bytes of memory, a multiple of the page size.
        bitmap_offset: absolute file offset of the bitmap.
        pages_offset: absolute file offset of the slot of page 0.
    """

    idstr: str
    used_length: int
    bitmap_offset: int
    pages_offset: int

    @property
    def page_count(self) -> int:
        """Pages, and slots."""
        return self.used_length // PAGE_SIZE

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of the bitmap, whole 64-bit words."""
        return bitmap_length(self.used_length)

    @property
    def pages_end(self) -> int:
        """Absolute file offset past the last slot, where the main stream goes on."""
        return self.pages_offset + self.used_length


class ImageLayout(Struct, frozen=True):
    """Every offset of a mapped-ram file.

    Attributes:
        base: absolute offset of the stream header; QEMU's ``offset=``.
        blocks: in the order of the block list.
        trailer_offset: absolute offset of the EOS word that ends the START section.
    """

    base: int
    blocks: tuple[BlockLayout, ...]
    trailer_offset: int


def pack_start(configuration: Configuration, *, section_id: int, total_bytes: int) -> bytes:
    """Write the stream from its header to the total word of the ram section.

    QEMU: qemu_savevm_state_header(), save_section_header(), ram_save_setup().
    """
    header = SectionHeader(
        c.QEMU_VM_SECTION_START, section_id, c.RAM_IDSTR, c.RAM_INSTANCE_ID, c.RAM_VERSION_ID
    )
    total_word = BE64.pack(total_bytes | c.RAM_SAVE_FLAG_MEM_SIZE)
    return StreamHeader().pack() + configuration.pack() + header.pack() + total_word


def plan_layout(
    configuration: Configuration,
    blocks: Sequence[tuple[str, int]],
    *,
    section_id: int = 1,
    base: int = 0,
) -> ImageLayout:
    """Place every block as QEMU does.

    Args:
        configuration: its length moves the first block; must list ``mapped-ram`` alone of the two
            capabilities that shape the block list.
        blocks: (idstr, used_length in bytes) in file order.
        section_id: id of the ram section.
        base: absolute offset of the stream header.

    Raises:
        StateError: no block, too many, a name used twice or unfit, a length of zero or not of
            whole pages, or a configuration that is not one of a mapped-ram file.
    """
    check_mapped_ram(configuration)
    _check_blocks(blocks)
    if not 0 <= base <= c.FILE_OFFSET_MAX:
        raise StateError(f"base {base} is not from 0 to {c.FILE_OFFSET_MAX}")
    total_bytes = sum(used_length for _, used_length in blocks)
    start = pack_start(configuration, section_id=section_id, total_bytes=total_bytes)
    position = base + len(start)
    placed: list[BlockLayout] = []
    for idstr, used_length in blocks:
        bitmap_offset = position + len(pack_lstr(idstr)) + BE64.size + MappedRamHeader.STRUCT.size
        pages_offset = align_up(
            bitmap_offset + bitmap_length(used_length), c.MAPPED_RAM_FILE_OFFSET_ALIGNMENT
        )
        placed.append(BlockLayout(idstr, used_length, bitmap_offset, pages_offset))
        position = pages_offset + used_length
    return ImageLayout(base=base, blocks=tuple(placed), trailer_offset=position)


def check_mapped_ram(configuration: Configuration) -> None:
    """Refuse a configuration that a mapped-ram file cannot have.

    Raises:
        StateError: ``mapped-ram`` is missing, or ``x-ignore-shared`` stands beside it.
    """
    if not configuration.mapped_ram or configuration.ignore_shared:
        raise StateError(
            f"a mapped-ram file lists {c.CAPABILITY_MAPPED_RAM} and not "
            f"{c.CAPABILITY_IGNORE_SHARED}: {configuration.capabilities}"
        )


def _check_blocks(blocks: Sequence[tuple[str, int]]) -> None:
    """Refuse a block list that QEMU or our own reader would not take."""
    if not 0 < len(blocks) <= c.BLOCKS_MAX:
        raise StateError(f"an image has 1 to {c.BLOCKS_MAX} ramblocks, not {len(blocks)}")
    if len({idstr for idstr, _ in blocks}) != len(blocks):
        raise StateError("two ramblocks have the same idstr")
    for idstr, used_length in blocks:
        if used_length <= 0 or not is_aligned(used_length, PAGE_SIZE):
            raise StateError(
                f"ramblock {idstr!r}: length {used_length} is not a multiple of {PAGE_SIZE} above 0"
            )
    if sum(used_length for _, used_length in blocks) > c.RAM_BYTES_MAX:
        raise StateError(f"ramblocks of more than {c.RAM_BYTES_MAX} bytes")


class Area(Struct, frozen=True):
    """A range of the file that belongs to one thing.

    Attributes:
        start: absolute offset of its first byte.
        end: absolute offset past its last byte.
        what: for the message, such as ``bitmap``.
        block: idstr of the ramblock concerned, or None for the main stream.
    """

    start: int
    end: int
    what: str
    block: str | None = None


class AreaMap:
    """Which ranges of the file are taken; refuses a second owner.

    QEMU does not check this: of two areas that overlap, one is read back with the other's bytes.
    """

    def __init__(self) -> None:
        """Begin with nothing taken."""
        self._areas: list[Area] = []

    @property
    def end(self) -> int:
        """Absolute offset past the last byte taken; 0 where nothing is."""
        # The areas are sorted and disjoint, so the last one ends last.
        return self._areas[-1].end if self._areas else 0

    def add(self, area: Area, *, at: int) -> None:
        """Take a range; ``at`` is the offset of the field that gave it.

        Raises:
            FormatError: it overlaps a range taken before.
        """
        if area.start == area.end:
            return
        place = bisect_right(self._areas, area.start, key=_start_of)
        for other in self._areas[max(0, place - 1) : place + 1]:
            if other.start < area.end and area.start < other.end:
                raise _overlap(area, other, at=at)
        self._areas.insert(place, area)

    def limit_from(self, start: int, *, at: int) -> int | None:
        """Say how far the main stream may run from ``start``: to the next area; None is no bound.

        Raises:
            FormatError: ``start`` lies in an area.
        """
        place = bisect_right(self._areas, start, key=_start_of)
        if place and self._areas[place - 1].end > start:
            raise _overlap(Area(start, start + 1, "main stream"), self._areas[place - 1], at=at)
        return self._areas[place].start if place < len(self._areas) else None


def _start_of(area: Area) -> int:
    """Order areas by where they start; being disjoint they need no more."""
    return area.start


def _overlap(area: Area, other: Area, *, at: int) -> FormatError:
    """Name two areas that overlap."""
    owner = "" if other.block is None else f" of ramblock {other.block!r}"
    return FormatError(
        f"{area.what} overlaps the {other.what}{owner}",
        offset=at,
        block=area.block,
        expected=f"nothing of {other.start:#x}..{other.end:#x}",
        found=f"{area.start:#x}..{area.end:#x}",
    )
