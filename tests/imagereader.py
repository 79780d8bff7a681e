"""An independent reader of mapped-ram files: slow, obvious, strict; the oracle for our writer.

It imports nothing of uringmig and goes through the file field by field. `ValueError` at the first
thing that is not as QEMU 10.0 writes it; with ``placement="any"`` the places of bitmaps and page
areas are free, as they are for QEMU's loader.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

PAGE = 4096
ALIGNMENT = 0x100000


@dataclass(frozen=True)
class ReadBlock:
    """A ramblock as the file has it; ``bits`` are the indexes of the set bits, ascending."""

    idstr: str
    used_length: int
    header_offset: int
    bitmap_offset: int
    pages_offset: int
    bits: tuple[int, ...]


@dataclass(frozen=True)
class ReadSection:
    """An item of the tail; ``raw`` runs from the type byte to the end of the footer."""

    kind: int
    idstr: str
    instance_id: int
    raw: bytes


@dataclass(frozen=True)
class ReadImage:
    """What `read_image` found.

    Attributes:
        contents: memory of each block by idstr: stored pages, zero elsewhere.
        trailer_offset: where the EOS word of the START section stands.
        tail: every byte after the START section's footer.
    """

    machine: str
    capabilities: tuple[str, ...]
    target_page_bits: int | None
    uuid: bytes | None
    section_id: int
    blocks: tuple[ReadBlock, ...]
    contents: dict[str, bytes]
    trailer_offset: int
    tail: bytes
    sections: tuple[ReadSection, ...]
    description: bytes


class _Cursor:
    """A position in the file; refuses to read past its end."""

    def __init__(self, file: BinaryIO, position: int) -> None:
        self.file = file
        self.position = position
        self.size = file.seek(0, 2)

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or self.position + count > self.size:
            raise ValueError(
                f"{what}: file ends at {self.size:#x}, needed {self.position + count:#x}"
            )
        self.file.seek(self.position)
        data = self.file.read(count)
        self.position += count
        return data

    def u8(self, what: str) -> int:
        return self.take(1, what)[0]

    def be32(self, what: str) -> int:
        return int(struct.unpack(">I", self.take(4, what))[0])

    def be64(self, what: str) -> int:
        return int(struct.unpack(">Q", self.take(8, what))[0])

    def lstr(self, what: str) -> str:
        return self.text(self.u8(what), what)

    def text(self, length: int, what: str) -> str:
        text = self.take(length, what).decode("ascii")
        # All of QEMU's names are; a terminal should not be told otherwise by a file.
        expect(text.isprintable(), True, f"{what} is printable")
        return text


def expect(found: object, expected: object, what: str) -> None:
    """Refuse what is not the one value allowed."""
    if found != expected:
        raise ValueError(f"{what}: expected {expected!r}, found {found!r}")


def read_image(
    path: Path, *, base: int = 0, placement: Literal["qemu", "any"] = "qemu"
) -> ReadImage:
    """Read and check a whole file whose stream begins at ``base``.

    Raises:
        ValueError: at the first deviation.
    """
    with path.open("rb") as file:
        cursor = _Cursor(file, base)
        expect(cursor.be32("magic"), 0x5145564D, "magic")
        expect(cursor.be32("version"), 3, "version")
        expect(cursor.u8("configuration"), 7, "configuration")
        machine, capabilities, page_bits, uuid = _configuration(cursor)
        expect(capabilities, ("mapped-ram",), "capabilities")
        # Commands have no place before START in a file: there is nobody to answer them.
        expect(cursor.u8("START"), 1, "START")
        section_id = cursor.be32("section id")
        expect(cursor.lstr("idstr"), "ram", "idstr")
        expect(cursor.be32("instance"), 0, "instance")
        expect(cursor.be32("version"), 4, "version")
        word = cursor.be64("total")
        expect(word & (PAGE - 1), 4, "flags of the total word")
        blocks = _blocks(cursor, word & ~(PAGE - 1), placement)
        trailer_offset = cursor.position
        expect(cursor.be64("EOS"), 0x10, "EOS")
        _footer(cursor, section_id)
        tail = cursor.take(cursor.size - cursor.position, "tail")
        _no_overlap(blocks, base, trailer_offset, cursor.size)
        contents = {block.idstr: _content(cursor, block) for block in blocks}
    description, sections = _tail(tail, section_id)
    return ReadImage(
        machine, capabilities, page_bits, uuid, section_id, blocks, contents,
        trailer_offset, tail, sections, description,
    )  # fmt: skip


def _configuration(cursor: _Cursor) -> tuple[str, tuple[str, ...], int | None, bytes | None]:
    machine = cursor.text(cursor.be32("machine"), "machine")
    capabilities: tuple[str, ...] = ()
    page_bits = None
    uuid = None
    order = ["configuration/target-page-bits", "configuration/capabilities", "configuration/uuid"]
    while cursor.u8("item") == 5:
        name = cursor.lstr("subsection")
        if name not in order:
            raise ValueError(f"subsection {name!r} is unknown, twice there or out of order")
        order = order[order.index(name) + 1 :]
        expect(cursor.be32("subsection version"), 1, name)
        if name == "configuration/target-page-bits":
            page_bits = cursor.be32(name)
            expect(page_bits, 12, name)
        elif name == "configuration/capabilities":
            count = cursor.be32(name)
            expect(count in (1, 2), True, "number of capabilities")
            capabilities = tuple(cursor.lstr(name) for _ in range(count))
        else:
            uuid = cursor.take(16, name)
    cursor.position -= 1
    return machine, capabilities, page_bits, uuid


def _blocks(cursor: _Cursor, total: int, placement: str) -> tuple[ReadBlock, ...]:
    blocks: list[ReadBlock] = []
    while total > 0:
        idstr = cursor.lstr("block idstr")
        expect(idstr != "", True, "block idstr is not empty")
        expect(idstr in [block.idstr for block in blocks], False, f"{idstr} is there twice")
        used_length = cursor.be64(f"{idstr} used_length")
        expect(used_length > 0 and used_length % PAGE == 0, True, f"{idstr} length {used_length}")
        header_offset = cursor.position
        expect(cursor.be32(f"{idstr} header version"), 1, f"{idstr} header version")
        expect(cursor.be64(f"{idstr} page_size"), PAGE, f"{idstr} page_size")
        bitmap_offset = cursor.be64(f"{idstr} bitmap_offset")
        pages_offset = cursor.be64(f"{idstr} pages_offset")
        page_count = used_length // PAGE
        bitmap_length = (page_count + 63) // 64 * 8
        if placement == "qemu":
            expect(bitmap_offset, cursor.position, f"{idstr} bitmap_offset")
            end = bitmap_offset + bitmap_length
            rounded = (end + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            expect(pages_offset, rounded, f"{idstr} pages_offset")
        expect(pages_offset % PAGE, 0, f"{idstr} pages_offset alignment")
        cursor.position = bitmap_offset
        bitmap = cursor.take(bitmap_length, f"{idstr} bitmap")
        bits = []
        for place, byte in enumerate(bitmap):
            if byte:
                bits += [place * 8 + bit for bit in range(8) if byte >> bit & 1]
        if bits and bits[-1] >= page_count:
            raise ValueError(f"{idstr}: bit {bits[-1]} set, the block has {page_count} pages")
        blocks.append(
            ReadBlock(idstr, used_length, header_offset, bitmap_offset, pages_offset, tuple(bits))
        )
        cursor.position = pages_offset + used_length
        total -= used_length
    expect(total, 0, "total word less all lengths")
    return tuple(blocks)


def _content(cursor: _Cursor, block: ReadBlock) -> bytes:
    memory = bytearray(block.used_length)
    for bit in block.bits:
        cursor.position = block.pages_offset + bit * PAGE
        memory[bit * PAGE : (bit + 1) * PAGE] = cursor.take(PAGE, f"{block.idstr} page {bit}")
    return bytes(memory)


def _no_overlap(blocks: tuple[ReadBlock, ...], base: int, trailer: int, size: int) -> None:
    areas = []
    record = base
    for block in blocks:
        areas.append((record, block.header_offset + 28, f"record of {block.idstr}"))
        length = (block.used_length // PAGE + 63) // 64 * 8
        areas.append((block.bitmap_offset, block.bitmap_offset + length, f"bitmap {block.idstr}"))
        record = block.pages_offset + block.used_length
        areas.append((block.pages_offset, record, f"pages of {block.idstr}"))
    areas.append((trailer, size, "trailer"))
    areas.sort()
    for (_, end, one), (start, _, other) in pairwise(areas):
        if start < end:
            raise ValueError(f"{one} and {other} overlap")


def _footer(cursor: _Cursor, section_id: int) -> None:
    expect(cursor.u8("footer"), 0x7E, "footer")
    expect(cursor.be32("footer id"), section_id, "footer id")


def body_bytes(entry: dict[str, Any]) -> int:
    """Bytes of a FULL section's body, from its entry in the vmdescription."""
    length = 0
    for one in entry.get("fields", []):
        length += one["size"] * one.get("array_len", 1)
    for subsection in entry.get("subsections", []):
        length += 1 + 1 + len(subsection["vmsd_name"]) + 4 + body_bytes(subsection)
    return length


