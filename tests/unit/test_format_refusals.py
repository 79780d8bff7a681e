"""What the main stream's reader refuses, and where it says the fault is.

Many of these QEMU takes without a word: see the notes of each group. A case gives the bytes, the
offset of the fault, the ramblock, and the expected and found values of the message.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import imagewriter
import pytest
from imagewriter import PAGE, Block, Device
from mainstreams import (
    CONTINUE,
    EOS,
    FLUSH,
    PAGE_FLAG,
    ZERO_FLAG,
    PlainBlock,
    page_record,
    plain_start,
    plain_tail,
    ram_section,
    refusal,
    small_image,
    word,
    zero_record,
)

from uringmig.errors import FormatError
from uringmig.format import constants
from uringmig.format.constants import BLOCKS_MAX, RAM_BYTES_MAX, VMDESCRIPTION_BYTES_MAX
from uringmig.format.mainstream import MainStreamReader
from uringmig.format.vmdescription import VmDescription

RAM = "pc.ram"
ROM = "/rom@x"
TIMER = Device()
DATA = b"\x5a" * PAGE


class Fault(NamedTuple):
    """A bad stream and what is to be said of it; ``where`` may name a field of the image."""

    name: str
    image: imagewriter.Image
    where: int | str
    expected: object
    found: object
    block: str | None = None


def blocks(ram: dict[str, Any] | None = None, rom: dict[str, Any] | None = None) -> list[Block]:
    """The two blocks of a small image, with fields replaced."""
    first: dict[str, Any] = {"idstr": RAM, "used_length": 2 * PAGE, "pages_offset": PAGE}
    second: dict[str, Any] = {"idstr": ROM, "used_length": PAGE, "pages_offset": 4 * PAGE}
    return [Block(**{**first, **(ram or {})}), Block(**{**second, **(rom or {})})]


def fault(
    name: str,
    where: int | str,
    expected: object,
    found: object,
    *,
    block: str | None = None,
    ram: dict[str, Any] | None = None,
    rom: dict[str, Any] | None = None,
    **knobs: Any,
) -> Fault:
    """A small image with one thing wrong."""
    image = imagewriter.build_image(**{"blocks": blocks(ram, rom), **knobs})
    return Fault(name, image, where, expected, found, block)


CONFIGURATION = imagewriter.configuration
FRAME = [
    fault("magic", 0, "QEVM", "'QEVN'", magic=0x5145564E),
    fault("version 2", 4, 3, 2, version=2),
    fault("version 4", 4, 3, 4, version=4),
    fault("no configuration", 8, 7, 1, config=b""),
    fault("no ram section", 0x47, "0x08 or 0x01", "0x00", config=CONFIGURATION() + b"\x00"),
    fault("unknown item", 0x47, "0x08 or 0x01", "0x09", items=b"\x09"),
    fault(
        "unknown capability",
        0x3C,
        "one QEMU has",
        "mapped-rom",
        config=CONFIGURATION(capabilities=["mapped-rom"]),
    ),
    fault(
        "x-ignore-shared with mapped-ram",
        0x38,
        "one of the two",
        "both",
        config=CONFIGURATION(capabilities=["x-ignore-shared", "mapped-ram"]),
    ),
    fault("page bits", 0x3C, 12, 14, config=CONFIGURATION(target_page_bits=14)),
    *(
        fault(
            f"command {number}",
            0x48,
            "one of 1, 2, 11",
            number,
            items=imagewriter.command(number, b"\x00" * 4),
        )
        for number in (0, *range(3, 11), 12, 65535)
    ),
    fault("ping alone", 0x48, 1, 2, items=imagewriter.command(2, b"\x00\x00\x00\x01")),
    fault("ping length", 0x4F, 4, 3, items=imagewriter.command(1) + imagewriter.command(2, b"abc")),
    fault("ram instance", "start.instance_id", 0, 1, instance_id=1),
    fault("ram version 3", "start.version_id", 4, 3, version_id=3),
    fault("ram version 5", "start.version_id", 4, 5, version_id=5),
    fault("another iterable device", "start", "ram", "dirty-bitmap", idstr="dirty-bitmap"),
    fault("footer of START", "footer", 0x7E, 2, start_footer=b""),
    fault("id in footer of START", 0x5009, 1, 2, footer_id=2),
]  # fmt: skip

TOTAL = 3 * PAGE
BLOCK_LIST = [
    fault("total flags", "total", 4, 5, total=TOTAL | 5),
    fault("total of nothing", "total", "above 0", 0, total=4),
    fault("total too large", "total", TOTAL, TOTAL + PAGE, total=TOTAL + PAGE | 4),
    fault("total inside a block", "total", f"at least {2 * PAGE}", PAGE, block=RAM, total=PAGE | 4),
    fault("total before a block", 0x3000, "EOS", "0x62f726f6d407800", total=2 * PAGE | 4),
    fault(
        "total beyond any machine",
        "total",
        f"at most {RAM_BYTES_MAX}",
        RAM_BYTES_MAX + PAGE,
        total=RAM_BYTES_MAX + PAGE | 4,
    ),
    fault("empty name", f"{RAM}.idstr", "1 or more characters", 0, ram={"idstr_length": 0}),
    fault("name not text", 0x60, "printable ASCII", b"\xc3\xa9", ram={"idstr": b"\xc3\xa9"}),
    fault("name with NUL", 0x60, "printable ASCII", b"a\x00", ram={"idstr": b"a\x00"}),
    fault("listed twice", 0x3000, "one entry", "two", block=RAM, rom={"idstr": RAM}),
    *(
        fault(
            f"used length {length}",
            f"{ROM}.used_length",
            "a multiple of 4096 above 0",
            length,
            block=ROM,
            rom={"used_length": length},
            total=TOTAL | 4,
        )
        for length in (0, 1, PAGE - 1, PAGE + 2048)
    ),
    fault(
        "used length beyond the total",
        "total",
        f"at least {2 * PAGE + (1 << 63)}",
        TOTAL,
        block=ROM,
        rom={"used_length": 1 << 63, "bitmap": b""},
        total=TOTAL | 4,
    ),
    fault("next block rounded up", 0x3000, "1 or more characters", 0, ram={"next_offset": 0x3800},
          rom={"pages_offset": 5 * PAGE}),
]  # fmt: skip

#: QEMU checks of a header only version <= 1 and the alignment of pages_offset; overlap is never
#: noticed, page_size 0 kills its loader, and any other page_size gives wrong memory.
HEADERS = [
    *(
        fault(f"version {n}", f"{ROM}.version", 1, n, block=ROM, rom={"version": n})
        for n in (0, 2, 0xFFFFFFFF)
    ),
    *(
        fault(f"page size {n}", f"{ROM}.page_size", 4096, n, block=ROM, rom={"page_size": n})
        for n in (0, 1, 2048, 8192, 65536, 1 << 63)
    ),
    *(
        fault(
            f"pages offset {n:#x}",
            f"{ROM}.pages_offset",
            "a multiple of 4096",
            n,
            block=ROM,
            rom={"pages_offset": n},
        )
        for n in (0x4001, 0x4800)
    ),
    fault(
        "pages beyond any file",
        f"{RAM}.pages_offset",
        f"at most {(1 << 63) - 1}",
        1 << 63,
        block=RAM,
        ram={"pages_offset": 1 << 63, "next_offset": 0x3000},
    ),
    fault(
        "bitmap beyond any file",
        f"{RAM}.bitmap_offset",
        f"at most {(1 << 63) - 1}",
        (1 << 64) - 8,
        block=RAM,
        ram={"bitmap_offset": (1 << 64) - 8, "bitmap": b""},
    ),
    fault(
        "pages over the stream before",
        f"{RAM}.pages_offset",
        "nothing of 0x0..0x8b",
        "0x0..0x2000",
        block=RAM,
        ram={"pages_offset": 0, "next_offset": 0x3000},
    ),
    fault(
        "pages over pages",
        f"{ROM}.pages_offset",
        "nothing of 0x1000..0x3000",
        "0x2000..0x3000",
        block=ROM,
        rom={"pages_offset": 2 * PAGE, "next_offset": 0x5000},
    ),
    fault(
        "bitmap over the stream",
        f"{ROM}.bitmap_offset",
        "nothing of 0x3000..0x302b",
        "0x302a..0x3032",
        block=ROM,
        rom={"bitmap_offset": 0x302A, "bitmap": b""},
    ),
    fault(
        "bitmap over bitmap",
        f"{ROM}.bitmap_offset",
        "nothing of 0x8b..0x93",
        "0x8f..0x97",
        block=ROM,
        rom={"bitmap_offset": 0x8F},
    ),
    fault(
        "bitmap over its own pages",
        f"{ROM}.pages_offset",
        "nothing of 0x4ff8..0x5000",
        "0x4000..0x5000",
        block=ROM,
        rom={"bitmap_offset": 0x4FF8},
    ),
    fault(
        "stream goes on inside pages",
        0x5000,
        "nothing of 0x5000..0x7000",
        "0x5000..0x5001",
        ram={"pages_offset": 0x5000},
        rom={"pages_offset": 0x4000},
    ),
    fault(
        "stream runs into a bitmap",
        0x5020,
        "more bytes",
        "none",
        rom={"bitmap_offset": 0x5020, "bitmap": b""},
    ),
]  # fmt: skip


def tail_fault(name: str, where: int, expected: object, found: object, **parts: Any) -> Fault:
    """A small image with one thing wrong after START, whose footer ends at 0x500d."""
    return fault(name, 0x500D + where, expected, found, tail=imagewriter.trailer(**parts))


def section(kind: int, **parts: Any) -> bytes:
    return imagewriter.ram_section(kind, **parts)


FORBIDDEN = {
    "HOOK": 0x80,
    "FLUSH": FLUSH,
    "PAGE": PAGE_FLAG,
    "XBZRLE": 0x40,
    "ZERO": ZERO_FLAG,
    "MEM_SIZE": 0x1000 | 4,
    "COMPRESS_PAGE": 0x100,
    "no flag": 0,
    "EOS with a value": EOS | 0x1000,
    "EOS with CONTINUE": EOS | CONTINUE,
    "unknown flag": 0x400,
}
ITEMS = "0x08 or 0x01 or 0x02 or 0x03 or 0x04 or 0x00"
TAIL = [
    tail_fault("PART of unknown id", 1, 1, 9, part=section(2, section_id=9)),
    tail_fault("END of unknown id", 19, 1, 9, end=section(3, section_id=9)),
    tail_fault("PART after END", 36, None, None, end=section(3) + section(2)),
    tail_fault("second END", 36, None, None, end=section(3) + section(3)),
    tail_fault("footer of PART", 13, 0x7E, 3, part=section(2)[:-5]),
    tail_fault("id in footer of END", 32, 1, 5, end=section(3, footer_id=5)),
    tail_fault(
        "second START",
        0,
        "one iterable section, ram",
        "ram",
        part=b"\x01" + struct.pack(">I", 1) + b"\x03ram" + struct.pack(">II", 0, 4),
    ),
    tail_fault(
        "another iterable device",
        0,
        "one iterable section, ram",
        "0000:00:02.0/vfio",
        part=b"\x01\x00\x00\x00\x02\x110000:00:02.0/vfio" + struct.pack(">II", 0, 1),
    ),
    *(
        tail_fault(
            f"{name} in a {kind_name}",
            at,
            "EOS",
            f"{value:#x}",
            **{key: section(kind, words=[value, EOS])},
        )
        for name, value in FORBIDDEN.items()
        for kind, kind_name, key, at in ((2, "PART", "part", 5), (3, "END", "end", 23))
    ),
    tail_fault("command 7", 19, "one of 1, 2, 11", 7, commands=imagewriter.command(7, bytes(4))),
    tail_fault("ping alone", 19, 1, 2, commands=imagewriter.command(2, bytes(4))),
    tail_fault("unknown item", 18, ITEMS, "0x7e", commands=b"\x7e"),
    tail_fault("no final EOF", 36, ITEMS, "0x06", end_of_items=b""),
    tail_fault("no final EOF after a device", 84, ITEMS, "0x06", end_of_items=b"", devices=[TIMER]),
    tail_fault("EOF twice", 37, 6, 0, end_of_items=b"\x00\x00"),
    tail_fault("id in footer of a device", 80, 2, 3, devices=[Device(footer_id=3)]),
    tail_fault("no footer where described", 65, 0x7E, 0x11, devices=[Device(described_bytes=10)]),
    tail_fault(
        "device with ram's id",
        37,
        "neither 1 nor 'ram'",
        1,
        devices=[Device(section_id=1)],
    ),
    tail_fault("device named ram", 37, "neither 1 nor 'ram'", 2, devices=[Device(idstr="ram")]),
    tail_fault("device without a name", 41, "1 or more characters", 0, devices=[Device(idstr="")]),
    tail_fault(
        "device that is not described",
        36,
        "EOF",
        "'timer' instance 0",
        devices=[TIMER],
        text=imagewriter.description_json([]),
    ),
    tail_fault(
        "device described by another name",
        36,
        "'cpu' instance 0",
        "'timer' instance 0",
        devices=[TIMER],
        text=imagewriter.description_json([Device(idstr="cpu")]),
    ),
    tail_fault(
        "device described by another instance",
        36,
        "'timer' instance 1",
        "'timer' instance 0",
        devices=[TIMER],
        text=imagewriter.description_json([Device(instance_id=1)]),
    ),
    tail_fault(
        "description of a device that is not there",
        37,
        0,
        1,
        text=imagewriter.description_json([TIMER]),
    ),
    tail_fault(
        "description of a second device that is not there",
        85,
        1,
        2,
        devices=[TIMER],
        text=imagewriter.description_json([TIMER, TIMER]),
    ),
    tail_fault(
        "description longer than the limit",
        38,
        f"at most {VMDESCRIPTION_BYTES_MAX}",
        VMDESCRIPTION_BYTES_MAX + 1,
        text=b"{}",
        text_length=VMDESCRIPTION_BYTES_MAX + 1,
    ),
    tail_fault("description cut", 42, "9 bytes", "2 bytes", text=b"{}", text_length=9),
]  # fmt: skip

FAULTS = [*FRAME, *BLOCK_LIST, *HEADERS, *TAIL]


@pytest.mark.parametrize("case", FAULTS, ids=[case.name for case in FAULTS])
def test_bad_image_is_refused_with_its_place(case: Fault) -> None:
    # Pieces may lie beyond any file on purpose; the file ends with the stream and the page areas.
    reachable = [piece for piece in case.image.pieces if piece[0] < 1 << 30]
    size = max(offset + len(data) for offset, data in reachable)
    image = imagewriter.Image(tuple(reachable), size, case.image.fields).to_bytes()
    error = refusal(image, file_size=size)
    assert error is not None
    where = case.where if isinstance(case.where, int) else case.image.fields[case.where]
    assert (error.offset, error.block) == (where, case.block)
    assert (error.expected, error.found) == (case.expected, case.found)


@pytest.mark.parametrize(
    ("size", "where", "expected", "found"),
    [(0x2FFF, 0x83, "at most 12287", 0x3000), (0x92, 0x7B, "at most 146", 0x93)],
)
def test_areas_past_the_end_of_the_file(
    size: int, where: int, expected: object, found: object
) -> None:
    error = refusal(small_image().to_bytes()[:size], file_size=size)
    assert error is not None
    assert (error.offset, error.block) == (where, RAM)
    assert (error.expected, error.found) == (expected, found)


@pytest.mark.parametrize("devices", [[], [TIMER]])
def test_image_cut_anywhere_is_refused(devices: list[Device]) -> None:
    """Also in the middle of the vmdescription, where QEMU loads it without complaint."""
    image = small_image(devices=devices).to_bytes()
    for size in [*range(0x93), *range(0x2FF0, 0x3033), *range(0x4FF0, len(image))]:
        error = refusal(image[:size], file_size=size)
        assert error is not None
        assert error.offset is not None
        assert error.offset <= size


@pytest.mark.parametrize("devices", [[], [TIMER]])
def test_plain_stream_cut_anywhere_is_refused(devices: list[Device]) -> None:
    wire = plain_start([PlainBlock(idstr="a", used_length=PAGE)]) + plain_tail(devices=devices)
    assert refusal(wire, file_size=None) is None
    for size in range(len(wire)):
        assert refusal(wire[:size], file_size=None) is not None
        assert refusal(wire[:size], file_size=size) is not None


@pytest.mark.parametrize("devices", [[], [TIMER]])
@pytest.mark.parametrize("more", [b"\x00", b"x" * 5000])
def test_bytes_after_the_end_are_refused(devices: list[Device], more: bytes) -> None:
    image = small_image(devices=devices).to_bytes()
    error = refusal(image + more, file_size=len(image) + len(more))
    assert error is not None
    assert error.offset == (len(image + more) if devices else len(image))
    wire = plain_start([PlainBlock(idstr="a", used_length=PAGE)]) + plain_tail()
    error = refusal(wire + more, file_size=None)
    assert error is not None
    assert (error.offset, error.expected) == (len(wire), len(wire))


def test_bytes_after_the_end_fed_later_are_refused() -> None:
    reader = MainStreamReader()
    wire = plain_start([PlainBlock(idstr="a", used_length=PAGE)]) + plain_tail()
    reader.feed(wire)
    reader.end_of_input()
    with pytest.raises(FormatError) as error:
        reader.feed(b"\x00")
    assert error.value.offset == len(wire)


@pytest.mark.parametrize("text", [b"hello", b"[]", b'{"devices": 7}'])
@pytest.mark.parametrize("devices", [[], [TIMER]])
def test_description_that_is_not_of_qemus_shape(text: bytes, devices: list[Device]) -> None:
    tail = imagewriter.trailer(devices=devices, text=text)
    image = imagewriter.build_image(blocks=blocks(), tail=tail).to_bytes()
    error = refusal(image, file_size=len(image))
    assert error is not None
    assert (error.offset, error.expected) == (len(image) - len(text), "JSON as QEMU writes it")


@pytest.mark.parametrize("devices", [[], [TIMER]])
def test_description_missing(devices: list[Device]) -> None:
    tail = imagewriter.trailer(devices=devices)
    tail = tail[: tail.rindex(b"\x06")]
    image = imagewriter.build_image(blocks=blocks(), tail=tail).to_bytes()
    error = refusal(image, file_size=len(image))
    assert error is not None
    assert error.offset == len(image)


#: A plain stream of two blocks; the body of its PART section follows START.
PLAIN = [PlainBlock(idstr="a", used_length=2 * PAGE), PlainBlock(idstr="b", used_length=PAGE)]
BODIES: list[tuple[str, bytes, int, object, object, str | None]] = [
    ("page past its block", page_record(2 * PAGE, DATA, "a"), 0, "at most 4096", 8192, "a"),
    ("zero past its block", zero_record(1 << 40, "b"), 0, "at most 0", 1 << 40, "b"),
    ("page of an unknown block", page_record(0, DATA, "c"), 8, "a listed one", "c", None),
    (
        "page of a block without a name",
        page_record(0, DATA, ""),
        8,
        "1 or more characters",
        0,
        None,
    ),
    ("page that continues nothing", page_record(0, DATA), 0, "a name", None, None),
    ("zero page of ones", zero_record(0, "a", fill=1), 10, 0, 1, "a"),
    (
        "continued zero page of ones",
        zero_record(0, "a") + zero_record(PAGE, fill=0xFF),
        19,
        0,
        0xFF,
        "a",
    ),
    *(
        (name, word(value), 0, "EOS or MULTIFD_FLUSH or PAGE or ZERO", f"{value:#x}", None)
        for name, value in FORBIDDEN.items()
        if name not in ("FLUSH", "PAGE", "ZERO")
    ),
    (
        "page and zero at once",
        word(PAGE_FLAG | ZERO_FLAG),
        0,
        "EOS or MULTIFD_FLUSH or PAGE or ZERO",
        "0xa",
        None,
    ),
]


@pytest.mark.parametrize(
    ("body", "where", "expected", "found", "block"),
    [case[1:] for case in BODIES],
    ids=[case[0] for case in BODIES],
)
@pytest.mark.parametrize("kind", [2, 3])
def test_bad_record_of_a_plain_stream(
    kind: int, body: bytes, where: int, expected: object, found: object, block: str | None
) -> None:
    wire = plain_start(PLAIN) + plain_tail(ram=ram_section(kind, body + word(EOS)))
    error = refusal(wire, file_size=None)
    assert error is not None
    assert (error.offset, error.block) == (len(plain_start(PLAIN)) + 5 + where, block)
    assert (error.expected, error.found) == (expected, found)


@pytest.mark.parametrize("value", [PAGE_FLAG, ZERO_FLAG, 0x40, 4, FLUSH | CONTINUE])
def test_bad_word_in_the_start_of_a_plain_stream(value: int) -> None:
    wire = plain_start(PLAIN, words=word(value) + word(EOS))
    error = refusal(wire, file_size=None)
    assert error is not None
    assert error.offset == len(wire) - 21
    assert (error.expected, error.found) == ("EOS or MULTIFD_FLUSH", f"{value:#x}")


@pytest.mark.parametrize("words", [word(EOS), word(FLUSH) + word(EOS)])
def test_total_too_large_in_a_plain_stream(words: bytes) -> None:
    error = refusal(plain_start(PLAIN, total=4 * PAGE, words=words), file_size=None)
    assert error is not None
    assert (error.expected, error.found) == (3 * PAGE, 4 * PAGE)


def test_more_blocks_than_any_guest_has() -> None:
    many = [PlainBlock(idstr=f"b{index}", used_length=PAGE) for index in range(BLOCKS_MAX + 1)]
    error = refusal(plain_start(many), file_size=None)
    assert error is not None
    assert (error.expected, error.found) == (f"at most {BLOCKS_MAX}", BLOCKS_MAX + 1)
    assert refusal(plain_start(many[:-1]) + plain_tail(), file_size=None) is None


@pytest.mark.parametrize("file", [True, False])
def test_more_device_state_than_is_held(file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    image = small_image(devices=[TIMER]).to_bytes()
    wire = plain_start(PLAIN) + plain_tail(devices=[TIMER])
    stream = image if file else wire
    size = len(image) if file else None
    assert refusal(stream, file_size=size) is None
    monkeypatch.setattr(constants, "TAIL_BYTES_MAX", 100)
    error = refusal(stream, file_size=size)
    assert error is not None
    assert error.expected == "at most 100"
    assert error.offset == (0x500D if file else len(plain_start(PLAIN)))


def test_missing_footer_is_named_where_too_few_bytes_are_left_for_one() -> None:
    wire = plain_start(PLAIN)[:-5]
    error = refusal(wire + b"\x00", file_size=None)
    assert error is not None
    assert (error.offset, error.expected, error.found) == (len(wire), 0x7E, 0)


def test_more_items_than_any_save_has(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = ram_section(2, word(EOS)) * 3 + imagewriter.command(11)
    wire = plain_start(PLAIN) + plain_tail(ram=ram)
    monkeypatch.setattr(constants, "ITEMS_MAX", 4)
    assert refusal(wire, file_size=None) is None
    monkeypatch.setattr(constants, "ITEMS_MAX", 3)
    error = refusal(wire, file_size=None)
    assert error is not None
    assert (error.expected, error.found) == ("at most 3", 4)
    assert error.offset == len(plain_start(PLAIN)) + 3 * 18


def test_description_given_that_is_not_the_streams() -> None:
    reader = MainStreamReader()
    text = imagewriter.description_json([Device(idstr="cpu")])
    reader.set_description(VmDescription.parse(text))
    wire = plain_start(PLAIN) + plain_tail()
    with pytest.raises(FormatError) as error:
        reader.feed(wire)
    assert error.value.offset == wire.rindex(b"\x06")
