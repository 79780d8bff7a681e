"""Packed bitmaps against a list of bools and against numbers written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import page_bits

from uringmig.pages.bitmap import first_bit_from, pack, set_bit_count, store, unpack

bitmaps = st.binary(max_size=80).map(lambda raw: np.frombuffer(raw, np.uint8))


def slow_bits(packed: NDArray[np.uint8]) -> list[bool]:
    return [bool(int(byte) >> bit & 1) for byte in packed for bit in range(8)]


def test_bit_order_is_that_of_the_file() -> None:
    """Page 0 is the lowest bit of byte 0, page 8 that of byte 1."""
    bits = np.zeros(10, np.bool_)
    bits[[0, 3, 8]] = True
    assert pack(bits).tobytes() == b"\x09\x01"


@given(page_bits())
def test_pack(bits: NDArray[np.bool_]) -> None:
    packed = pack(bits)
    padding = [False] * (-len(bits) % 8)
    assert packed.dtype == np.uint8
    assert slow_bits(packed) == bits.tolist() + padding


@given(bitmaps, st.data())
def test_unpack_any_range(packed: NDArray[np.uint8], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 8 * len(packed)))
    count = data.draw(st.integers(0, 8 * len(packed) - first))
    bits = unpack(packed, first_page=first, page_count=count)
    assert bits.dtype == np.bool_
    assert bits.tolist() == slow_bits(packed)[first : first + count]


@given(bitmaps, st.data())
def test_store_changes_its_pages_and_no_other(
    packed: NDArray[np.uint8], data: st.DataObject
) -> None:
    first = 8 * data.draw(st.integers(0, len(packed)))
    bits = data.draw(page_bits())[: 8 * len(packed) - first]
    changed = packed.copy()
    store(changed, first_page=first, bits=bits)
    expected = slow_bits(packed)
    expected[first : first + len(bits)] = bits.tolist()
    assert slow_bits(changed) == expected


@pytest.mark.parametrize("page_count", [1, 7, 8, 9, 64, 65])
def test_store_at_the_end_of_a_block_keeps_the_padding(page_count: int) -> None:
    packed = np.full(16, 0xFF, np.uint8)
    store(packed, first_page=0, bits=np.zeros(page_count, np.bool_))
    assert slow_bits(packed) == [False] * page_count + [True] * (128 - page_count)


def test_store_refuses_what_would_share_a_byte_or_pass_the_end() -> None:
    packed = np.zeros(2, np.uint8)
    with pytest.raises(AssertionError):
        store(packed, first_page=4, bits=np.ones(8, np.bool_))
    with pytest.raises(AssertionError):
        store(packed, first_page=8, bits=np.ones(9, np.bool_))
    assert not packed.any()


@given(bitmaps)
def test_set_bit_count(packed: NDArray[np.uint8]) -> None:
    assert set_bit_count(packed) == sum(slow_bits(packed))


@pytest.mark.parametrize("length", [65535, 65536, 65537, 200_000])
def test_set_bit_count_of_a_large_bitmap(length: int) -> None:
    """As long as several pieces of the count, and a count beyond 255 and 65535."""
    assert set_bit_count(np.full(length, 0xFF, np.uint8)) == 8 * length


@given(bitmaps, st.integers(0, 700))
def test_first_bit_from(packed: NDArray[np.uint8], page_count: int) -> None:
    past = [page for page, bit in enumerate(slow_bits(packed)) if bit and page >= page_count]
    assert first_bit_from(packed, page_count=page_count) == (past[0] if past else None)


@pytest.mark.parametrize("page", [32, 33, 39, 40, 63])
def test_first_bit_from_sees_each_padding_bit(page: int) -> None:
    packed = np.zeros(8, np.uint8)
    packed[:4] = 0xFF
    packed[page // 8] = 1 << page % 8
    assert first_bit_from(packed, page_count=32) == page
    assert packed[page // 8] == 1 << page % 8
