"""Each way a mapped-ram file can be wrong, refused with block, offset, expected and found.

Many of these files QEMU loads without a word, into wrong memory. The table gives the place as a
field of the image that `imagewriter` wrote, so it is the writer that says where the fault lies.
"""

from __future__ import annotations

import json
import random
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagewriter
import pytest
from imagewriter import (
    PAGE,
    Block,
    Device,
    Image,
    build_image,
    command,
    configuration,
    lstr,
    ram_section,
)

from uringmig.errors import FormatError, StateError
from uringmig.options import ReadOptions
from uringmig.reader import MappedRamReader
from uringmig.verify import verify

OPTIONS = ReadOptions(channels=1, depth=2, engine="pwrite", direct="off")
EOS = 0x10
TEXT = "printable ASCII"
JSON = "JSON as QEMU writes it"


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def ram(**knobs: Any) -> Block:
    """64 pages at file offset 0x100000; the next record is at 0x140000."""
    given = {"idstr": "pc.ram", "used_length": 64 * PAGE, "pages": {0: page(0), 63: page(63)}}
    return Block(**{**given, **knobs})


def rom(**knobs: Any) -> Block:
    """Three pages at 0x200000, the trailer at 0x203000; 61 bits of its bitmap are idle."""
    given = {"idstr": "rom", "used_length": 3 * PAGE, "pages": {i: page(i) for i in range(3)}}
    return Block(**{**given, **knobs})


def image(**knobs: Any) -> Image:
    """A sound image of two blocks and one device, unless a knob is turned."""
    knobs.setdefault("blocks", [ram(), rom()])
    knobs.setdefault("tail", imagewriter.trailer(devices=[Device()]))
    return build_image(**knobs)


def tail(**knobs: Any) -> dict[str, Any]:
    """A trailer with one knob turned."""
    return {"tail": imagewriter.trailer(devices=[Device()], **knobs)}


def part(*words: int) -> dict[str, Any]:
    """A PART whose body is these words and EOS."""
    return tail(part=ram_section(2, words=[*words, EOS]))


def described(*devices: dict[str, Any]) -> dict[str, Any]:
    """A trailer whose vmdescription lists ``devices``, whatever the sections are."""
    return tail(text=json.dumps({"devices": devices}).encode())


def timer(**changes: Any) -> dict[str, Any]:
    """How the one device is described."""
    return {"name": "timer", "instance_id": 0, "fields": [{"size": 24}], **changes}


def nested(depth: int) -> dict[str, Any]:
    """The device with subsections within subsections."""
    entry = timer()
    inner = entry
    for _ in range(depth):
        inner["subsections"] = [{"vmsd_name": "x", "fields": []}]
        inner = inner["subsections"][0]
    return entry


@dataclass(frozen=True)
class Wrong:
    """One malformed file and its refusal.

    Attributes:
        knobs: for `image`.
        at: the field at fault, ``name`` or ``name+bytes``.
        expected, found: as text; None where the rule has no such value.
        block: idstr of the block concerned.
    """

    knobs: dict[str, Any]
    at: str
    expected: object
    found: object
    block: str | None = None


def config(**knobs: Any) -> dict[str, Any]:
    return {"config": configuration(**knobs)}


def in_ram(**knobs: Any) -> dict[str, Any]:
    return {"blocks": [ram(**knobs), rom()]}


def in_rom(**knobs: Any) -> dict[str, Any]:
    return {"blocks": [ram(), rom(**knobs)]}


def commands(number: int) -> Wrong:
    """Commands 3 to 10 belong to postcopy, COLO and nested streams."""
    return Wrong({"items": command(number)}, "items+1", "one of 1, 2, 11", number)


