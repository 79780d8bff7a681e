"""What a plain stream says beside its pages, and the tail a mapped-ram file has in its place.

Rules: all items keep their order and their bytes, with two exceptions. Sections of ram that brought
pages are left out or emptied. Commands other than SWITCHOVER_START are left out, since they make
no sense in a file. So a tail that `PlainComposer` turned into a plain stream comes back unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from uringmig.errors import FormatError
from uringmig.format import constants as c
from uringmig.format.compose import compose_ram_section
from uringmig.format.device_state import DeviceState
from uringmig.format.events import (
    CommandRead,
    ConfigurationRead,
    DescriptionRead,
    Event,
    FullSection,
    MultifdFlush,
    RamBlockRead,
    RamSectionEnded,
    RamStarted,
)
from uringmig.format.headers import Command, Configuration, at_most


@dataclass(slots=True)
class PlainState:
    """Collects the events of one stream, all but those of pages; sizes in bytes, offsets absolute.

    Attributes:
        memory_bytes_max: more memory than this is not believed.
        blocks: (idstr, used_length) in the order of the stream.
    """

    memory_bytes_max: int
    configuration: Configuration = field(init=False)
    section_id: int = field(init=False)
    blocks: list[tuple[str, int]] = field(default_factory=list)
    _tail: list[bytes] = field(default_factory=list)
    _held_bytes: int = 0
    #: Where the last item ended; None until the START section has.
    _end: int | None = None
    #: Where in the tail ram ended: at the first PART that brought pages, or at END.
    _pages_at: int | None = None
    _has_part: bool = False

    def note(self, event: Event) -> None:
        """Keep what one event says.

        Raises:
            FormatError: the stream is not one that holds a whole guest, or too large.
        """
        match event:
            case ConfigurationRead(configuration=configuration):
                self.configuration = configuration
                if configuration.ignore_shared:
                    raise FormatError(
                        "saved with x-ignore-shared: the guest's shared memory is not in it",
                        offset=event.offset,
                        expected="its memory files beside it",
                    )
            case RamStarted():
                self.section_id = event.section_id
                limit = self.memory_bytes_max
                at_most("total of the ramblocks", limit, event.total_bytes, at=event.offset)
            case RamBlockRead():
                self.blocks.append((event.idstr, event.used_length))
            case MultifdFlush():
                raise FormatError(
                    "main channel of a multifd migration: its pages went by other channels",
                    offset=event.offset,
                )
            case RamSectionEnded():
                self._note_ram(event)
            case CommandRead(command=command) if self._end is not None:
                packed = Command(command, event.payload).pack()
                if command == c.MIG_CMD_SWITCHOVER_START:
                    self._keep(packed, at=event.offset)
                self._end = event.offset + len(packed)
            case FullSection(raw=raw):
                self._keep(raw, at=event.offset)
                self._end = event.offset + len(raw)
            case DescriptionRead(description=description):
                self._keep(bytes([c.QEMU_VM_EOF]) + description.pack(), at=event.offset)

    def device_state(self) -> DeviceState:
        """The tail of a mapped-ram file; it has a PART of ram, empty, if the stream had any."""
        pieces = list(self._tail)
        if self._pages_at is not None and not self._has_part:
            empty = compose_ram_section(c.QEMU_VM_SECTION_PART, section_id=self.section_id)
            pieces.insert(self._pages_at, empty)
        return DeviceState(b"".join(pieces))

    def _note_ram(self, event: RamSectionEnded) -> None:
        """Keep a section of ram without its pages."""
        kind = event.section_type
        if kind != c.QEMU_VM_SECTION_START:
            assert self._end is not None, "PART and END come after START"
            empty = compose_ram_section(kind, section_id=self.section_id)
            brought_pages = event.end_offset - self._end > len(empty)
            if self._pages_at is None and (brought_pages or kind == c.QEMU_VM_SECTION_END):
                self._pages_at = len(self._tail)
            if kind == c.QEMU_VM_SECTION_END or not brought_pages:
                self._has_part |= kind == c.QEMU_VM_SECTION_PART
                self._keep(empty, at=event.offset)
        self._end = event.end_offset

    def _keep(self, piece: bytes, *, at: int) -> None:
        """Add to the tail."""
        self._held_bytes += len(piece)
        at_most("bytes of device state", c.TAIL_BYTES_MAX, self._held_bytes, at=at)
        self._tail.append(piece)
