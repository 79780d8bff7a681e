"""What a main stream says, one value per thing said; `MainStreamReader` yields them in order.

Every event carries ``offset``, the absolute offset of its first byte in the file or stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from uringmig.format.headers import Configuration, MappedRamHeader, SectionHeader
from uringmig.format.vmdescription import VmDescription


@dataclass(frozen=True, slots=True)
class StreamStarted:
    """Magic and version were right."""

    offset: int


@dataclass(frozen=True, slots=True)
class ConfigurationRead:
    """The configuration is whole."""

    offset: int
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class CommandRead:
    """A command to the loader: OPEN_RETURN_PATH, PING or SWITCHOVER_START."""

    offset: int
    command: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class RamStarted:
    """The ram section began.

    Attributes:
        offset: of the section's type byte.
        section_id: what PART, END and the footers must repeat.
        total_bytes: sum of all blocks' used lengths, ignored blocks included.
    """

    offset: int
    section_id: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RamBlockRead:
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


@dataclass(frozen=True, slots=True)
class RamSetupEnded:
    """The block list is whole; ``offset`` is that of the EOS word."""

    offset: int


@dataclass(frozen=True, slots=True)
class RamPage:
    """A page of a plain stream; ``page_offset`` is in bytes within the block."""

    offset: int
    idstr: str
    page_offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class RamZero:
    """A zero page of a plain stream; ``page_offset`` is in bytes within the block."""

    offset: int
    idstr: str
    page_offset: int


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """A barrier between the main stream and the multifd channels."""

    offset: int


@dataclass(frozen=True, slots=True)
class RamSectionEnded:
    """The footer of a START, PART or END section of ram was right.

    Attributes:
        offset: of the footer.
        section_type: QEMU_VM_SECTION_START, _PART or _END.
        end_offset: of the first byte after the footer.
    """

    offset: int
    section_type: int
    end_offset: int


@dataclass(frozen=True, slots=True)
class FullSection:
    """A device's state; ``raw`` runs from the type byte to the end of the footer."""

    offset: int
    header: SectionHeader
    raw: bytes


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The EOF byte."""

    offset: int


@dataclass(frozen=True, slots=True)
class DescriptionRead:
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
