"""The oracle pair, imagewriter and imagereader, against each other and against bytes known good."""

from __future__ import annotations

import lzma
import random
import struct
from pathlib import Path
from typing import Any

import imagewriter
import pytest
from imagereader import ReadImage, read_image
from imagewriter import PAGE, Block, Device, build_image

GOLDEN = Path(__file__).parents[1] / "interop" / "golden"

# The worked example of the format's description: one 16 MiB block on pc-q35-10.0; its bytes up to
# the total word were compared with a file of QEMU 10.0.2.
EXAMPLE_HEAD = bytes.fromhex(
    "5145564d00000003070000000b70632d7133352d31302e30051a636f6e66696775726174696f6e2f6361706162"
    "696c69746965730000000100000001 0a6d61707065642d72616d01000000010372616d00000000000000040000"
    "00000100000406 70632e72616d000000000100000000000001000000000000100000000000 0000008b00000000"
    "001000008101".replace(" ", "")
)
EXAMPLE_PAGES = (0, 7, 8, 256, 257, 258, 4095)


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def small(**knobs: Any) -> imagewriter.Image:
    """Two blocks of 64 and 3 pages and one device, with a knob turned."""
    knobs.setdefault(
        "blocks",
        [
            Block(idstr="pc.ram", used_length=64 * PAGE, pages={0: page(1), 63: page(2)}),
            Block(idstr="/rom@etc/x", used_length=3 * PAGE, pages={2: page(3)}),
        ],
    )
    knobs.setdefault("tail", imagewriter.trailer(devices=[Device()]))
    return build_image(**knobs)


def test_writer_gives_the_worked_example() -> None:
    block = Block(
        idstr="pc.ram", used_length=16 << 20, pages={index: page(index) for index in EXAMPLE_PAGES}
    )
    image = build_image(blocks=[block]).to_bytes()
    assert image[: len(EXAMPLE_HEAD)] == EXAMPLE_HEAD
    assert (image[0xAB], image[0x28A]) == (0x07, 0x80)
    assert sum(image[0x8B:0x28B]) == 0x81 + 0x01 + 0x07 + 0x80
    assert not any(image[0x28B:0x100000])
    assert image[0x107000:0x108000] == page(7)
    assert image[0x10FF000:0x1100000] == page(4095)
    assert (
        image[0x1100000:0x1100036]
        == bytes.fromhex(
            "00000000000000107e00000001"
            "020000000100000000000000107e00000001"
            "030000000100000000000000107e00000001"
        )
        + image[0x1100031:0x1100036]
    )
    assert image[0x1100031] == 0
    assert image[0x1100032] == 6


def test_reader_returns_what_was_written(tmp_path: Path) -> None:
    image = small(base=0x3001, before=b"below", section_id=77,
                  tail=imagewriter.trailer(section_id=77, early=[Device(idstr="vm0")],
                                           devices=[Device(body=b"x")]))  # fmt: skip
    found = read_image(image.write(tmp_path / "image"), base=0x3001)
    memory = bytearray(64 * PAGE)
    memory[:PAGE], memory[63 * PAGE :] = page(1), page(2)
    assert found.machine == "pc-q35-10.0"
    assert found.section_id == 77
    assert found.contents == {"pc.ram": memory, "/rom@etc/x": bytes(2 * PAGE) + page(3)}
    assert [block.bits for block in found.blocks] == [(0, 63), (2,)]
    assert found.tail == image.to_bytes()[image.fields["tail"] :]
    assert found.trailer_offset == image.fields["trailer"]
    assert [(one.kind, one.idstr) for one in found.sections] == [
        (4, "vm0"), (2, "ram"), (3, "ram"), (4, "timer"),
    ]  # fmt: skip


def test_free_placement_only_when_asked_for(tmp_path: Path) -> None:
    """Legal for QEMU's loader, but not what QEMU writes."""
    blocks = [
        Block(idstr="a", used_length=4 * PAGE, pages={1: page(1)}, pages_offset=0x21000),
        Block(idstr="b", used_length=4 * PAGE, pages={2: page(2)}, pages_offset=0x11000),
        Block(idstr="c", used_length=PAGE, pages_offset=0x31000, bitmap_offset=0x800),
    ]
    path = small(blocks=blocks).write(tmp_path / "image")
    with pytest.raises(ValueError, match="a pages_offset"):
        read_image(path)
    found = read_image(path, placement="any")
    assert found.contents["b"] == bytes(2 * PAGE) + page(2) + bytes(PAGE)


