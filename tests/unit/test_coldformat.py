"""The cold image's header and index: there and back, and every rule broken once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.archive.coldformat import (
    BITS_BYTES,
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    MAGIC,
    ColdHeader,
    ColdIndex,
    FrameTable,
    read_header,
    read_index,
)
from uringmig.errors import FormatError
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.image.digest import bytes_digest
from uringmig.options import WINDOW_BYTES
from uringmig.units import MiB

PAGE = 4096
CONFIGURATION = Configuration("pc-q35-10.0", ("mapped-ram",), uuid=bytes(range(16)))
BLOCKS = (("pc.ram", 9 * MiB), ("vga.vram", MiB), ("0000:00:02.0/vga.rom", 64 << 10))


def table(count: int = 4) -> FrameTable:
    """Frames of RAM's three windows and of video memory, in another order than they lie."""
    source = np.random.default_rng(1)
    bits = np.zeros((4, BITS_BYTES), np.uint8)
    bits[:, 0] = (1, 3, 0x80, 0xFF)
    whole = FrameTable(
        block_index=np.array([0, 0, 0, 1]),
        row=np.array([0, 1, 2, 0]),
        offset=np.array([3, 1, 9, 2]) * PAGE,
        length=np.array([5000, 100, 4096, 4096]),
        frame_digest=source.integers(0, 256, (4, 16), np.uint8),
        memory_digest=source.integers(0, 256, (4, 16), np.uint8),
        bits=bits,
    )
    return FrameTable(*(getattr(whole, name)[:count] for name in FrameTable.__slots__))


def index(**change: Any) -> ColdIndex:
    made = ColdIndex(CONFIGURATION, 2, DeviceState.empty(2).tail, BLOCKS, table())
    changed: ColdIndex = replace(made, **change)
    return changed


def written(made: ColdIndex, at: int = 16 * PAGE) -> tuple[ColdHeader, bytes]:
    data = made.pack()
    return ColdHeader(3, at, len(data), bytes_digest(data)), data


def read(made: ColdIndex, at: int = 16 * PAGE) -> ColdIndex:
    header, data = written(made, at)
    assert read_header(header.pack(), file_size=at + len(data)) == header
    return read_index(data, header)


def assert_same(one: ColdIndex, other: ColdIndex) -> None:
    assert replace(one, frames=other.frames) == other
    for name in FrameTable.__slots__:
        assert np.array_equal(getattr(one.frames, name), getattr(other.frames, name)), name


@pytest.mark.parametrize("count", [0, 1, 4])
def test_index_comes_back(count: int) -> None:
    made = index(frames=table(count))
    assert_same(read(made), made)


def test_header_is_one_page() -> None:
    page = ColdHeader(-5, 4096, 7, b"d" * 16).pack()
    assert len(page) == HEADER_BYTES == PAGE
    assert page.startswith(MAGIC)
    assert read_header(page, file_size=4103).level == -5


BROKEN_FRAMES = {
    "of a ramblock that is not there": {"block_index": [0, 0, 0, 3]},
    "past the ramblock's end": {"row": [0, 1, 3, 0]},
    "out of order": {"row": [0, 0, 2, 0]},
    "a frame out of order": {"block_index": [0, 0, 1, 1], "row": [1, 0, 0, 0]},
    "length of a frame": {"length": [0, 100, 100, 100]},
    "length of a frame, long": {"length": [FRAME_BYTES_MAX + 1, 100, 100, 100]},
    "place of a frame": {"offset": [PAGE * 3 + 512, PAGE, PAGE * 9, PAGE * 2]},
    "place of a frame, in the header": {"offset": [0, PAGE, PAGE * 9, PAGE * 2]},
    "place of a frame, in the index": {"offset": [PAGE * 15, PAGE, PAGE * 9, PAGE * 2]},
    "place of a frame, beyond": {"offset": [(1 << 63) - PAGE, PAGE, PAGE * 9, PAGE * 2]},
    "overlaps another": {"offset": [PAGE * 3, PAGE, PAGE * 4, PAGE * 2]},
    "overlaps another, the same": {"offset": [PAGE * 3, PAGE, PAGE * 9, PAGE]},
}


