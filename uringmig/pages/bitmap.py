"""Packed page bitmaps: one bit a page, in the order the file has them on little-endian hosts.

Page ``p`` is bit ``p % 8`` of byte ``p // 8`` (QEMU: set_bit() on an ``unsigned long`` array,
migration/ram.c ``file_bmap``). Packed means uint8; unpacked means bool, one a page. A bitmap of
the file is rounded up to whole 64-bit words, so it may hold bits past the last page: whoever reads
one from a file asks `first_bit_from` whether any of these is set.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.units import KiB, div_ceil, is_aligned

_BITS_OF_BYTE: Final = np.array([value.bit_count() for value in range(256)], np.uint8)
#: Counting goes through a temporary of the same length; 64 KiB of bitmap are 2 GiB of guest.
_COUNT_BYTES: Final = 64 * KiB


def pack(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack one bool a page into ``ceil(n / 8)`` bytes; the last byte is filled up with zeros."""
    assert bits.ndim == 1, bits.shape
    assert bits.dtype == np.bool_, bits.dtype
    return np.packbits(bits, bitorder="little")


def unpack(packed: NDArray[np.uint8], *, first_page: int, page_count: int) -> NDArray[np.bool_]:
    """Unpack the bits of ``page_count`` pages from any ``first_page`` on; bool, a new array."""
    assert first_page >= 0, first_page
    assert page_count >= 0, page_count
    assert first_page + page_count <= 8 * len(packed), (first_page, page_count, len(packed))
    first_byte, skipped = divmod(first_page, 8)
    covering = packed[first_byte : div_ceil(first_page + page_count, 8)]
    bits = np.unpackbits(covering, bitorder="little", count=skipped + page_count)
    return bits[skipped:].view(np.bool_)


def store(packed: NDArray[np.uint8], *, first_page: int, bits: NDArray[np.bool_]) -> None:
    """Overwrite the bits of ``len(bits)`` pages in place.

    Args:
        packed: the bitmap, writable.
        first_page: page of ``bits[0]``; a multiple of 8, so that windows never share a byte and
            channels can store theirs at the same time.
        bits: new values, bool; where they end inside a byte its other bits stay as they are.
    """
    assert is_aligned(first_page, 8), first_page
    assert first_page + len(bits) <= 8 * len(packed), (first_page, len(bits), len(packed))
    new = pack(bits)
    first_byte = first_page // 8
    last_bits = len(bits) % 8
    if last_bits:
        kept = packed[first_byte + len(new) - 1] & ~np.uint8((1 << last_bits) - 1)
        new[-1] |= kept
    packed[first_byte : first_byte + len(new)] = new


def set_bit_count(packed: NDArray[np.uint8]) -> int:
    """Count the set bits of a bitmap."""
    return sum(
        int(_BITS_OF_BYTE[packed[start : start + _COUNT_BYTES]].sum(dtype=np.int64))
        for start in range(0, len(packed), _COUNT_BYTES)
    )


def first_bit_from(packed: NDArray[np.uint8], *, page_count: int) -> int | None:
    """Find the first set bit at or past ``page_count``; None if there is none.

    A bit there promises a page that the block does not have. QEMU ignores it; we refuse it.
    """
    assert page_count >= 0, page_count
    first_byte, skipped = divmod(page_count, 8)
    past = packed[first_byte:].copy()
    if not len(past):
        return None
    past[0] &= (0xFF << skipped) & 0xFF
    byte_index = int(np.argmax(past != 0))
    byte = int(past[byte_index])
    if byte == 0:
        return None
    return 8 * (first_byte + byte_index) + (byte & -byte).bit_length() - 1
