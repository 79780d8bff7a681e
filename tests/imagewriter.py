"""An independent writer of mapped-ram files: the oracle that the product's reader is tested with.

It knows the format from QEMU's rules alone (struct, nothing of uringmig), and it can be told to
lie about every field. What it lies about stays local: a wrong total is one wrong word, the rest of
the file is as QEMU would have written it. `Image.fields` names the offset of every field, so that a
test can say where the reader must have found the fault.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
ALIGNMENT = 0x100000

EOF_BYTE = b"\x00"
EOS = 0x10
MEM_SIZE = 0x04


@dataclass(frozen=True, kw_only=True)
class Block:
    """One ramblock; ``None`` means "what QEMU would write".

    Attributes:
        idstr: name; bytes when it should not be text.
        used_length: bytes the block claims.
        pages: page index to what is stored in its slot (any length, normally one page).
        bits: page indexes whose bit is set; None is the keys of ``pages``.
        bitmap: the bitmap's very bytes, in place of ``bits``.
        version, page_size, bitmap_offset, pages_offset: of the 28-byte header; absolute offsets.
        next_offset: where the main stream goes on; QEMU's is the end of the page area.
        idstr_length: the length byte before the name.
        gpa: written before the header if given, as x-ignore-shared would.
    """

    idstr: str | bytes
    used_length: int
    pages: Mapping[int, bytes] = field(default_factory=dict)
    bits: Sequence[int] | None = None
    bitmap: bytes | None = None
    version: int = 1
    page_size: int = PAGE
    bitmap_offset: int | None = None
    pages_offset: int | None = None
    next_offset: int | None = None
    idstr_length: int | None = None
    gpa: int | None = None


@dataclass(frozen=True, kw_only=True)
class Device:
    """One FULL section with its entry in the vmdescription."""

    idstr: str = "timer"
    instance_id: int = 0
    version_id: int = 2
    body: bytes = b"\x11" * 24
    section_id: int = 2
    footer_id: int | None = None
    described_bytes: int | None = None


@dataclass(frozen=True)
class Image:
    """A file as pieces; between and beyond them it is a hole.

    Attributes:
        pieces: (absolute offset, bytes), in the order of writing: a later piece wins.
        size: length of the file in bytes.
        fields: offset of each field, by names such as ``total`` and ``pc.ram.used_length``.
    """

    pieces: tuple[tuple[int, bytes], ...]
    size: int
    fields: Mapping[str, int]

    def write(self, path: Path, *, size: int | None = None) -> Path:
        """Write the file, sparse; ``size`` cuts or lengthens it."""
        length = self.size if size is None else size
        with path.open("wb") as file:
            file.truncate(length)
            for offset, data in self.pieces:
                if offset < length:
                    file.seek(offset)
                    file.write(data[: length - offset])
        return path

    def to_bytes(self) -> bytes:
        """The whole file in memory, for small images."""
        data = bytearray(self.size)
        for offset, piece in self.pieces:
            data[offset : offset + len(piece)] = piece
        return bytes(data)


def lstr(text: str | bytes, *, length: int | None = None) -> bytes:
    """A byte of length and the name; ``length`` overrides the byte."""
    raw = text.encode() if isinstance(text, str) else text
    return bytes([len(raw) if length is None else length]) + raw


def bitmap_bytes(used_length: int) -> int:
    """Whole 64-bit words that hold a bit for each page."""
    page_count = used_length // PAGE
    return (page_count + 63) // 64 * 8


def pack_bitmap(bits: Sequence[int], *, length: int) -> bytes:
    """Bit i of byte ``i >> 3``, place ``i & 7``."""
    packed = bytearray(length)
    for bit in bits:
        packed[bit >> 3] |= 1 << (bit & 7)
    return bytes(packed)


def configuration(
    *,
    machine: str | bytes = "pc-q35-10.0",
    machine_length: int | None = None,
    capabilities: Sequence[str] = ("mapped-ram",),
    capability_count: int | None = None,
    target_page_bits: int | None = None,
    uuid: bytes | None = None,
    subsection_version: int = 1,
) -> bytes:
    """The configuration item, its type byte 0x07 included."""
    name = machine.encode() if isinstance(machine, str) else machine
    out = (
        b"\x07" + struct.pack(">I", len(name) if machine_length is None else machine_length) + name
    )
    if target_page_bits is not None:
        out += b"\x05" + lstr("configuration/target-page-bits")
        out += struct.pack(">II", subsection_version, target_page_bits)
    if capabilities or capability_count is not None:
        count = len(capabilities) if capability_count is None else capability_count
        out += b"\x05" + lstr("configuration/capabilities")
        out += struct.pack(">II", subsection_version, count)
        out += b"".join(lstr(name) for name in capabilities)
    if uuid is not None:
        out += b"\x05" + lstr("configuration/uuid") + struct.pack(">I", subsection_version) + uuid
    return out


def command(number: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A COMMAND item."""
    size = len(payload) if length is None else length
    return b"\x08" + struct.pack(">HH", number, size) + payload


