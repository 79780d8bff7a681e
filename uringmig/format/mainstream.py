"""The main stream, read in pieces of any size: bytes in, events out.

Rules: no I/O. An item is taken whole or not at all; what is incomplete stays buffered until more is
fed. One table says which item may come in which state. With mapped-ram the stream jumps over the
page areas: `MainStreamReader.offset` says which byte must be fed next. The first error is final.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final

from uringmig.errors import FormatError
from uringmig.format import constants as c
from uringmig.format.compose import compose_setup
from uringmig.format.cursor import BE32, Cursor, StarvedError
from uringmig.format.events import (
    CommandRead,
    ConfigurationRead,
    DescriptionRead,
    Event,
    FullSection,
    RamSetupEnded,
    StreamEnded,
    StreamStarted,
)
from uringmig.format.headers import (
    Command,
    Configuration,
    SectionHeader,
    StreamHeader,
    at_most,
    equal,
)
from uringmig.format.layout import Area, AreaMap
from uringmig.format.plainrecords import PageIndex
from uringmig.format.ramsection import RamSection, read_footer
from uringmig.format.vmdescription import DeviceDescription, VmDescription, find_vmdescription

__all__ = ["Event", "MainStreamReader", "compose_setup"]


class _State(Enum):
    """What must come next; the value completes "the stream is cut in"."""

    HEADER = "its header"
    CONFIGURATION = "its configuration"
    OPENING = "the items before the ram section"
    BLOCKS = "the list of ramblocks"
    WORDS = "the ram section"
    FOOTER = "the footer of a ram section"
    ITEMS = "its items, before the final EOF"
    DESCRIPTION = "its vmdescription"
    FINISHED = "nothing"


class MainStreamReader:
    """Reads the main stream of a mapped-ram file, or a plain stream from a file or socket.

    Feed the bytes that start at `offset`, look at `events`, and go on until `finished`. How long a
    section of device state is, only the vmdescription says, and it comes last. So the reader holds
    such sections back until it has that. In a file it finds it at the end by itself. On a socket
    the caller asks `find_description` after each feed, as long as `waiting_for_description`.
    """

    def __init__(
        self, *, base: int = 0, file_size: int | None = None, index: PageIndex | None = None
    ) -> None:
        """Begin before the stream header.

        Args:
            base: absolute offset of the stream header.
            file_size: bytes of the whole file, which bounds every offset; None for a socket.
            index: takes the pages of a plain stream, in place of an event for each.
        """
        self._file_size = file_size
        self._limit = file_size
        self._index = index
        self._offset = base
        self._buffer = bytearray()
        self._position = 0
        self._piece_start = base
        self._areas = AreaMap()
        self._areas.add(Area(0, base, "range before the stream"), at=base)
        self._state = _State.HEADER
        self._events: deque[Event] = deque()
        self._failure: FormatError | None = None
        self._configuration = Configuration("")
        self._return_path = False
        self._ram = RamSection(self._areas, file_size=file_size)
        self._section_type = c.QEMU_VM_SECTION_START
        self._tail_offset: int | None = None
        self._description: VmDescription | None = None
        self._devices_read = 0
        self._item_count = 0
        self._waiting = False

    @property
    def offset(self) -> int:
        """Absolute offset of the next byte that `feed` expects; the stream's end once finished."""
        return self._offset

    @property
    def tail_offset(self) -> int | None:
        """Absolute offset past the footer of ram's START section, where a `DeviceState` begins."""
        return self._tail_offset

    @property
    def waiting_for_description(self) -> bool:
        """Whether a FULL section is held back whose length only the vmdescription tells."""
        return self._waiting

    @property
    def finished(self) -> bool:
        """Whether EOF and vmdescription have been read, and nothing follows them."""
        return self._state is _State.FINISHED

    def feed(self, data: bytes | memoryview) -> None:
        """Take the bytes at `offset` and read what they complete.

        Bytes past the end of the file or of a stretch of main stream are dropped: after a jump
        feed again from the new `offset`.

        Raises:
            FormatError: the stream breaks a rule; every later call raises the same. The events
                before the fault can still be had.
        """
        if self._failure is not None:
            raise self._failure
        room = len(data) if self._limit is None else max(0, self._limit - self._offset)
        if self.finished and self._file_size is None and data:
            self._fail(FormatError("bytes after the vmdescription", offset=self._offset))
        if not self.finished:
            taken = data[:room]
            self._buffer += taken
            self._offset += len(taken)
            self._run()

    def events(self) -> Iterator[Event]:
        """Yield and forget every event complete so far, in stream order."""
        while self._events:
            yield self._events.popleft()

    def set_description(self, description: VmDescription) -> None:
        """Say how long the FULL sections are; what was held back is read at once.

        Raises:
            FormatError: a section held back is not as described.
        """
        self._description = description
        self._waiting = False
        if self._failure is None and not self.finished:
            self._run()

    def find_description(self) -> VmDescription | None:
        """Look whether the bytes held back end exactly with a vmdescription.

        Returns:
            The vmdescription, for `set_description`; or None, so more must come.

        Raises:
            FormatError: reading a file, what stands at its end is no vmdescription of QEMU's.
        """
        tail = self._buffer
        if self._limit is not None and self._limit != self._file_size:
            # The stream need not reach the area that bounds it; JSON does not end in zero bytes.
            tail = tail.rstrip(b"\0")
        # On a socket every feed asks: one byte settles nearly all of them.
        if self._file_size is None and not tail.endswith(b"}"):
            return None
        place = find_vmdescription(tail)
        if place is None:
            return None
        text = bytes(tail[place + 1 + BE32.size :])
        try:
            return VmDescription.parse(text, at=self._offset - len(self._buffer) + place + 5)
        except FormatError:
            if self._file_size is None:
                return None
            raise

    def end_of_input(self) -> None:
        """Say that no more bytes will come.

        Raises:
            FormatError: the stream is not finished.
        """
        if self._failure is not None:
            raise self._failure
        if not self.finished:
            self._fail(self._cut())

    def _fail(self, error: FormatError) -> None:
        """Keep an error for every later call, and raise it."""
        self._failure = error
        self._buffer.clear()
        self._position = 0
        raise error

    def _run(self) -> None:
        """Read what is complete; find the vmdescription of a file once all of it is held."""
        try:
            self._advance()
            if self._waiting and self._offset == self._limit:
                description = self.find_description()
                if description is None:
                    raise FormatError(
                        "vmdescription missing, cut, or followed by other bytes",
                        offset=self._limit,
                        expected="one that ends here",
                    )
                self._description = description
                self._waiting = False
                self._advance()
            if self._limit is not None and self._offset >= self._limit and not self.finished:
                raise self._cut()
        except FormatError as error:
            self._fail(error)

    def _advance(self) -> None:
        """Take items until one is incomplete."""
        while not self._waiting and not self.finished:
            start = self._offset - len(self._buffer)
            cursor = Cursor(self._buffer, offset=start + self._position, position=self._position)
            try:
                target = self._handler(cursor)(self, cursor)
            except StarvedError:
                break
            self._position = cursor.position
            if target is not None:
                self._jump(target)
        del self._buffer[: self._position]
        self._position = 0
        self._bound_tail()

    def _jump(self, target: int) -> None:
        """Go on at another offset of the file, up to the next area or the file's end."""
        limit = self._areas.limit_from(target, at=target)
        self._limit = self._file_size if limit is None else limit
        self._buffer.clear()
        self._position = 0
        self._offset = self._piece_start = target

    def _bound_tail(self) -> None:
        """Refuse more device state than any guest has: no stream may fill our memory."""
        if self._tail_offset is None:
            return
        held = len(self._buffer)
        if self._configuration.mapped_ram:
            held = self._offset - self._tail_offset
        at_most("bytes of device state", c.TAIL_BYTES_MAX, held, at=self._tail_offset)

    def _cut(self) -> FormatError:
        """Say what is missing where the bytes end."""
        if self._limit != self._file_size and self._offset == self._limit:
            what = "main stream runs into the area of a ramblock"
        else:
            what = f"stream is cut in {self._state.value}"
        return FormatError(what, offset=self._offset, expected="more bytes", found="none")

    def _handler(self, cursor: Cursor) -> _Handler:
        """Look up what reads the next item.

        Raises:
            FormatError: no item of that type can come in this state.
            StarvedError: the type byte is not there.
        """
        handler = _TABLE.get((self._state, None))
        if handler is None:
            item = cursor.peek(1)[0]
            handler = _TABLE.get((self._state, item))
            if handler is None:
                keys = [key for state, key in _TABLE if state is self._state]
                allowed = [f"{key:#04x}" for key in keys if key is not None]
                raise FormatError(
                    f"type byte of {self._state.value}",
                    offset=cursor.offset,
                    expected=" or ".join(allowed),
                    found=f"{item:#04x}",
                )
        return handler

    def _read_header(self, cursor: Cursor) -> None:
        at = cursor.offset
        StreamHeader.read(cursor)
        self._events.append(StreamStarted(at))
        self._state = _State.CONFIGURATION

    def _read_configuration(self, cursor: Cursor) -> None:
        at = cursor.offset
        self._configuration = Configuration.read(cursor)
        self._events.append(ConfigurationRead(at, self._configuration))
        self._state = _State.OPENING

    def _read_command(self, cursor: Cursor) -> None:
        at = cursor.offset
        command = Command.read(cursor)
        if command.command == c.MIG_CMD_PING and not self._return_path:
            raise FormatError(
                "PING without OPEN_RETURN_PATH before it",
                offset=at + 1,
                expected=c.MIG_CMD_OPEN_RETURN_PATH,
                found=c.MIG_CMD_PING,
            )
        self._count_item(at=at)
        self._return_path |= command.command == c.MIG_CMD_OPEN_RETURN_PATH
        self._events.append(CommandRead(at, command.command, command.payload))

    def _count_item(self, *, at: int) -> None:
        """Refuse more small items than any guest has: each becomes an event that takes memory."""
        self._item_count += 1
        at_most("PART sections and commands", c.ITEMS_MAX, self._item_count, at=at)

    def _read_start(self, cursor: Cursor) -> None:
        self._events.append(self._ram.read_start(cursor, self._configuration))
        self._section_type = c.QEMU_VM_SECTION_START
        self._state = _State.BLOCKS

    def _refuse_start(self, cursor: Cursor) -> None:
        at = cursor.offset
        idstr = SectionHeader.read(cursor).idstr
        what = f"iterable section {idstr!r} cannot be copied"
        if idstr == c.RAM_IDSTR:
            what = "second START of the ram section"
        raise FormatError(what, offset=at, expected="one iterable section, ram", found=idstr)

    def _read_block(self, cursor: Cursor) -> int | None:
        block = self._ram.read_block(cursor, piece_start=self._piece_start)
        self._events.append(block)
        if not self._ram.remaining:
            self._state = _State.WORDS
        header = block.mapped_ram
        return None if header is None else header.pages_offset + block.used_length

    def _read_word(self, cursor: Cursor) -> None:
        # Pages come in PART and END only, and with mapped-ram not at all.
        in_start = self._section_type == c.QEMU_VM_SECTION_START
        if not (self._index is None or in_start or self._configuration.mapped_ram):
            taken = self._ram.take_records(self._index, cursor, self._buffer)
            if taken:
                return
        event = self._ram.read_word(cursor, self._section_type)
        if event is not None:
            self._events.append(event)
        if event is None or isinstance(event, RamSetupEnded):
            self._state = _State.FOOTER

    def _read_ram_footer(self, cursor: Cursor) -> None:
        event = self._ram.read_footer(cursor, self._section_type)
        self._events.append(event)
        self._state = _State.ITEMS
        if self._section_type == c.QEMU_VM_SECTION_START:
            self._tail_offset = event.end_offset

    def _read_part(self, cursor: Cursor) -> None:
        at = cursor.offset
        section_type = cursor.u8()
        section_id = cursor.be32()
        name = c.SECTION_NAMES[section_type]
        equal(f"section id of a {name}", self._ram.section_id, section_id, at=at + 1)
        if self._section_type == c.QEMU_VM_SECTION_END:
            raise FormatError(f"{name} of ram after its END", offset=at)
        self._count_item(at=at)
        self._section_type = section_type
        self._state = _State.WORDS

    def _read_full(self, cursor: Cursor) -> None:
        at = cursor.offset
        first = cursor.position
        header = SectionHeader.read(cursor)
        if header.section_id == self._ram.section_id or header.idstr == c.RAM_IDSTR:
            raise FormatError(
                f"FULL section {header.idstr!r} with the id or name of the ram section",
                offset=at + 1,
                expected=f"neither {self._ram.section_id} nor {c.RAM_IDSTR!r}",
                found=header.section_id,
            )
        if self._description is None:
            self._waiting = True
            raise StarvedError
        device = self._described(header, self._description, at=at)
        cursor.take(device.body_bytes)
        read_footer(cursor, section_id=header.section_id, what=header.idstr)
        self._devices_read += 1
        raw = bytes(self._buffer[first : cursor.position])
        self._events.append(FullSection(at, header, raw))

    def _described(
        self, header: SectionHeader, description: VmDescription, *, at: int
    ) -> DeviceDescription:
        """Find the description of a FULL section; they come in stream order.

        Raises:
            FormatError: the next description is of another section, or there is none.
        """
        found = f"{header.idstr!r} instance {header.instance_id}"
        if self._devices_read == len(description.devices):
            raise FormatError(
                "section that the vmdescription lacks", offset=at, expected="EOF", found=found
            )
        device = description.devices[self._devices_read]
        if (device.name, device.instance_id) != (header.idstr, header.instance_id):
            raise FormatError(
                "section out of the vmdescription's order",
                offset=at,
                expected=f"{device.name!r} instance {device.instance_id}",
                found=found,
            )
        return device

    def _read_eof(self, cursor: Cursor) -> None:
        at = cursor.offset
        cursor.u8()
        self._events.append(StreamEnded(at))
        self._state = _State.DESCRIPTION

    def _read_description(self, cursor: Cursor) -> None:
        at = cursor.offset
        equal("vmdescription missing", c.QEMU_VM_VMDESCRIPTION, cursor.u8(), at=at)
        length = cursor.be32()
        at_most("length of the vmdescription", c.VMDESCRIPTION_BYTES_MAX, length, at=at + 1)
        self._refuse_short_file(cursor, length)
        text = cursor.take(length)
        description = self._description
        if description is None or description.raw != text:
            description = VmDescription.parse(text, at=at + 1 + BE32.size)
        if self._description is not None and description.devices != self._description.devices:
            raise FormatError("vmdescription differs from the one sections were read by", offset=at)
        if len(description.devices) != self._devices_read:
            raise FormatError(
                "count of sections in the vmdescription",
                offset=at,
                expected=self._devices_read,
                found=len(description.devices),
            )
        self._events.append(DescriptionRead(at, description))
        self._finish(cursor)

    def _refuse_short_file(self, cursor: Cursor, length: int) -> None:
        """Refuse a vmdescription that goes on past the end of the file, with its length."""
        if self._limit is not None and cursor.offset + length > self._limit:
            raise FormatError(
                "vmdescription is cut",
                offset=cursor.offset,
                expected=f"{length} bytes",
                found=f"{self._limit - cursor.offset} bytes",
            )

    def _finish(self, cursor: Cursor) -> None:
        """End the stream, and refuse what follows it.

        With mapped-ram an area of a ramblock may lie behind the stream; nothing else may.
        """
        end = cursor.offset
        self._areas.add(Area(self._piece_start, end, "main stream"), at=self._piece_start)
        file_end = self._offset if self._file_size is None else self._file_size
        last = end if self._file_size is None else self._areas.end
        if file_end != last:
            raise FormatError(
                "bytes after the end of the image", offset=last, expected=last, found=file_end
            )
        self._buffer.clear()
        cursor.position = 0
        self._offset = end
        self._state = _State.FINISHED