STREAM = {
    "magic": Wrong({"magic": 0x5145564E}, "magic", "QEVM", "'QEVN'"),
    "obsolete version": Wrong({"version": 2}, "version", 3, 2),
    "future version": Wrong({"version": 4}, "version", 3, 4),
    "no configuration": Wrong({"config": b""}, "start", 7, 1),
    "huge machine name": Wrong(
        config(machine_length=1 << 30), "configuration+1", "at most 255", 1 << 30
    ),
    "empty machine name": Wrong(
        config(machine=""), "configuration+1", "1 or more characters", 0
    ),
    "machine name of bytes": Wrong(
        config(machine=b"pc\xff"), "configuration+1", TEXT, r"b'pc\xff'"
    ),
    "unknown capability": Wrong(
        config(capabilities=("mapped-ram", "foo")), "configuration+63", "one QEMU has", "foo"
    ),
    "capability twice": Wrong(
        config(capabilities=("mapped-ram",) * 2), "configuration+63", None, "mapped-ram"
    ),
    "a billion capabilities": Wrong(
        config(capability_count=1 << 30), "configuration+48", "at most 64", 1 << 30
    ),
    "x-ignore-shared too": Wrong(
        {**config(capabilities=("x-ignore-shared", "mapped-ram")),
         "blocks": [ram(gpa=0), rom(gpa=0xC0000)]},
        "configuration+48", "one of the two", "both",
    ),
    "64 KiB pages": Wrong(config(target_page_bits=16), "configuration+52", 12, 16),
    "subsection version": Wrong(config(subsection_version=2), "configuration+44", 1, 2),
    "subsection twice": Wrong(
        {"config": configuration() + configuration()[16:]},
        "configuration+64", None, "configuration/capabilities",
    ),
    "PING and nobody to answer": Wrong({"items": command(2, b"\0\0\0\1")}, "items+1", 1, 2),
    **{f"command {number}": commands(number) for number in (0, *range(3, 11), 12)},
    "length of PING": Wrong({"items": command(1) + command(2, b"\0\0")}, "items+8", 4, 2),
    "command in the trailer": Wrong(
        tail(commands=command(10)), "tail+19", "one of 1, 2, 11", 10
    ),
    "unknown item": Wrong({"items": b"\x09"}, "items", "0x08 or 0x01", "0x09"),
    "EOF before ram": Wrong({"items": b"\x00"}, "items", "0x08 or 0x01", "0x00"),
    "PART before START": Wrong({"items": ram_section(2)}, "items", "0x08 or 0x01", "0x02"),
}  # fmt: skip