@pytest.mark.parametrize("what", BROKEN_FRAMES)
def test_frame_that_cannot_be(what: str) -> None:
    change = {name: np.array(value) for name, value in BROKEN_FRAMES[what].items()}
    with pytest.raises(FormatError, match=what.split(",")[0]):
        read(index(frames=replace(table(), **change)))


def test_place_that_is_negative_as_a_signed_number() -> None:
    frames = replace(table(), offset=np.array([-PAGE, PAGE, PAGE * 9, PAGE * 2]))
    with pytest.raises(FormatError, match="place of a frame"):
        read(index(frames=frames))


def test_bits() -> None:
    bits = table().bits.copy()
    bits[1] = 0
    with pytest.raises(FormatError, match="without a page"):
        read(index(frames=replace(table(), bits=bits)))
    bits = table().bits.copy()
    bits[2, 32] = 1  # RAM's last window has 256 pages
    with pytest.raises(FormatError, match=r"page past the ramblock's end.*256 pages"):
        read(index(frames=replace(table(), bits=bits)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"blocks": ()}, "1 to 4096 ramblocks"),
        ({"blocks": (*BLOCKS, BLOCKS[0])}, "same idstr"),
        ({"blocks": (("pc.ram", 9 * MiB + 1), *BLOCKS[1:])}, "multiple of 4096"),
        ({"blocks": (("pc.ram", 1 << 60), *BLOCKS[1:])}, "more than"),
        ({"configuration": Configuration("pc")}, "mapped-ram"),
        ({"configuration": Configuration("pc", ("x-ignore-shared", "mapped-ram"))}, "x-ignore"),
        ({"configuration": Configuration("pc", ("mapped-ram", "multifd"))}, "capabilities"),
    ],
)
def test_guest_that_cannot_be(change: dict[str, Any], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        read(index(**change))


@given(st.data())
def test_bent_index_whose_digests_fit_is_refused_or_harmless(data: st.DataObject) -> None:
    """Someone bent it on purpose: nothing but a FormatError, or a table that names what exists."""
    made = index()
    packed = bytearray(made.pack())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(packed) - 1))
        packed[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    if data.draw(st.booleans()):
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    end = 16 * PAGE
    header = ColdHeader(3, end, len(packed), bytes_digest(bytes(packed)))
    try:
        found = read_index(bytes(packed), header)
    except FormatError:
        return
    frames = found.frames
    for number in range(len(frames)):
        size = found.blocks[int(frames.block_index[number])][1]
        assert 0 <= int(frames.row[number]) * WINDOW_BYTES < size
        assert int(frames.offset[number]) >= PAGE
        assert int(frames.offset[number]) + int(frames.length[number]) <= end
        assert 0 < int(frames.length[number]) <= FRAME_BYTES_MAX


@given(st.data())
def test_flipped_bit_of_header_or_index_is_refused(data: st.DataObject) -> None:
    header, packed = written(index())
    whole = bytearray(header.pack() + packed)
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(FormatError):
        read_index(
            bytes(whole[PAGE:]),
            read_header(bytes(whole[:PAGE]), file_size=header.index_offset + len(packed)),
        )


@given(st.binary(max_size=200), st.integers(0, 1 << 63))
def test_header_of_anything(data: bytes, size: int) -> None:
    for page in (data, (MAGIC + data).ljust(PAGE, b"\0"), data.ljust(PAGE, b"\0")):
        with pytest.raises(FormatError):
            read_header(page, file_size=size)


@pytest.mark.parametrize(
    ("header", "size", "what"),
    [
        (ColdHeader(3, 4095, 10, bytes(16)), 4105, "place of the index"),
        (ColdHeader(3, 0, 10, bytes(16)), 10, "place of the index"),
        (ColdHeader(3, 4096, 10, bytes(16)), 4105, "end of the index"),
        (ColdHeader(3, 4096, 10, bytes(16)), 4107, "end of the index"),
        (ColdHeader(3, 4096, 1 << 40, bytes(16)), 4096 + (1 << 40), "length of the index"),
    ],
)
def test_header_that_does_not_fit_its_file(header: ColdHeader, size: int, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        read_header(header.pack(), file_size=size)
