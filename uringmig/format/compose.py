"""The main stream of a mapped-ram file as bytes at offsets."""

from __future__ import annotations

from uringmig.format import constants as c
from uringmig.format.cursor import BE64
from uringmig.format.headers import Configuration, MappedRamHeader, SectionFooter, pack_lstr
from uringmig.format.layout import ImageLayout, check_mapped_ram, pack_start
from uringmig.options import PAGE_SIZE


def compose_setup(
    configuration: Configuration, layout: ImageLayout, *, section_id: int
) -> list[tuple[int, bytes]]:
    """Write the stream from its header to the footer of ram's START section.

    QEMU: migration/ram.c, ram_save_setup().

    Returns:
        (absolute file offset, bytes) pieces in file order of the stream: one for each block's
        record, the first with all that comes before it, and last EOS word and footer at
        ``layout.trailer_offset``. The bitmaps and pages between them are the caller's.

    Raises:
        StateError: the configuration is not one of a mapped-ram file.
    """
    check_mapped_ram(configuration)
    total_bytes = sum(block.used_length for block in layout.blocks)
    pending = pack_start(configuration, section_id=section_id, total_bytes=total_bytes)
    position = layout.base
    pieces: list[tuple[int, bytes]] = []
    for block in layout.blocks:
        header = MappedRamHeader(PAGE_SIZE, block.bitmap_offset, block.pages_offset)
        record = pack_lstr(block.idstr) + BE64.pack(block.used_length) + header.pack()
        pieces.append((position, pending + record))
        pending, position = b"", block.pages_end
    end = BE64.pack(c.RAM_SAVE_FLAG_EOS) + SectionFooter(section_id).pack()
    pieces.append((layout.trailer_offset, end))
    return pieces


def compose_ram_section(section_type: int, *, section_id: int) -> bytes:
    """Write an empty PART or END section of ram, 18 bytes.  QEMU: ram_save_iterate()."""
    return (
        bytes([section_type])
        + section_id.to_bytes(4, "big")
        + BE64.pack(c.RAM_SAVE_FLAG_EOS)
        + SectionFooter(section_id).pack()
    )