def ram(**knobs: Any) -> list[Block]:
    return [Block(idstr="a", used_length=8 * PAGE, pages={0: page(0)}, **knobs)]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"magic": 0x5145564E}, "magic"),
        ({"version": 2}, "version"),
        ({"config": b""}, "configuration"),
        ({"config": imagewriter.configuration(capabilities=())}, "capabilities"),
        ({"config": imagewriter.configuration(capabilities=("x-ignore-shared", "mapped-ram"))},
         "capabilities"),
        ({"config": imagewriter.configuration(capability_count=2)}, "capabilities"),
        ({"config": imagewriter.configuration(machine_length=1 << 30)}, "machine"),
        ({"items": imagewriter.command(1)}, "START"),
        ({"idstr": "dirty-bitmap"}, "idstr"),
        ({"instance_id": 1}, "instance"),
        ({"version_id": 3}, "version"),
        ({"total": 64 * PAGE | 4}, "EOS"),
        ({"total": 68 * PAGE | 4}, "idstr is not empty"),
        ({"total": 67 * PAGE | 12}, "flags of the total"),
        ({"start_words": (0x200, 0x10)}, "EOS"),
        ({"footer_id": 2}, "footer id"),
        ({"start_footer": b""}, "footer"),
        ({"blocks": ram(version=0)}, "header version"),
        ({"blocks": ram(version=2)}, "header version"),
        ({"blocks": ram(page_size=8192)}, "page_size"),
        ({"blocks": ram(gpa=0)}, "header version"),
        ({"blocks": ram(pages_offset=0x100800)}, "pages_offset"),
        ({"blocks": ram(pages_offset=0x2000)}, "pages_offset"),
        ({"blocks": ram(bitmap=b"\x01\x01" + bytes(6))}, "bit 8 set"),
        ({"blocks": ram(next_offset=0x200000)}, "EOS"),
        ({"blocks": ram(idstr_length=0)}, "empty"),
        ({"blocks": ram() + ram()}, "twice"),
        ({"blocks": [Block(idstr="a", used_length=4096 + 2048)], "total": 0x2004}, "length"),
        ({"tail": imagewriter.trailer(end_of_items=b"")}, "no vmdescription"),
        ({"tail": imagewriter.trailer(text_length=3)}, "no vmdescription"),
        ({"tail": imagewriter.trailer(text=b"{")}, "no vmdescription"),
        ({"tail": imagewriter.trailer(commands=imagewriter.command(2, b"\0\0\0\1"))}, "command"),
        ({"tail": imagewriter.trailer(part=imagewriter.ram_section(2, section_id=3))}, "iterable"),
        ({"tail": imagewriter.trailer(end=imagewriter.ram_section(3, words=(0x200, 0x10)))},
         "EOS alone"),
        ({"tail": imagewriter.trailer(devices=[Device(footer_id=3)])}, "footer of timer"),
        ({"tail": imagewriter.trailer(devices=[Device(described_bytes=23)])}, "footer of timer"),
        ({"after": b"\0"}, "no vmdescription"),
    ],
)  # fmt: skip
def test_reader_refuses(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(small(**knobs).write(tmp_path / "image"))


def test_reader_refuses_overlaps(tmp_path: Path) -> None:
    """Two page areas at one place, as free placement would otherwise allow."""
    blocks = [
        Block(idstr="a", used_length=8 * PAGE, pages_offset=0x100000),
        Block(idstr="b", used_length=PAGE, pages_offset=0x102000),
    ]
    with pytest.raises(ValueError, match="overlap"):
        read_image(small(blocks=blocks).write(tmp_path / "image"), placement="any")


def test_reader_refuses_every_truncation(tmp_path: Path) -> None:
    """A file cut at any byte of its headers and its tail is not a file."""
    image = small()
    cuts = [*range(image.fields["/rom@etc/x.bitmap"] - image.fields["pc.ram.pages"] - 64 * PAGE)]
    cuts += [*range(image.fields["trailer"], image.size)]
    for cut in cuts:
        with pytest.raises(ValueError, match=r"file ends|no vmdescription"):
            read_image(image.write(tmp_path / "image", size=cut))


def rebuild(found: ReadImage, *, base: int) -> imagewriter.Image:
    """The same file again from the parts that the reader found."""
    return build_image(
        blocks=[
            Block(
                idstr=block.idstr,
                used_length=block.used_length,
                pages={
                    bit: found.contents[block.idstr][bit * PAGE : (bit + 1) * PAGE]
                    for bit in block.bits
                },
            )
            for block in found.blocks
        ],
        base=base,
        config=imagewriter.configuration(
            machine=found.machine, target_page_bits=found.target_page_bits, uuid=found.uuid
        ),
        section_id=found.section_id,
        tail=found.tail,
    )


@pytest.mark.parametrize(("name", "base"), [("q35", 0), ("pc-uuid-virtiomem", 0x3001)])
def test_golden_file_of_qemu(tmp_path: Path, name: str, base: int) -> None:
    """The reader accepts what QEMU wrote, and the writer gives the same bytes from its parts."""
    raw = lzma.decompress((GOLDEN / f"{name}.mig.xz").read_bytes())
    path = tmp_path / "golden"
    path.write_bytes(raw)
    found = read_image(path, base=base)
    main = found.contents["pc.ram"]
    for index in range(len(main) // PAGE):
        expected = struct.pack("<Q", index) * (PAGE // 8) if index % 3 == 1 else bytes(PAGE)
        assert main[index * PAGE : (index + 1) * PAGE] == expected
    assert rebuild(found, base=base).to_bytes() == raw