_Handler = Callable[[MainStreamReader, Cursor], int | None]

#: Who reads what may come next, by state and the item's type byte; None is any byte.
_TABLE: Final[dict[tuple[_State, int | None], _Handler]] = {
    (_State.HEADER, None): MainStreamReader._read_header,
    (_State.CONFIGURATION, None): MainStreamReader._read_configuration,
    (_State.OPENING, c.QEMU_VM_COMMAND): MainStreamReader._read_command,
    (_State.OPENING, c.QEMU_VM_SECTION_START): MainStreamReader._read_start,
    (_State.BLOCKS, None): MainStreamReader._read_block,
    (_State.WORDS, None): MainStreamReader._read_word,
    (_State.FOOTER, None): MainStreamReader._read_ram_footer,
    (_State.ITEMS, c.QEMU_VM_COMMAND): MainStreamReader._read_command,
    (_State.ITEMS, c.QEMU_VM_SECTION_START): MainStreamReader._refuse_start,
    (_State.ITEMS, c.QEMU_VM_SECTION_PART): MainStreamReader._read_part,
    (_State.ITEMS, c.QEMU_VM_SECTION_END): MainStreamReader._read_part,
    (_State.ITEMS, c.QEMU_VM_SECTION_FULL): MainStreamReader._read_full,
    (_State.ITEMS, c.QEMU_VM_EOF): MainStreamReader._read_eof,
    (_State.DESCRIPTION, None): MainStreamReader._read_description,
}
