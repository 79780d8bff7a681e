"""Digests of 64 KiB: those of the guest's memory, for every piece of which a page is set."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from uringmig.errors import MismatchError
from uringmig.format.layout import bitmap_length
from uringmig.image import digest
from uringmig.image.digest import PIECE_BYTES, PIECE_DIGEST_BYTES
from uringmig.image.pieces import PieceTable, no_digests, piece_table, stored_pieces
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.pages import bitmap
from uringmig.units import KiB, MiB

STALE = 0xEE


def of_bytes(data: bytes) -> bytes:
    """The rule of FORMAT.md, in its own words."""
    return xxhash.xxh3_128_digest(data)[:PIECE_DIGEST_BYTES]


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Length of a window in pages, and extents of data in it, sorted and apart."""
    pages = draw(st.sampled_from([1, 16, 17, 63, 64, 65, 200, 1024]))
    cuts = sorted(draw(st.sets(st.integers(0, pages), max_size=12)))
    return pages, list(zip(cuts[::2], cuts[1::2], strict=False))


@given(windows(), st.integers(0, 1 << 30))
def test_pieces_and_window_are_those_of_the_memory_whatever_lies_in_its_holes(
    window: tuple[int, list[tuple[int, int]]], seed: int
) -> None:
    """What may not be read is not: it holds other bytes here, and counts as zeros."""
    pages, extents = window
    memory = np.full(pages * PAGE_SIZE, STALE, np.uint8)
    real = np.zeros_like(memory)
    for first, last in extents:
        noise = np.random.default_rng(seed).integers(0, 256, (last - first) * PAGE_SIZE, np.uint8)
        real[first * PAGE_SIZE : last * PAGE_SIZE] = noise
        memory[first * PAGE_SIZE : last * PAGE_SIZE] = noise
    start = [first * PAGE_SIZE for first, _ in extents]
    length = [(last - first) * PAGE_SIZE for first, last in extents]
    whole, found = digest.piecewise_digest(memory, start, length)
    assert whole == digest.window_digest(real)
    for number, row in enumerate(found):
        piece = real[number * PIECE_BYTES : (number + 1) * PIECE_BYTES].tobytes()
        assert row.tobytes() == of_bytes(piece) or not (any(piece) or row.any())


def packed_of(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """As on disk: whole words."""
    packed = np.zeros(bitmap_length(len(bits) * PAGE_SIZE), np.uint8)
    packed[: -(-len(bits) // 8)] = bitmap.pack(bits)
    return packed


@st.composite
def blocks(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Memory of a block, and its bits; zero pages may be set as in a dense block."""
    pages = draw(st.sampled_from([1, 16, 40, 1024, 1500]))
    set_pages = draw(st.sets(st.integers(0, pages - 1), max_size=20))
    memory = np.zeros(pages * PAGE_SIZE, np.uint8)
    bits = np.zeros(pages, np.bool_)
    for page in set_pages:
        bits[page] = True
        memory[page * PAGE_SIZE] = draw(st.integers(0, 255))
    return memory, packed_of(bits)


def made_of(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a save makes: nothing for a window without data."""
    made = no_digests(len(memory))
    for at in range(0, len(memory), WINDOW_BYTES):
        piece = memory[at : at + WINDOW_BYTES]
        if piece.any():
            _, found = digest.piecewise_digest(piece, [0], [len(piece)])
            made[at // PIECE_BYTES :][: len(found)] = found
    return made


@given(blocks())
def test_the_table_has_a_digest_for_each_piece_with_a_set_page_and_no_other(
    block: tuple[NDArray[np.uint8], NDArray[np.uint8]],
) -> None:
    memory, packed = block
    table = piece_table(made_of(memory), packed, len(memory))
    expected = [
        of_bytes(memory[number * PIECE_BYTES : (number + 1) * PIECE_BYTES].tobytes())
        for number in np.flatnonzero(stored_pieces(packed, len(memory))).tolist()
    ]
    assert table == b"".join(expected)


@given(blocks(), st.data())
def test_each_piece_that_differs_is_found_and_no_other(
    block: tuple[NDArray[np.uint8], NDArray[np.uint8]], data: st.DataObject
) -> None:
    memory, packed = block
    stored = np.flatnonzero(stored_pieces(packed, len(memory))).tolist()
    table = PieceTable(
        piece_table(made_of(memory), packed, len(memory)), packed, len(memory), idstr="b"
    )
    changed = data.draw(st.sets(st.sampled_from(stored))) if stored else set()
    for number in changed:
        memory[number * PIECE_BYTES + 7] ^= 1
    found = []
    for row, at in enumerate(range(0, len(memory), WINDOW_BYTES)):
        piece = memory[at : at + WINDOW_BYTES]
        _, digests = digest.piecewise_digest(piece, [0], [len(piece)])
        found += [row * 64 + number for number in table.differing(row, digests)]
    assert found == sorted(changed)


@pytest.mark.parametrize("change", [-12, -1, 1, 12])
def test_a_table_of_another_length_is_refused(change: int) -> None:
    packed = packed_of(np.ones(256, np.bool_))
    table = piece_table(no_digests(MiB), packed, MiB)
    assert len(table) == 16 * PIECE_DIGEST_BYTES
    with pytest.raises(MismatchError, match="digests of pieces"):
        PieceTable((table + bytes(12))[: len(table) + change], packed, MiB, idstr="b")


def test_a_dense_gib_has_a_table_of_192_kib_and_256_in_text() -> None:
    """What the manifest may cost; holes cost nothing."""
    pages = 64 * MiB // PAGE_SIZE
    full, empty = np.ones(pages, np.bool_), np.zeros(pages, np.bool_)
    made = no_digests(64 * MiB)
    assert len(piece_table(made, packed_of(full), 64 * MiB)) * 16 * 4 // 3 == 256 * KiB
    assert piece_table(made, packed_of(empty), 64 * MiB) == b""
