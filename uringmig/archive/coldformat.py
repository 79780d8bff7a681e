"""The cold image: header page, frames, index; bytes and values.  Pure; see FORMAT.md.

    0              header, one page: where the index is, and digests of both
    4096           frames, each at the beginning of a page; a window of zeros has none
    index_offset   index: guest, device state, blocks, and a table of the frames in columns

All numbers are big-endian. Whatever the file says is checked here before anybody uses it: a
`ColdIndex` that was read names frames inside the file that do not overlap, of windows that exist.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import FormatError, StateError
from uringmig.format import constants as c
from uringmig.format.cursor import BE32, BE64, Cursor, StarvedError
from uringmig.format.headers import Configuration, at_most, equal, pack_lstr
from uringmig.format.layout import plan_layout
from uringmig.image.digest import DIGEST_BYTES, bytes_digest
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.pages import bitmap
from uringmig.units import MiB, align_up, is_aligned

MAGIC: Final = b"uringmig cold\0\0\0"
VERSION: Final = 1
HEADER_BYTES: Final = PAGE_SIZE
BITS_BYTES: Final = WINDOW_BYTES // PAGE_SIZE // 8
#: What zstd may make of a window that it cannot compress (ZSTD_compressBound), and some air.
FRAME_BYTES_MAX: Final = align_up(WINDOW_BYTES + WINDOW_BYTES // 256 + 512, PAGE_SIZE)
#: 64 TiB of guest in windows that all have data: no honest index is larger.
INDEX_BYTES_MAX: Final = 4096 * MiB
_CONFIGURATION_BYTES_MAX: Final = 64 * 1024
#: Magic, version, page size, window size, level, index offset and length, digest of the index.
_HEADER: Final = struct.Struct(f">16sIIIiQQ{DIGEST_BYTES}s")
#: Bytes of one frame in all columns of the table.
_FRAME_BYTES: Final = 4 + 4 + 8 + 4 + 2 * DIGEST_BYTES + BITS_BYTES


@dataclass(frozen=True, slots=True)
class ColdHeader:
    """The first page; offsets and lengths in bytes, ``level`` as the frames were compressed."""

    level: int
    index_offset: int
    index_length: int
    index_digest: bytes

    def pack(self) -> bytes:
        """Write the page, its own digest included."""
        fields = _HEADER.pack(
            MAGIC, VERSION, PAGE_SIZE, WINDOW_BYTES, self.level,
            self.index_offset, self.index_length, self.index_digest,
        )  # fmt: skip
        return (fields + bytes_digest(fields)).ljust(HEADER_BYTES, b"\0")


@dataclass(frozen=True, slots=True)
class FrameTable:
    """Every frame of an image, sorted by block and row; arrays of equal length.

    Attributes:
        block_index: int64.
        row: int64, of the block.
        offset: int64, in the file.
        length: int64, bytes.
        frame_digest: uint8, (frames, 16), of the frame's bytes.
        memory_digest: uint8, (frames, 16), of the window's memory.
        bits: uint8, (frames, `BITS_BYTES`): the pages that the frame holds, packed.
    """

    block_index: NDArray[np.int64]
    row: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    frame_digest: NDArray[np.uint8]
    memory_digest: NDArray[np.uint8]
    bits: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class ColdIndex:
    """What the end of a cold image says.

    Attributes:
        configuration: of the machine; its capabilities are exactly ``mapped-ram``.
        section_id: of the ram section.
        device_state: everything after ram's START section.
        blocks: idstr and used_length in bytes, in the order of the stream.
        frames: where the memory is.
    """

    configuration: Configuration
    section_id: int
    device_state: bytes
    blocks: tuple[tuple[str, int], ...]
    frames: FrameTable

    def pack(self) -> bytes:
        """Write the index."""
        configuration = self.configuration.pack()
        frames = self.frames
        pieces = [
            BE32.pack(len(configuration)),
            configuration,
            BE32.pack(self.section_id),
            BE64.pack(len(self.device_state)),
            self.device_state,
            BE32.pack(len(self.blocks)),
            *(pack_lstr(idstr) + BE64.pack(used_length) for idstr, used_length in self.blocks),
            BE64.pack(len(frames)),
            frames.block_index.astype(">u4").tobytes(),
            frames.row.astype(">u4").tobytes(),
            frames.offset.astype(">u8").tobytes(),
            frames.length.astype(">u4").tobytes(),
            frames.frame_digest.tobytes(),
            frames.memory_digest.tobytes(),
            frames.bits.tobytes(),
        ]
        return b"".join(pieces)


def read_header(page: bytes, *, file_size: int) -> ColdHeader:
    """Read the first page of a cold image.

    Raises:
        FormatError: it is not one, it is damaged, or its index does not end the file.
    """
    if len(page) < HEADER_BYTES or not page.startswith(MAGIC):
        raise FormatError("not a cold image", offset=0)
    fields = page[: _HEADER.size]
    _, version, page_size, window_bytes, level, offset, length, digest = _HEADER.unpack(fields)
    equal("cold image version", VERSION, version, at=16)
    found = page[_HEADER.size : _HEADER.size + DIGEST_BYTES]
    if found != bytes_digest(fields):
        raise FormatError("the header of a cold image is damaged", offset=_HEADER.size)
    equal("page size", PAGE_SIZE, page_size, at=20)
    equal("window size", WINDOW_BYTES, window_bytes, at=24)
    if any(page[_HEADER.size + DIGEST_BYTES :]):
        raise FormatError("the rest of the header page is not zero", offset=_HEADER.size)
    at_most("length of the index", INDEX_BYTES_MAX, length, at=40)
    if not is_aligned(offset, PAGE_SIZE) or offset < HEADER_BYTES:
        raise FormatError("place of the index", offset=32, found=f"{offset:#x}")
    if offset + length != file_size:
        raise FormatError("end of the index", offset=32, expected=file_size, found=offset + length)
    return ColdHeader(level, offset, length, digest)


def read_index(data: bytes, header: ColdHeader) -> ColdIndex:
    """Read and check the index.

    Raises:
        FormatError: it is damaged, or names what cannot be.
    """
    if bytes_digest(data) != header.index_digest:
        raise FormatError("the index of a cold image is damaged", offset=header.index_offset)
    cursor = Cursor(data, offset=header.index_offset)
    try:
        return _read_index(cursor, header, len(data))
    except StarvedError:
        raise FormatError("the index is cut", offset=cursor.offset) from None


def _read_index(cursor: Cursor, header: ColdHeader, length: int) -> ColdIndex:
    """Read the fields of the index."""
    at = cursor.offset
    size = cursor.be32()
    at_most("length of the configuration", _CONFIGURATION_BYTES_MAX, size, at=at)
    at = cursor.offset
    configuration = Configuration.unpack(cursor.take(size), at=at)
    if configuration.capabilities != (c.CAPABILITY_MAPPED_RAM,):
        raise FormatError(
            "capabilities of a cold image", offset=at,
            expected=c.CAPABILITY_MAPPED_RAM, found=configuration.capabilities,
        )  # fmt: skip
    section_id = cursor.be32()
    at = cursor.offset
    size = cursor.be64()
    at_most("length of the device state", c.TAIL_BYTES_MAX, size, at=at)
    device_state = cursor.take(size)
    at = cursor.offset
    count = cursor.be32()
    at_most("number of ramblocks", c.BLOCKS_MAX, count, at=at)
    blocks = tuple((cursor.lstr("idstr"), cursor.be64()) for _ in range(count))
    try:
        plan_layout(configuration, blocks, section_id=section_id)
    except StateError as error:
        raise FormatError(f"no image can have these ramblocks: {error}", offset=at) from None
    at = cursor.offset
    count = cursor.be64()
    equal("bytes of the frames' table", count * _FRAME_BYTES, length - cursor.position, at=at)
    frames = FrameTable(
        block_index=_numbers(cursor, count, ">u4"),
        row=_numbers(cursor, count, ">u4"),
        offset=_numbers(cursor, count, ">u8"),
        length=_numbers(cursor, count, ">u4"),
        frame_digest=_bytes(cursor, count, DIGEST_BYTES),
        memory_digest=_bytes(cursor, count, DIGEST_BYTES),
        bits=_bytes(cursor, count, BITS_BYTES),
    )
    _check_frames(frames, blocks, end=header.index_offset, at=at)
    return ColdIndex(configuration, section_id, device_state, blocks, frames)


def _numbers(cursor: Cursor, count: int, kind: str) -> NDArray[np.int64]:
    """Read one column of numbers; what does not fit becomes negative and is refused later."""
    data = cursor.take(count * np.dtype(kind).itemsize)
    return np.frombuffer(data, kind).astype(np.int64)


def _bytes(cursor: Cursor, count: int, width: int) -> NDArray[np.uint8]:
    """Read one column of byte strings."""
    return np.frombuffer(cursor.take(count * width), np.uint8).reshape(count, width)


def _check_frames(
    frames: FrameTable, blocks: tuple[tuple[str, int], ...], *, end: int, at: int
) -> None:
    """Refuse a table that names windows, pages or places that are not there.

    Args:
        frames: as read.
        blocks: idstr and used_length.
        end: where frames must have ended.
        at: offset of the table, for the message.
    """
    if not len(frames):
        return
    if int(frames.block_index.max()) >= len(blocks):
        raise FormatError("a frame of a ramblock that is not there", offset=at)
    lengths = np.array([used_length for _, used_length in blocks], np.int64)[frames.block_index]
    rows = -(-lengths // WINDOW_BYTES)
    _refuse(frames.row >= rows, "a frame of a window past the ramblock's end", frames, at)
    key = frames.block_index * (1 << 32) + frames.row
    unsorted = np.zeros(len(frames), np.bool_)
    unsorted[1:] = key[1:] <= key[:-1]
    _refuse(unsorted, "a frame out of order", frames, at)
    wrong = (frames.length <= 0) | (frames.length > FRAME_BYTES_MAX)
    _refuse(wrong, "length of a frame", frames, at)
    wrong = (frames.offset < HEADER_BYTES) | (frames.offset % PAGE_SIZE != 0)
    wrong |= frames.offset > end - frames.length
    _refuse(wrong, "place of a frame", frames, at)
    order = np.argsort(frames.offset, kind="stable")
    ends = (frames.offset + frames.length)[order]
    overlapping = np.zeros(len(frames), np.bool_)
    overlapping[order[1:]] = frames.offset[order[1:]] < ends[:-1]
    _refuse(overlapping, "a frame overlaps another", frames, at)
    empty: NDArray[np.bool_] = ~np.any(frames.bits, axis=1)
    _refuse(empty, "a frame without a page", frames, at)
    short = np.flatnonzero(lengths - frames.row * WINDOW_BYTES < WINDOW_BYTES)
    for number in short.tolist():  # at most one in each block
        pages = int(lengths[number] - frames.row[number] * WINDOW_BYTES) // PAGE_SIZE
        if bitmap.first_bit_from(frames.bits[number], page_count=pages) is not None:
            raise FormatError(
                "a frame with a page past the ramblock's end", offset=at,
                expected=f"{pages} pages in row {frames.row[number]}",
            )  # fmt: skip


def _refuse(wrong: NDArray[np.bool_], what: str, frames: FrameTable, at: int) -> None:
    """Name the first frame that is wrong."""
    if wrong.any():
        number = int(np.argmax(wrong))
        raise FormatError(
            what, offset=at,
            found=f"frame {number}, row {frames.row[number]}, "
            f"{frames.length[number]} bytes at {frames.offset[number]:#x}",
        )  # fmt: skip
