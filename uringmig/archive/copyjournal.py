"""The journal of a copy: which windows of an image being written are already durable.  Pure.

    magic (16 bytes)
    records: be32 length of body, body, digest of both (16 bytes)
    first record: JSON, what is copied and how; all others: chunks, `CHUNK` each

Records are only appended, each after the bytes it speaks of are durable. A record that was cut or
does not fit its digest ends the journal: what comes after it is not known to be durable.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from uringmig.errors import FormatError
from uringmig.format.cursor import BE32
from uringmig.image.digest import DIGEST_BYTES, bytes_digest
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.units import MiB

MAGIC: Final = b"uringmig journal"
TOKEN_BYTES: Final = 16
BITS_BYTES: Final = WINDOW_BYTES // PAGE_SIZE // 8
#: Block index, row, offset and length of the frame, digests of memory and frame, page bits.
CHUNK: Final = struct.Struct(f">IIQI4x16s16s{BITS_BYTES}s")
#: 16 TiB of memory; and a bound for whoever reads a journal that is none.
BYTES_MAX: Final = 1024 * MiB
_RECORD_BYTES_MAX: Final = 64 * MiB
_CHUNKS_PER_RECORD: Final = 4096


class JournalHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a copy is of; only an equal one can go on from its journal.

    Attributes:
        source: fingerprint of the contents.
        shape: digest of everything that decides where bytes go and how they look.
        token: hex; the partial file begins with it, so that no other file is taken for it.
    """

    tier: Literal["hot", "cold"]
    source: str
    shape: str
    token: Annotated[str, msgspec.Meta(pattern=rf"^[0-9a-f]{{{2 * TOKEN_BYTES}}}\Z")]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One window that is durable; bytes.

    Attributes:
        bits: of its pages, packed, `BITS_BYTES`.
        digest: of its memory.
        frame_offset: where its frame is, cold only; 0 without a frame.
        frame_length: bytes of the frame, 0 without one.
        frame_digest: of the frame's bytes; zeros without one.
    """

    block_index: int
    row: int
    bits: bytes
    digest: bytes
    frame_offset: int = 0
    frame_length: int = 0
    frame_digest: bytes = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal as far as it can be trusted.

    Attributes:
        valid_bytes: where the next record belongs; whatever lies beyond is worthless.
    """

    header: JournalHeader
    chunks: tuple[Chunk, ...]
    valid_bytes: int


def encode_start(header: JournalHeader) -> bytes:
    """Write the beginning of a journal."""
    return MAGIC + _record(msgspec.json.encode(header))


def encode_chunks(chunks: Sequence[Chunk]) -> bytes:
    """Write chunks as records to append."""
    pieces = []
    for start in range(0, len(chunks), _CHUNKS_PER_RECORD):
        body = b"".join(
            CHUNK.pack(
                chunk.block_index, chunk.row, chunk.frame_offset, chunk.frame_length,
                chunk.digest, chunk.frame_digest, chunk.bits,
            )
            for chunk in chunks[start : start + _CHUNKS_PER_RECORD]
        )  # fmt: skip
        pieces.append(_record(body))
    return b"".join(pieces)


def decode(data: bytes) -> Journal:
    """Read a journal up to the first record that is not whole.

    Raises:
        FormatError: there is not even a beginning, or a record holds what nobody writes.
    """
    if not data.startswith(MAGIC):
        raise FormatError("not a journal of a copy", offset=0)
    at = len(MAGIC)
    body = _whole_record(data, at)
    if body is None:
        raise FormatError("the journal's first record is cut or damaged", offset=at)
    try:
        header = msgspec.json.decode(body, type=JournalHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"journal: {error}", offset=at) from None
    chunks: list[Chunk] = []
    at += _record_bytes(body)
    while (body := _whole_record(data, at)) is not None:
        if len(body) % CHUNK.size:
            raise FormatError("a journal's record is not made of chunks", offset=at)
        chunks += [
            Chunk(block_index, row, bits, memory_digest, offset, length, frame_digest)
            for block_index, row, offset, length, memory_digest, frame_digest, bits
            in CHUNK.iter_unpack(body)
        ]  # fmt: skip
        at += _record_bytes(body)
    return Journal(header, tuple(chunks), at)


def _record(body: bytes) -> bytes:
    """Frame one record."""
    framed = BE32.pack(len(body)) + body
    return framed + bytes_digest(framed)


def _record_bytes(body: bytes) -> int:
    """Length of a framed record."""
    return BE32.size + len(body) + DIGEST_BYTES


def _whole_record(data: bytes, at: int) -> bytes | None:
    """Body of the record at ``at``, or None if it is cut or not what was written."""
    start = at + BE32.size
    if start > len(data):
        return None
    (length,) = BE32.unpack_from(data, at)
    end = start + length
    if not 0 < length <= _RECORD_BYTES_MAX or end + DIGEST_BYTES > len(data):
        return None
    if bytes_digest(data[at:end]) != data[end : end + DIGEST_BYTES]:
        return None
    return data[start:end]