def footer(section_id: int) -> bytes:
    """The footer that ends a section body."""
    return b"\x7e" + struct.pack(">I", section_id)


def ram_section(
    kind: int, *, section_id: int = 1, words: Sequence[int] = (EOS,), footer_id: int | None = None
) -> bytes:
    """A PART (2) or END (3) section of ram: its words, normally EOS alone."""
    body = b"".join(struct.pack(">Q", word) for word in words)
    return (
        bytes([kind])
        + struct.pack(">I", section_id)
        + body
        + footer(section_id if footer_id is None else footer_id)
    )


def full_section(device: Device) -> bytes:
    """A FULL section with header and footer."""
    return (
        b"\x04"
        + struct.pack(">I", device.section_id)
        + lstr(device.idstr)
        + struct.pack(">II", device.instance_id, device.version_id)
        + device.body
        + footer(device.section_id if device.footer_id is None else device.footer_id)
    )


def description_json(devices: Sequence[Device]) -> bytes:
    """A vmdescription's text: each device as one field of the body's size."""
    entries = [
        {
            "name": device.idstr,
            "instance_id": device.instance_id,
            "vmsd_name": device.idstr,
            "version": device.version_id,
            "fields": [
                {
                    "name": "state",
                    "type": "buffer",
                    "size": len(device.body)
                    if device.described_bytes is None
                    else device.described_bytes,
                }
            ],
        }
        for device in devices
    ]
    return json.dumps({"configuration": {}, "page_size": PAGE, "devices": entries}).encode()


def description(text: bytes, *, length: int | None = None) -> bytes:
    """The vmdescription item around a text."""
    return b"\x06" + struct.pack(">I", len(text) if length is None else length) + text


def trailer(
    *,
    section_id: int = 1,
    early: Sequence[Device] = (),
    devices: Sequence[Device] = (),
    part: bytes | None = None,
    end: bytes | None = None,
    commands: bytes = b"",
    end_of_items: bytes = EOF_BYTE,
    text: bytes | None = None,
    text_length: int | None = None,
) -> bytes:
    """Everything after the footer of ram's START section."""
    if text is None:
        text = description_json([*early, *devices])
    return (
        b"".join(full_section(device) for device in early)
        + (ram_section(2, section_id=section_id) if part is None else part)
        + commands
        + (ram_section(3, section_id=section_id) if end is None else end)
        + b"".join(full_section(device) for device in devices)
        + end_of_items
        + description(text, length=text_length)
    )


