"""The journal of a copy: everything comes back, and of a damaged one only what is surely whole."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.archive.copyjournal import (
    BITS_BYTES,
    CHUNK,
    MAGIC,
    Chunk,
    JournalHeader,
    decode,
    encode_chunks,
    encode_start,
)
from uringmig.errors import FormatError

HEADER = JournalHeader(tier="cold", source="mapped-ram 1.2.3", shape="ab" * 16, token="cd" * 16)

chunks = st.builds(
    Chunk,
    block_index=st.integers(0, 2**32 - 1),
    row=st.integers(0, 2**32 - 1),
    bits=st.binary(min_size=BITS_BYTES, max_size=BITS_BYTES),
    digest=st.binary(min_size=16, max_size=16),
    frame_offset=st.integers(0, 2**64 - 1),
    frame_length=st.integers(0, 2**32 - 1),
    frame_digest=st.binary(min_size=16, max_size=16),
)
batches = st.lists(st.lists(chunks, min_size=1, max_size=3), max_size=3)


def test_size_of_a_chunk() -> None:
    assert CHUNK.size == 184
    assert len(MAGIC) == 16


@given(batches)
def test_chunks_come_back_in_their_order(written: list[list[Chunk]]) -> None:
    data = encode_start(HEADER) + b"".join(encode_chunks(batch) for batch in written)
    journal = decode(data)
    assert journal.header == HEADER
    assert list(journal.chunks) == [chunk for batch in written for chunk in batch]
    assert journal.valid_bytes == len(data)


def test_many_chunks_in_one_checkpoint() -> None:
    many = [Chunk(0, row, bytes(BITS_BYTES), bytes(16)) for row in range(10_000)]
    assert list(decode(encode_start(HEADER) + encode_chunks(many)).chunks) == many
    assert encode_chunks([]) == b""


@given(batches, st.data())
def test_cut_anywhere_it_holds_the_whole_records_before(
    written: list[list[Chunk]], data: st.DataObject
) -> None:
    start = encode_start(HEADER)
    pieces = [encode_chunks(batch) for batch in written]
    whole = start + b"".join(pieces)
    cut = data.draw(st.integers(0, len(whole)))
    if cut < len(start):
        with pytest.raises(FormatError):
            decode(whole[:cut])
        return
    journal = decode(whole[:cut])
    kept, end = 0, len(start)
    while kept < len(pieces) and end + len(pieces[kept]) <= cut:
        end += len(pieces[kept])
        kept += 1
    assert list(journal.chunks) == [chunk for batch in written[:kept] for chunk in batch]
    assert journal.valid_bytes == end
    # What comes next is written there and found again.
    again = decode(
        whole[: journal.valid_bytes] + encode_chunks([Chunk(1, 2, bytes(128), b"d" * 16)])
    )
    assert again.chunks[-1].row == 2


@given(batches, st.data())
def test_a_flipped_bit_is_never_believed(written: list[list[Chunk]], data: st.DataObject) -> None:
    whole = bytearray(encode_start(HEADER) + b"".join(encode_chunks(batch) for batch in written))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        journal = decode(bytes(whole))
    except FormatError:
        return
    assert journal.header == HEADER
    flat = [chunk for batch in written for chunk in batch]
    assert list(journal.chunks) == flat[: len(journal.chunks)]
    assert len(journal.chunks) < len(flat)


@given(st.binary(max_size=300))
def test_other_files_are_refused(data: bytes) -> None:
    for text in (data, MAGIC + data, MAGIC + b"\0\0\0\x04null" + os.urandom(16)):
        with pytest.raises(FormatError):
            decode(text)


def test_records_of_another_kind_are_refused() -> None:
    from uringmig.archive import copyjournal

    token = b'{"tier":"hot","source":"","shape":"","token":"%s"}'
    for body in (b"{}", b'{"tier":"warm"}', b"\xff", token % b"cd", token % (b"x" * 32)):
        with pytest.raises(FormatError, match="journal"):
            decode(MAGIC + copyjournal._record(body))
    with pytest.raises(FormatError, match="not made of chunks"):
        decode(encode_start(HEADER) + copyjournal._record(b"x" * 100))