RAM = {
    "another iterable device": Wrong({"idstr": "dirty-bitmap"}, "start", "ram", "dirty-bitmap"),
    "ram instance": Wrong({"instance_id": 1}, "start.instance_id", 0, 1),
    "ram version 3": Wrong({"version_id": 3}, "start.version_id", 4, 3),
    "ram version 5": Wrong({"version_id": 5}, "start.version_id", 4, 5),
    "total flags": Wrong({"total": 67 * PAGE | 8}, "total", 4, 8),
    "total of nothing": Wrong({"total": 4}, "total", "above 0", 0),
    "total too large": Wrong({"total": 68 * PAGE | 4}, "total", 67 * PAGE, 68 * PAGE),
    "total below a block": Wrong(
        {"total": 32 * PAGE | 4}, "total", f"at least {64 * PAGE}", 32 * PAGE, "pc.ram"
    ),
    "total without the last block": Wrong(
        {"total": 64 * PAGE | 4}, "rom.idstr", "EOS", "0x3726f6d00000000"
    ),
    "total of 8 EiB": Wrong(
        {"total": 1 << 63 | 4}, "total", f"at most {1 << 52}", 1 << 63
    ),
    "length 0": Wrong(
        in_ram(used_length=0, pages={}), "pc.ram.used_length", "a multiple of 4096 above 0", 0,
        "pc.ram",
    ),
    "length of part of a page": Wrong(
        {**in_ram(used_length=256, pages={}), "total": 0x8004},
        "pc.ram.used_length", "a multiple of 4096 above 0", 256, "pc.ram",
    ),
    "no name": Wrong(
        in_ram(idstr="", idstr_length=0), ".idstr", "1 or more characters", 0
    ),
    "name of bytes": Wrong(in_rom(idstr=b"r\0m"), "r\0m.idstr", TEXT, r"b'r\x00m'"),
    "block twice": Wrong(in_rom(idstr="pc.ram"), "pc.ram.idstr", "one entry", "two", "pc.ram"),
    "block rounded up to 1 MiB": Wrong(
        in_ram(next_offset=0x200000), "pc.ram.pages+262144", "1 or more characters", 0
    ),
    "header version 0": Wrong(in_ram(version=0), "pc.ram.version", 1, 0, "pc.ram"),
    "header version 2": Wrong(in_rom(version=2), "rom.version", 1, 2, "rom"),
    **{
        f"page size {size}": Wrong(in_rom(page_size=size), "rom.page_size", PAGE, size, "rom")
        for size in (0, 2048, 8192, 65536, 1 << 63)
    },
    "pages of half a page on": Wrong(
        in_ram(pages_offset=0x100800), "pc.ram.pages_offset", "a multiple of 4096", 0x100800,
        "pc.ram",
    ),
    "pages at a negative offset": Wrong(
        in_rom(pages_offset=(1 << 64) - PAGE, next_offset=0x200000, pages={}),
        "rom.pages_offset", f"at most {(1 << 63) - 1}", (1 << 64) - PAGE, "rom",
    ),
    "pages beyond any file": Wrong(
        in_rom(pages_offset=(1 << 63) - PAGE, next_offset=0x200000, pages={}),
        "rom.pages_offset", "at most 2097442", (1 << 63) + 2 * PAGE, "rom",
    ),
    "pages past the end": Wrong(
        in_rom(pages_offset=0x40000000, next_offset=0x200000, pages={}),
        "rom.pages_offset", "at most 2097442", 0x40003000, "rom",
    ),
    "bitmap past the end": Wrong(
        in_rom(bitmap_offset=0x40000000, bitmap=b""), "rom.bitmap_offset",
        f"at most {0x40000000}", 0x40000008, "rom",
    ),
    "bitmap among pages": Wrong(
        in_rom(bitmap_offset=0x101000), "rom.bitmap_offset",
        "nothing of 0x100000..0x140000", "0x101000..0x101008", "rom",
    ),
    "bitmap on the header": Wrong(
        in_ram(bitmap_offset=0x20, bitmap=b""), "pc.ram.bitmap_offset",
        "nothing of 0x0..0x8b", "0x20..0x28", "pc.ram",
    ),
    "page areas overlap": Wrong(
        in_rom(pages_offset=0x110000, next_offset=0x150000), "rom.pages_offset",
        "nothing of 0x100000..0x140000", "0x110000..0x113000", "rom",
    ),
    "one page area for both": Wrong(
        in_rom(pages_offset=0x100000, next_offset=0x150000), "rom.pages_offset",
        "nothing of 0x100000..0x140000", "0x100000..0x103000", "rom",
    ),
    "pages on the header": Wrong(
        in_ram(pages_offset=0, next_offset=0x40000, pages={}), "pc.ram.pages_offset",
        "nothing of 0x0..0x8b", "0x0..0x40000", "pc.ram",
    ),
    "moved without its offsets": Wrong(
        {**in_ram(bitmap_offset=0x8B, bitmap=b"", pages_offset=0x100000), "base": 0x3001},
        "pc.ram.bitmap_offset", "nothing of 0x0..0x3001", "0x8b..0x93", "pc.ram",
    ),
}  # fmt: skip

BITS = {
    "bit past the end": Wrong(
        in_rom(bitmap=b"\x0f" + bytes(7)), "rom.bitmap", "pages 0 to 2", "page 3", "rom"
    ),
    "last bit of the last word": Wrong(
        in_rom(bitmap=b"\x07" + bytes(6) + b"\x80"), "rom.bitmap+7", "pages 0 to 2", "page 63",
        "rom",
    ),
    "big-endian words": Wrong(
        in_rom(bitmap=bytes(7) + b"\x07"), "rom.bitmap+7", "pages 0 to 2", "page 56", "rom"
    ),
    "every bitmap empty": Wrong(
        {"blocks": [ram(bits=[]), rom(bits=[])]}, "pc.ram.bitmap", "a set bit", "none", "pc.ram"
    ),
    **{
        f"word {word:#x} in START": Wrong(
            {"start_words": (word, EOS)}, "trailer", "EOS", f"{word:#x}"
        )
        for word in (0x200, 0x08, 0x1002, 0x40, 0x80, 0x100, 0x11, 0)
    },
    **{
        f"word {word:#x} in PART": Wrong(part(word), "tail+5", "EOS", f"{word:#x}")
        for word in (0x200, 0x08, 0x02, 0x28)
    },
    "flush in END": Wrong(
        tail(end=ram_section(3, words=(0x200, EOS))), "tail+23", "EOS", "0x200"
    ),
}  # fmt: skip

