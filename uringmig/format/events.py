"""What a main stream says, one value per thing said; `MainStreamReader` yields them in order.

Every event carries ``offset``, the absolute offset of its first byte in the file or stream.
"""

from __future__ import annotations

from msgspec import Struct

from uringmig.format.headers import Configuration, MappedRamHeader, SectionHeader
from uringmig.format.vmdescription import VmDescription


class StreamStarted(Struct, frozen=True):
    """Magic and version were right."""

    offset: int


class ConfigurationRead(Struct, frozen=True):
    """The configuration is whole."""

    offset: int
    configuration: Configuration


class CommandRead(Struct, frozen=True):
    """A command to the loader: OPEN_RETURN_PATH, PING or SWITCHOVER_START."""

    offset: int
    command: int
    payload: bytes


class RamStarted(Struct, frozen=True):
    """The ram section began.

    Attributes:
        offset: of the section's type byte.
        section_id: what PART, END and the footers must repeat.
        total_bytes: sum of all blocks' used lengths, ignored blocks included.
    """

    offset: int
    section_id: int
    total_bytes: int


class RamBlockRead(Struct, frozen=True):
    """One ramblock of the list.

    Attributes:
        offset: of the length byte of its name.
        idstr: its name.
        used_length: bytes of memory.
        gpa: guest physical address within its container; with x-ignore-shared only.
        mapped_ram: where its bitmap and pages lie; with mapped-ram only.
    """

    offset: int
    idstr: str
    used_length: int
    gpa: int | None
    mapped_ram: MappedRamHeader | None


class RamSetupEnded(Struct, frozen=True):
    """The block list is whole; ``offset`` is that of the EOS word."""

    offset: int


class RamPage(Struct, frozen=True):
    """A page of a plain stream; ``page_offset`` is in bytes within the block."""

    offset: int
    idstr: str
    page_offset: int
    data: bytes


class RamZero(Struct, frozen=True):
    """A zero page of a plain stream; ``page_offset`` is in bytes within the block."""

    offset: int
    idstr: str
    page_offset: int


class MultifdFlush(Struct, frozen=True):
    """A barrier between the main stream and the multifd channels."""

    offset: int


class RamSectionEnded(Struct, frozen=True):
    """The footer of a START, PART or END section of ram was right.

    Attributes:
        offset: of the footer.
        section_type: QEMU_VM_SECTION_START, _PART or _END.
        end_offset: of the first byte after the footer.
    """

    offset: int
    section_type: int
    end_offset: int


class FullSection(Struct, frozen=True):
    """A device's state; ``raw`` runs from the type byte to the end of the footer."""

    offset: int
    header: SectionHeader
    raw: bytes


class StreamEnded(Struct, frozen=True):
    """The EOF byte."""

    offset: int


class DescriptionRead(Struct, frozen=True):
    """The vmdescription item, the last thing of a stream."""

    offset: int
    description: VmDescription


Event = (
    StreamStarted
    | ConfigurationRead
    | CommandRead
    | RamStarted
    | RamBlockRead
    | RamSetupEnded
    | RamPage
    | RamZero
    | MultifdFlush
    | RamSectionEnded
    | FullSection
    | StreamEnded
    | DescriptionRead
)
