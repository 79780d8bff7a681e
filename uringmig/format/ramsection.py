"""The ram section: its block list, its records, and what must hold between them.

QEMU: migration/ram.c, ram_save_setup(), ram_load_precopy(), parse_ramblocks(). Rules: every method
reads one thing from the cursor, whole or not at all; where bytes are missing it changes nothing.
"""

from __future__ import annotations

from typing import Final

from uringmig.errors import FormatError
from uringmig.format import constants as c
from uringmig.format.cursor import BE64, Cursor
from uringmig.format.events import (
    Event,
    MultifdFlush,
    RamBlockRead,
    RamPage,
    RamSectionEnded,
    RamSetupEnded,
    RamStarted,
    RamZero,
)
from uringmig.format.headers import (
    Configuration,
    MappedRamHeader,
    SectionFooter,
    SectionHeader,
    at_most,
    equal,
)
from uringmig.format.layout import Area, AreaMap, bitmap_length
from uringmig.format.plainrecords import PageIndex
from uringmig.options import PAGE_SIZE
from uringmig.units import is_aligned

_FLAG_NAMES: Final = {
    c.RAM_SAVE_FLAG_EOS: "EOS",
    c.RAM_SAVE_FLAG_MULTIFD_FLUSH: "MULTIFD_FLUSH",
    c.RAM_SAVE_FLAG_PAGE: "PAGE",
    c.RAM_SAVE_FLAG_ZERO: "ZERO",
}
#: Words after the block list, by (mapped-ram, section type). QEMU's reader takes no other.
_ALLOWED: Final = {
    (True, c.QEMU_VM_SECTION_START): (c.RAM_SAVE_FLAG_EOS,),
    (True, c.QEMU_VM_SECTION_PART): (c.RAM_SAVE_FLAG_EOS,),
    (True, c.QEMU_VM_SECTION_END): (c.RAM_SAVE_FLAG_EOS,),
    (False, c.QEMU_VM_SECTION_START): (c.RAM_SAVE_FLAG_EOS, c.RAM_SAVE_FLAG_MULTIFD_FLUSH),
    (False, c.QEMU_VM_SECTION_PART): tuple(_FLAG_NAMES),
    (False, c.QEMU_VM_SECTION_END): tuple(_FLAG_NAMES),
}