TRAILER = {
    "footer of START": Wrong({"footer_id": 2}, "footer+1", 1, 2),
    "no footer": Wrong({"start_footer": b""}, "tail", 0x7E, 2),
    "footer of PART": Wrong(tail(part=ram_section(2, footer_id=9)), "tail+14", 1, 9),
    "id of PART": Wrong(tail(part=ram_section(2, section_id=9)), "tail+1", 1, 9),
    "footer of a device": Wrong(
        {"tail": imagewriter.trailer(devices=[Device(footer_id=9)])}, "tail+80", 2, 9
    ),
    "second START of ram": Wrong(
        tail(part=b"\x01\0\0\0\x05" + lstr("ram") + struct.pack(">IIQ", 0, 4, PAGE | 4)),
        "tail", "one iterable section, ram", "ram",
    ),
    "iterable device": Wrong(
        tail(part=b"\x01\0\0\0\x05" + lstr("vfio") + struct.pack(">II", 0, 1)),
        "tail", "one iterable section, ram", "vfio",
    ),
    "unknown item": Wrong(
        tail(part=b"\x55"), "tail", "0x08 or 0x01 or 0x02 or 0x03 or 0x04 or 0x00", "0x55"
    ),
    "no final EOF": Wrong(
        tail(end_of_items=b""), "tail+84", "0x08 or 0x01 or 0x02 or 0x03 or 0x04 or 0x00", "0x06"
    ),
    "description too short": Wrong(tail(text_length=3), "end", "one that ends here", None),
    "description cut": Wrong(tail(text_length=4000), "end", "one that ends here", None),
    "a byte after the end": Wrong({"after": b"\0"}, "end+1", "one that ends here", None),
    "half a JSON": Wrong(tail(text=b"{"), "tail+90", JSON, "Input data was truncated"),
    "no devices": Wrong(
        tail(text=b"{}"), "tail+90", JSON, "Object missing required field `devices`"
    ),
    "a list": Wrong(tail(text=b"[]"), "tail+90", JSON, "Expected `object`, got `array`"),
    "deep objects": Wrong(
        tail(text=b'{"devices":[],"x":' + b'{"a":' * 50000 + b"1" + b"}" * 50001),
        "tail+90", None, None,
    ),
    "deep subsections": Wrong(described(nested(40)), "tail+90", "at most 16", 17),
    "a device not described": Wrong(described(), "tail+36", "EOF", "'timer' instance 0"),
    "a device too many": Wrong(described(timer(), timer()), "tail+85", 1, 2),
    "another device": Wrong(
        described(timer(name="x")), "tail+36", "'x' instance 0", "'timer' instance 0"
    ),
    "another instance": Wrong(
        described(timer(instance_id=7)), "tail+36", "'timer' instance 7", "'timer' instance 0"
    ),
    "negative size": Wrong(
        described(timer(fields=[{"size": -24}])), "tail+90", JSON,
        "Expected `int` >= 0 - at `$.devices[0].fields[0].size`",
    ),
    "size out of proportion": Wrong(
        described(timer(fields=[{"size": 1 << 20, "array_len": 1 << 20}])), "tail+90",
        f"at most {256 << 20}", 1 << 40,
    ),
    "body shorter": Wrong(described(timer(fields=[{"size": 23}])), "tail+78", 0x7E, 0x11),
    "body longer": Wrong(described(timer(fields=[{"size": 25}])), "tail+80", 0x7E, 0),
}  # fmt: skip

CASES = {
    f"{group}: {name}": case
    for group, cases in (("stream", STREAM), ("ram", RAM), ("bits", BITS), ("trailer", TRAILER))
    for name, case in cases.items()
}


def place(built: Image, name: str) -> int:
    """The offset that a case names."""
    field, _, more = name.partition("+")
    return built.fields[field] + int(more or 0)


def text(value: object) -> str | None:
    return None if value is None else str(value)