class _Pen:
    """Appends at a position and remembers what is where."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.pieces: list[tuple[int, bytes]] = []
        self.fields: dict[str, int] = {}

    def put(self, name: str, data: bytes) -> None:
        self.fields[name] = self.position
        self.pieces.append((self.position, data))
        self.position += len(data)

    def put_at(self, name: str, offset: int, data: bytes) -> None:
        self.fields[name] = offset
        self.pieces.append((offset, data))


def _put_block(pen: _Pen, block: Block) -> None:
    """The record of one block, its bitmap and its pages; leaves the pen where the next goes."""
    name = block.idstr if isinstance(block.idstr, str) else block.idstr.decode("latin-1")
    length = bitmap_bytes(block.used_length)
    pen.put(f"{name}.idstr", lstr(block.idstr, length=block.idstr_length))
    pen.put(f"{name}.used_length", struct.pack(">Q", block.used_length))
    if block.gpa is not None:
        pen.put(f"{name}.gpa", struct.pack(">Q", block.gpa))
    after_header = pen.position + 28
    bitmap_offset = after_header if block.bitmap_offset is None else block.bitmap_offset
    pages_offset = block.pages_offset
    if pages_offset is None:
        # QEMU rounds the end of a bitmap that follows the header, wherever the header says it is.
        pages_offset = (after_header + length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    pen.put(f"{name}.version", struct.pack(">I", block.version))
    pen.put(f"{name}.page_size", struct.pack(">Q", block.page_size))
    pen.put(f"{name}.bitmap_offset", struct.pack(">Q", bitmap_offset))
    pen.put(f"{name}.pages_offset", struct.pack(">Q", pages_offset))
    bitmap = block.bitmap
    if bitmap is None:
        bits = list(block.pages) if block.bits is None else block.bits
        bitmap = pack_bitmap(bits, length=length)
    pen.put_at(f"{name}.bitmap", bitmap_offset, bitmap)
    pen.fields[f"{name}.pages"] = pages_offset
    for index, content in block.pages.items():
        pen.put_at(f"{name}.page{index}", pages_offset + index * PAGE, content)
    end = pages_offset + block.used_length
    pen.position = end if block.next_offset is None else block.next_offset


def build_image(
    *,
    blocks: Sequence[Block],
    base: int = 0,
    before: bytes = b"",
    magic: int = 0x5145564D,
    version: int = 3,
    config: bytes | None = None,
    items: bytes = b"",
    section_id: int = 1,
    idstr: str = "ram",
    instance_id: int = 0,
    version_id: int = 4,
    total: int | None = None,
    start_words: Sequence[int] = (EOS,),
    footer_id: int | None = None,
    start_footer: bytes | None = None,
    tail: bytes | None = None,
    after: bytes = b"",
) -> Image:
    """Compose a mapped-ram file; every default is what QEMU writes.

    ``base`` is the file offset of the stream (QEMU's ``offset=``), ``before`` what lies below it.
    ``config`` is the whole configuration item, as `configuration` makes it; ``items`` stands
    between it and the START section. ``total`` is the MEM_SIZE word with its flag. ``start_words``
    follow the last block, ``start_footer`` is the very bytes of the footer, ``tail`` all after it,
    as `trailer` makes it, and ``after`` lies past the end of the stream.
    """
    pen = _Pen(base)
    if before:
        pen.pieces.append((0, before))
    pen.put("magic", struct.pack(">I", magic))
    pen.put("version", struct.pack(">I", version))
    pen.put("configuration", configuration() if config is None else config)
    pen.put("items", items)
    pen.put("start", b"\x01" + struct.pack(">I", section_id))
    pen.put("start.idstr", lstr(idstr))
    pen.put("start.instance_id", struct.pack(">I", instance_id))
    pen.put("start.version_id", struct.pack(">I", version_id))
    if total is None:
        total = sum(block.used_length for block in blocks) | MEM_SIZE
    pen.put("total", struct.pack(">Q", total))
    for block in blocks:
        _put_block(pen, block)
    pen.fields["trailer"] = pen.position
    for word in start_words:
        pen.put("eos", struct.pack(">Q", word))
    if start_footer is None:
        start_footer = footer(section_id if footer_id is None else footer_id)
    pen.put("footer", start_footer)
    pen.put("tail", trailer(section_id=section_id) if tail is None else tail)
    pen.put("end", after)
    # A page area put behind the stream on purpose belongs to the file as well.
    size = max([pen.position, *(offset + len(data) for offset, data in pen.pieces)])
    return Image(tuple(pen.pieces), size, pen.fields)
