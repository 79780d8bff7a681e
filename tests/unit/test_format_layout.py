"""Placement in a mapped-ram file: QEMU's rules, by worked example and against the oracle."""

from __future__ import annotations

import imagewriter
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError, StateError
from uringmig.format.constants import BLOCKS_MAX
from uringmig.format.headers import Configuration
from uringmig.format.layout import Area, AreaMap, BlockLayout, bitmap_length, plan_layout
from uringmig.format.mainstream import compose_setup
from uringmig.units import GiB, KiB, MiB, TiB

Q35 = Configuration("pc-q35-10.0", ("mapped-ram",))

#: The head of a real 16 MiB guest's file, up to the total word; after it one block alone.
EXAMPLE_HEAD = bytes.fromhex("""
    5145564d00000003070000000b70632d7133352d31302e30051a636f6e666967
    75726174696f6e2f6361706162696c697469657300000001000000010a6d6170
    7065642d72616d01000000010372616d00000000000000040000000001000004
    0670632e72616d00000000010000000000000100000000000010000000000000
    00008b0000000000100000
""")
EXAMPLE_END = bytes.fromhex("00000000000000107e00000001")


def test_worked_example() -> None:
    layout = plan_layout(Q35, [("pc.ram", 16 * MiB)])
    block = BlockLayout("pc.ram", 16 * MiB, bitmap_offset=0x8B, pages_offset=0x100000)
    assert (layout.base, layout.blocks, layout.trailer_offset) == (0, (block,), 0x1100000)
    assert (block.page_count, block.bitmap_bytes, block.pages_end) == (4096, 512, 0x1100000)
    assert compose_setup(Q35, layout, section_id=1) == [(0, EXAMPLE_HEAD), (0x1100000, EXAMPLE_END)]


@pytest.mark.parametrize(
    ("used_length", "length"),
    [(4 * KiB, 8), (256 * KiB, 8), (260 * KiB, 16), (16 * MiB, 512), (TiB, 32 * MiB)],
)
def test_bitmap_is_whole_words(used_length: int, length: int) -> None:
    assert bitmap_length(used_length) == length


def test_real_guest_is_laid_out_as_by_qemu() -> None:
    """Blocks and offsets of a 64 MiB q35 guest that QEMU 10.0.2 saved at ``offset=0``."""
    blocks = [
        ("pc.ram", 67108864, 139, 1048576),
        ("/rom@etc/acpi/tables", 131072, 68157497, 69206016),
        ("pc.bios", 262144, 69337132, 70254592),
        ("pc.rom", 131072, 70516779, 71303168),
        ("/rom@etc/table-loader", 4096, 71434298, 72351744),
        ("/rom@etc/acpi/rsdp", 4096, 72355895, 73400320),
    ]
    layout = plan_layout(Q35, [(idstr, length) for idstr, length, _, _ in blocks])
    assert layout.blocks == tuple(BlockLayout(*block) for block in blocks)
    assert layout.trailer_offset == 73404416


BLOCKS = st.lists(
    st.tuples(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=255),
        st.integers(1, 300).map(lambda pages: pages * 4096),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda block: block[0],
)


@given(BLOCKS, st.integers(0, 5 * MiB), st.integers(0, 2**32 - 1))
def test_setup_equals_the_oracle(blocks: list[tuple[str, int]], base: int, section_id: int) -> None:
    layout = plan_layout(Q35, blocks, section_id=section_id, base=base)
    image = imagewriter.build_image(
        blocks=[imagewriter.Block(idstr=idstr, used_length=length) for idstr, length in blocks],
        base=base,
        section_id=section_id,
    )
    stream = {
        offset + index: byte
        for offset, piece in image.pieces
        for index, byte in enumerate(piece)
        if not any(area <= offset < area + size for area, size in bitmaps_and_tail(image, blocks))
    }
    ours = {
        offset + index: byte
        for offset, piece in compose_setup(Q35, layout, section_id=section_id)
        for index, byte in enumerate(piece)
    }
    assert ours == stream
    assert layout.trailer_offset == image.fields["trailer"]
    for block in layout.blocks:
        assert block.bitmap_offset == image.fields[f"{block.idstr}.bitmap"]
        assert block.pages_offset == image.fields[f"{block.idstr}.pages"]


def bitmaps_and_tail(
    image: imagewriter.Image, blocks: list[tuple[str, int]]
) -> list[tuple[int, int]]:
    """What of an image `compose_setup` does not write."""
    bitmaps = [
        (image.fields[f"{idstr}.bitmap"], imagewriter.bitmap_bytes(length))
        for idstr, length in blocks
    ]
    return [*bitmaps, (image.fields["tail"], image.size)]


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [("a", 4096), ("a", 4096)],
        [("", 4096)],
        [("a\n", 4096)],
        [("a" * 256, 4096)],
        [("a", 0)],
        [("a", -4096)],
        [("a", 4095)],
        [("a", 1 << 53)],
        [(f"b{index}", 4096) for index in range(BLOCKS_MAX + 1)],
    ],
)
def test_block_list_nobody_could_read_is_not_planned(blocks: list[tuple[str, int]]) -> None:
    with pytest.raises(StateError):
        plan_layout(Q35, blocks)


@pytest.mark.parametrize(
    "capabilities", [(), ("x-ignore-shared",), ("x-ignore-shared", "mapped-ram")]
)
def test_configuration_of_another_stream_is_not_planned(capabilities: tuple[str, ...]) -> None:
    configuration = Configuration("none", capabilities)
    layout = plan_layout(Q35, [("a", 4096)])
    with pytest.raises(StateError):
        plan_layout(configuration, [("a", 4096)])
    with pytest.raises(StateError):
        compose_setup(configuration, layout, section_id=1)


def test_base_below_the_file_is_not_planned() -> None:
    with pytest.raises(StateError):
        plan_layout(Q35, [("a", 4096)], base=-1)


RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=12)


@given(RANGES, st.integers(0, 50))
def test_area_map_equals_the_slow_obvious_one(ranges: list[tuple[int, int]], probe: int) -> None:
    areas, taken = AreaMap(), set[int]()
    for start, length in ranges:
        units = set(range(start, start + length))
        if units & taken:
            with pytest.raises(FormatError):
                areas.add(Area(start, start + length, "page area", "x"), at=7)
        else:
            areas.add(Area(start, start + length, "page area", "x"), at=7)
            taken |= units
    assert areas.end == max(taken, default=-1) + 1
    if probe in taken:
        with pytest.raises(FormatError):
            areas.limit_from(probe, at=0)
    else:
        assert areas.limit_from(probe, at=0) == min((n for n in taken if n > probe), default=None)


def test_overlap_names_both_owners() -> None:
    areas = AreaMap()
    areas.add(Area(8192, 12288, "page area", "a"), at=0)
    with pytest.raises(FormatError) as refusal:
        areas.add(Area(12000, 2 * GiB, "bitmap", "b"), at=77)
    error = refusal.value
    assert (error.offset, error.block) == (77, "b")
    assert error.what == "bitmap overlaps the page area of ramblock 'a'"
    assert error.expected == "nothing of 0x2000..0x3000"
    assert error.found == f"0x2ee0..{2 * GiB:#x}"