@pytest.mark.parametrize("name", CASES)
def test_refused_by_block_offset_expected_and_found(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    built = image(**case.knobs)
    path = built.write(tmp_path / "image")
    base = case.knobs.get("base", 0)
    with pytest.raises(FormatError) as caught:
        MappedRamReader(path, offset=base, options=OPTIONS)
    error = caught.value
    assert (error.block, error.offset, text(error.expected), text(error.found)) == (
        case.block,
        place(built, case.at),
        text(case.expected),
        text(case.found),
    )
    assert error.exit_code == 3
    with pytest.raises(FormatError, match=re.escape(str(error))):
        verify(path, offset=base, options=OPTIONS)


def test_sound_image_is_read(tmp_path: Path) -> None:
    """Without this every refusal above might have another cause."""
    with MappedRamReader(image().write(tmp_path / "image"), options=OPTIONS) as reader:
        memory = bytearray(b"\xa5" * 64 * PAGE)
        reader.read_into("pc.ram", memory)
        assert memory == page(0) + bytes(62 * PAGE) + page(63)
        memory = bytearray(3 * PAGE)
        reader.read_into("rom", memory)
        assert memory == page(0) + page(1) + page(2)


LEGAL: dict[str, dict[str, Any]] = {
    "no PART and no END": tail(part=b"", end=b""),
    "SWITCHOVER_START": tail(commands=command(11)),
    "return path and PING": {"items": command(1) + command(2, b"\0\0\0\1")},
    "section id 77": {
        "section_id": 77,
        "tail": imagewriter.trailer(section_id=77, devices=[Device()]),
    },
    "early device": {"tail": imagewriter.trailer(early=[Device(idstr="vm0")])},
    "pages on 4 KiB": in_ram(pages_offset=0x1000),
    "pages before those of the block before": {
        "blocks": [ram(pages_offset=0x21000), rom(pages_offset=0x4000),
                   rom(idstr="last", pages_offset=0x100000)]
    },
    "a gap": in_rom(pages_offset=0x40000000),
    "uuid and page bits": config(uuid=bytes(range(16)), target_page_bits=12),
    "another known capability": config(capabilities=("multifd", "mapped-ram")),
    "subsections of a device": described(
        timer(
            fields=[{"size": 2, "array_len": 5}],
            subsections=[{"vmsd_name": "xy", "fields": [{"size": 6}]}],
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_legal_and_unusual_is_read(tmp_path: Path, name: str) -> None:
    """QEMU loads these too; refusing them would be our mistake."""
    with MappedRamReader(image(**LEGAL[name]).write(tmp_path / "image"), options=OPTIONS) as reader:
        memory = bytearray(64 * PAGE)
        reader.read_into("pc.ram", memory)
        assert memory == page(0) + bytes(62 * PAGE) + page(63)
        memory = bytearray(3 * PAGE)
        reader.read_into("rom", memory)
        assert memory == page(0) + page(1) + page(2)


def test_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """Each byte of headers, bitmaps and trailer, and each page: cut there it is no image."""
    built = image()
    cuts = [*range(0x98), *range(0x140000, 0x140030), *range(0x203000, built.size)]
    cuts += [*range(0x100000, 0x203000, PAGE)]
    for cut in cuts:
        path = built.write(tmp_path / "image", size=cut)
        with pytest.raises(FormatError) as caught:
            MappedRamReader(path, options=OPTIONS)
        assert caught.value.offset is not None


def test_offset_forgotten_or_misplaced(tmp_path: Path) -> None:
    """A base on one side only: what is there is no stream."""
    path = image(base=0x3001, before=b"something else").write(tmp_path / "image")
    for offset in (0, 0x3000, 0x3002, 1 << 62):
        with pytest.raises(FormatError) as caught:
            MappedRamReader(path, offset=offset, options=OPTIONS)
        assert caught.value.offset == offset
    with MappedRamReader(path, offset=0x3001, options=OPTIONS) as reader:
        assert reader.blocks[0].idstr == "pc.ram"


def test_memory_of_another_size_is_the_callers_fault(tmp_path: Path) -> None:
    """QEMU loads 64 MiB into 32 or 128 without a word."""
    with MappedRamReader(image().write(tmp_path / "image"), options=OPTIONS) as reader:
        for length in (63 * PAGE, 65 * PAGE, 128 * PAGE):
            with pytest.raises(StateError, match=f"{length} bytes"):
                reader.read_into("pc.ram", bytearray(length))
        with pytest.raises(StateError, match="no ramblock 'm0'"):
            reader.read_into("m0", bytearray(PAGE))