def _tail(tail: bytes, ram_id: int) -> tuple[bytes, tuple[ReadSection, ...]]:
    """Find the vmdescription (by trying every place it may begin) and walk the sections with it."""
    failures = []
    for start in range(len(tail) - 5):
        if (
            tail[start] != 6
            or struct.unpack_from(">I", tail, start + 1)[0] != len(tail) - start - 5
        ):
            continue
        try:
            devices = json.loads(tail[start + 5 :])["devices"]
            return tail[start + 5 :], _sections(tail[:start], devices, ram_id)
        except (ValueError, KeyError, TypeError, struct.error, IndexError) as error:
            failures.append(f"at {start:#x}: {error}")
    raise ValueError(f"no vmdescription ends the file and fits its sections ({failures})")


def _sections(tail: bytes, devices: list[dict[str, Any]], ram_id: int) -> tuple[ReadSection, ...]:
    sections = []
    position = 0
    left = list(devices)
    while tail[position] != 0:
        start = position
        kind = tail[position]
        idstr, instance_id = "ram", 0
        if kind == 8:
            number, length = struct.unpack_from(">HH", tail, position + 1)
            expect((number, length), (11, 0), "command in the tail")
            sections.append(ReadSection(kind, "SWITCHOVER_START", 0, tail[start : start + 5]))
            position += 5
            continue
        (section_id,) = struct.unpack_from(">I", tail, position + 1)
        if kind in (2, 3):
            expect(section_id, ram_id, "id of an iterable section")
            expect(3 in [section.kind for section in sections], False, "END was there before")
            expect(struct.unpack_from(">Q", tail, position + 5)[0], 0x10, "EOS alone")
            position += 13
        else:
            expect(kind, 4, "section type")
            length = tail[position + 5]
            idstr = tail[position + 6 : position + 6 + length].decode("ascii")
            position += 6 + length
            instance_id, _ = struct.unpack_from(">II", tail, position)
            entry = left.pop(0)
            expect((entry["name"], entry["instance_id"]), (idstr, instance_id), "described device")
            position += 8 + body_bytes(entry)
        expect(tail[position], 0x7E, f"footer of {idstr}")
        expect(struct.unpack_from(">I", tail, position + 1)[0], section_id, f"footer of {idstr}")
        position += 5
        sections.append(ReadSection(kind, idstr, instance_id, tail[start:position]))
    expect(len(left), 0, "devices described and not there")
    expect(len(tail), position + 1, "end of the items")
    return tuple(sections)