class RamSection:
    """The one ram section of a stream.

    Attributes:
        section_id: what PART, END and the footers repeat.
        remaining: bytes of the total that no listed block has claimed yet.
    """

    def __init__(self, areas: AreaMap, *, file_size: int | None) -> None:
        """Begin before the START header.

        Args:
            areas: which ranges of the file are taken; grows with the block list.
            file_size: bytes of the whole file, or None.
        """
        self.section_id = 0
        self.remaining = 0
        self._configuration = Configuration("")
        self._areas = areas
        self._file_size = file_size
        self._total = 0
        self._total_at = 0
        self._used_lengths: dict[str, int] = {}
        self._last_idstr: str | None = None

    def read_start(self, cursor: Cursor, configuration: Configuration) -> RamStarted:
        """Read the START header and the total word.

        Raises:
            FormatError: another iterable device, another instance or version, a bad total.
            StarvedError: it is not all there.
        """
        self._configuration = configuration
        at = cursor.offset
        header = SectionHeader.read(cursor)
        if header.idstr != c.RAM_IDSTR:
            raise FormatError(
                f"iterable section {header.idstr!r} cannot be copied",
                offset=at,
                expected=c.RAM_IDSTR,
                found=header.idstr,
            )
        fields_at = cursor.offset - SectionHeader.STRUCT.size
        equal("instance of ram", c.RAM_INSTANCE_ID, header.instance_id, at=fields_at)
        equal("version of ram", c.RAM_VERSION_ID, header.version_id, at=fields_at + 4)
        self.section_id = header.section_id
        self._total_at = cursor.offset
        word = cursor.be64()
        flags = word % PAGE_SIZE
        equal("flags of the total word", c.RAM_SAVE_FLAG_MEM_SIZE, flags, at=self._total_at)
        self._total = self.remaining = word - flags
        at_most("total of ramblock lengths", c.RAM_BYTES_MAX, self._total, at=self._total_at)
        if not self._total:
            raise FormatError(
                "total of ramblock lengths", offset=self._total_at, expected="above 0", found=0
            )
        return RamStarted(at, self.section_id, self._total)

    def read_block(self, cursor: Cursor, *, piece_start: int) -> RamBlockRead:
        """Read one entry of the block list, and with mapped-ram take its areas of the file.

        Args:
            cursor: at the length byte of the name.
            piece_start: where the present stretch of main stream began, after the last jump.

        Raises:
            FormatError: the entry breaks a rule, alone or beside the entries before it.
            StarvedError: it is not all there.
        """
        at = cursor.offset
        self._refuse_early_end(cursor)
        idstr = cursor.lstr("name of a ramblock")
        if idstr in self._used_lengths:
            raise FormatError(
                "listed twice", offset=at, block=idstr, expected="one entry", found="two"
            )
        at_most("ramblocks", c.BLOCKS_MAX, len(self._used_lengths) + 1, at=at)
        length_at = cursor.offset
        used_length = cursor.be64()
        if not used_length or not is_aligned(used_length, PAGE_SIZE):
            raise FormatError(
                "used length",
                offset=length_at,
                block=idstr,
                expected=f"a multiple of {PAGE_SIZE} above 0",
                found=used_length,
            )
        listed = self._total - self.remaining + used_length
        if listed > self._total:
            # The sum and the total disagree; which of them lies cannot be told.
            raise FormatError(
                "total of ramblock lengths",
                offset=self._total_at,
                block=idstr,
                expected=f"at least {listed}",
                found=self._total,
            )
        gpa = cursor.be64() if self._configuration.ignore_shared else None
        header: MappedRamHeader | None = None
        if self._configuration.mapped_ram:
            header_at = cursor.offset
            raw = cursor.take(MappedRamHeader.STRUCT.size)
            header = MappedRamHeader.unpack(raw, at=header_at, block=idstr)
            self._areas.add(Area(piece_start, cursor.offset, "main stream"), at=piece_start)
            self._place(idstr, used_length, header, at=header_at)
        self._used_lengths[idstr] = used_length
        self.remaining -= used_length
        return RamBlockRead(at, idstr, used_length, gpa, header)

    def _refuse_early_end(self, cursor: Cursor) -> None:
        """Tell a total that is too large from a block without a name."""
        if cursor.peek(1)[0]:
            return
        # An EOS word and a footer, where a block with an empty name has nine bytes of its own.
        eos = BE64.pack(c.RAM_SAVE_FLAG_EOS) + bytes([c.QEMU_VM_SECTION_FOOTER])
        flush = BE64.pack(c.RAM_SAVE_FLAG_MULTIFD_FLUSH)
        if cursor.peek(len(eos)).startswith((eos, flush)):
            raise FormatError(
                "total of ramblock lengths",
                offset=self._total_at,
                expected=self._total - self.remaining,
                found=self._total,
            )

    def _place(self, idstr: str, used_length: int, header: MappedRamHeader, *, at: int) -> None:
        """Take the areas of a block, within the file and apart from all others."""
        bitmap_end = header.bitmap_offset + bitmap_length(used_length)
        pages_end = header.pages_offset + used_length
        limit = c.FILE_OFFSET_MAX if self._file_size is None else self._file_size
        at_most("end of the bitmap in the file", limit, bitmap_end, at=at + 12, block=idstr)
        at_most("end of the pages in the file", limit, pages_end, at=at + 20, block=idstr)
        self._areas.add(Area(header.bitmap_offset, bitmap_end, "bitmap", idstr), at=at + 12)
        self._areas.add(Area(header.pages_offset, pages_end, "page area", idstr), at=at + 20)

    def read_word(self, cursor: Cursor, section_type: int) -> Event | None:
        """Read one record of the section's body; None is the end of it.

        Raises:
            FormatError: flags that this kind of stream cannot have, an unknown block, a page
                beyond its block, a zero page that is not filled with zero.
            StarvedError: it is not all there.
        """
        at = cursor.offset
        word = cursor.be64()
        flags = word % PAGE_SIZE
        kind = flags & ~c.RAM_SAVE_FLAG_CONTINUE
        allowed = _ALLOWED[self._configuration.mapped_ram, section_type]
        is_page = kind in (c.RAM_SAVE_FLAG_PAGE, c.RAM_SAVE_FLAG_ZERO)
        if kind not in allowed or (word != kind and not is_page):
            raise FormatError(
                "ram flags",
                offset=at,
                expected=" or ".join(_FLAG_NAMES[flag] for flag in allowed),
                found=f"{word:#x}",
            )
        if kind == c.RAM_SAVE_FLAG_EOS:
            return RamSetupEnded(at) if section_type == c.QEMU_VM_SECTION_START else None
        if kind == c.RAM_SAVE_FLAG_MULTIFD_FLUSH:
            return MultifdFlush(at)
        idstr = self._block_of(cursor, flags)
        page_offset = word - flags
        last = self._used_lengths[idstr] - PAGE_SIZE
        at_most("offset of a page", last, page_offset, at=at, block=idstr)
        event: Event
        if kind == c.RAM_SAVE_FLAG_PAGE:
            event = RamPage(at, idstr, page_offset, cursor.take(PAGE_SIZE))
        else:
            fill_at = cursor.offset
            equal("fill byte of a zero page", 0, cursor.u8(), at=fill_at, block=idstr)
            event = RamZero(at, idstr, page_offset)
        self._last_idstr = idstr
        return event

    def take_records(self, index: PageIndex, cursor: Cursor, data: bytearray) -> bool:
        """Let an index take all the page records that are whole; say whether there were any."""
        start = cursor.position
        cursor.position, self._last_idstr = index.take(
            data,
            position=start,
            offset=cursor.offset,
            used_lengths=self._used_lengths,
            last_idstr=self._last_idstr,
        )
        return cursor.position > start

    def _block_of(self, cursor: Cursor, flags: int) -> str:
        """Read whose page a record is: named, or that of the record before."""
        at = cursor.offset
        if not flags & c.RAM_SAVE_FLAG_CONTINUE:
            idstr = cursor.lstr("name of a ramblock")
            if idstr not in self._used_lengths:
                raise FormatError(
                    "unknown ramblock", offset=at, expected="a listed one", found=idstr
                )
            return idstr
        if self._last_idstr is None:
            raise FormatError(
                "CONTINUE without a page before it", offset=at - BE64.size, expected="a name"
            )
        return self._last_idstr

    def read_footer(self, cursor: Cursor, section_type: int) -> RamSectionEnded:
        """Read the footer of a START, PART or END section.

        Raises:
            FormatError: it is missing or names another section.
            StarvedError: it is not all there.
        """
        at = cursor.offset
        read_footer(cursor, section_id=self.section_id, what=c.RAM_IDSTR)
        return RamSectionEnded(at, section_type, cursor.offset)


def read_footer(cursor: Cursor, *, section_id: int, what: str) -> None:
    """Read a footer that must name ``section_id``.

    Raises:
        FormatError: it is missing or names another section.
        StarvedError: it is not all there.
    """
    at = cursor.offset
    # The marker is judged alone: where it is missing, the stream may be too short for the rest.
    equal(
        f"footer of section {what!r} missing",
        c.QEMU_VM_SECTION_FOOTER,
        cursor.peek(1)[0],
        at=at,
    )
    footer = SectionFooter.unpack(cursor.take(SectionFooter.STRUCT.size), at=at)
    equal(f"section id in the footer of {what!r}", section_id, footer.section_id, at=at + 1)
