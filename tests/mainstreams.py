"""Main streams for the format's tests: a tiny writer of plain streams, and ways to feed a reader.

The writer shares no code with uringmig; mapped-ram images come from imagewriter, made small by
page areas aligned to 4 KiB only.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import imagewriter
from imagewriter import PAGE, Device, lstr

from uringmig.errors import FormatError
from uringmig.format.events import Event
from uringmig.format.mainstream import MainStreamReader

EOS, FLUSH, PAGE_FLAG, ZERO_FLAG, CONTINUE = 0x10, 0x200, 0x08, 0x02, 0x20


@dataclass(frozen=True, kw_only=True)
class PlainBlock:
    """One entry of a plain stream's block list; ``gpa`` only with x-ignore-shared."""

    idstr: str
    used_length: int
    gpa: int | None = None

    def entry(self) -> bytes:
        gpa = b"" if self.gpa is None else struct.pack(">Q", self.gpa)
        return lstr(self.idstr) + struct.pack(">Q", self.used_length) + gpa


def word(value: int) -> bytes:
    """A word of the ram section."""
    return struct.pack(">Q", value)


def page_record(page_offset: int, data: bytes, idstr: str | None = None) -> bytes:
    """A PAGE record; without a name it continues the block of the record before."""
    if idstr is None:
        return word(page_offset | PAGE_FLAG | CONTINUE) + data
    return word(page_offset | PAGE_FLAG) + lstr(idstr) + data


def zero_record(page_offset: int, idstr: str | None = None, *, fill: int = 0) -> bytes:
    """A ZERO record; without a name it continues the block of the record before."""
    if idstr is None:
        return word(page_offset | ZERO_FLAG | CONTINUE) + bytes([fill])
    return word(page_offset | ZERO_FLAG) + lstr(idstr) + bytes([fill])


def ram_section(kind: int, body: bytes, *, section_id: int = 1) -> bytes:
    """A PART (2) or END (3) section around a body, which must hold its own EOS."""
    return bytes([kind]) + struct.pack(">I", section_id) + body + imagewriter.footer(section_id)


def plain_start(
    blocks: Sequence[PlainBlock],
    *,
    capabilities: Sequence[str] = (),
    commands: bytes = b"",
    section_id: int = 1,
    total: int | None = None,
    words: bytes | None = None,
) -> bytes:
    """Everything from the magic to the footer of ram's START section."""
    size = sum(block.used_length for block in blocks) if total is None else total
    return (
        b"QEVM\x00\x00\x00\x03"
        + imagewriter.configuration(capabilities=capabilities)
        + commands
        + b"\x01"
        + struct.pack(">I", section_id)
        + b"\x03ram"
        + struct.pack(">II", 0, 4)
        + word(size | 0x04)
        + b"".join(block.entry() for block in blocks)
        + (word(EOS) if words is None else words)
        + imagewriter.footer(section_id)
    )


def plain_tail(
    *, early: Sequence[Device] = (), devices: Sequence[Device] = (), ram: bytes = b""
) -> bytes:
    """Everything after START: early sections, ram's own bytes, sections, EOF, vmdescription."""
    return (
        b"".join(imagewriter.full_section(device) for device in early)
        + ram
        + b"".join(imagewriter.full_section(device) for device in devices)
        + b"\x00"
        + imagewriter.description(imagewriter.description_json([*early, *devices]))
    )


def small_image(
    *,
    base: int = 0,
    devices: Sequence[Device] = (),
    early: Sequence[Device] = (),
    section_id: int = 1,
    commands: bytes = b"",
) -> imagewriter.Image:
    """A mapped-ram image of 3 pages in two blocks, 24 KiB in all."""
    first = (base // PAGE + 1) * PAGE
    return imagewriter.build_image(
        base=base,
        section_id=section_id,
        blocks=[
            imagewriter.Block(idstr="pc.ram", used_length=2 * PAGE, pages_offset=first),
            imagewriter.Block(idstr="/rom@x", used_length=PAGE, pages_offset=first + 3 * PAGE),
        ],
        tail=imagewriter.trailer(
            section_id=section_id, early=early, devices=devices, commands=commands
        ),
    )


def read_file(
    image: bytes, *, base: int = 0, step: int = 1 << 20, first: int | None = None
) -> list[Event]:
    """Read an image as a file: by the reader's offset, in steps; ``first`` is the first one."""
    reader = MainStreamReader(base=base, file_size=len(image))
    events: list[Event] = []
    size = step if first is None else first
    while not reader.finished:
        data = image[reader.offset : reader.offset + size]
        if not data and size:
            reader.end_of_input()
        reader.feed(data)
        events += reader.events()
        size = step
    return events


def read_file_cut(image: bytes, cut: int, *, base: int = 0) -> list[Event]:
    """Read an image as a file, up to the offset ``cut`` first and then the rest."""
    reader = MainStreamReader(base=base, file_size=len(image))
    events: list[Event] = []
    for end in (cut, len(image)):
        while not reader.finished and reader.offset < end:
            reader.feed(memoryview(image)[reader.offset : end])
            events += reader.events()
    assert reader.finished
    return events


def read_socket(*pieces: bytes) -> list[Event]:
    """Read a stream as from a socket, asking for the vmdescription as a receiver does."""
    reader = MainStreamReader()
    events: list[Event] = []
    for piece in pieces:
        reader.feed(piece)
        if reader.waiting_for_description:
            description = reader.find_description()
            if description is not None:
                reader.set_description(description)
        events += reader.events()
    reader.end_of_input()
    return events


def refusal(image: bytes, *, file_size: int | None, base: int = 0) -> FormatError | None:
    """Feed all that is there; give the refusal, or None where the stream is whole."""
    reader = MainStreamReader(base=base, file_size=file_size)
    try:
        while not reader.finished:
            data = image[reader.offset :]
            reader.feed(data)
            if reader.waiting_for_description:
                description = reader.find_description()
                if description is not None:
                    reader.set_description(description)
            list(reader.events())
            if not reader.finished and not image[reader.offset :]:
                reader.end_of_input()
    except FormatError as error:
        return error
    return None
