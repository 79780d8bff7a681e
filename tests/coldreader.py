"""An independent reader and mender of cold images: slow, obvious, strict; the oracle for ours.

It imports nothing of uringmig. `ValueError` at the first thing that is not as FORMAT.md has it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import xxhash
import zstandard

PAGE = 4096
WINDOW = 4 << 20
HEADER = ">16sIIIiQQ16s"


@dataclass
class Frame:
    """One row of the table."""

    block: int
    row: int
    offset: int
    length: int
    frame_digest: bytes
    memory_digest: bytes
    bits: bytes


@dataclass
class ColdImage:
    """What `read_cold` found; ``contents`` is the memory of each block by idstr."""

    level: int
    configuration: bytes
    section_id: int
    tail: bytes
    blocks: list[tuple[str, int]]
    frames: list[Frame]
    contents: dict[str, bytes]


def digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise ValueError(f"{what}: expected {expected!r}, found {found!r}")


def read_cold(path: Path) -> ColdImage:
    """Read and check a whole file."""
    data = path.read_bytes()
    magic, version, page, window, level, at, length, index_digest = struct.unpack_from(HEADER, data)
    expect((magic, version, page, window), (b"uringmig cold\0\0\0", 1, PAGE, WINDOW), "header")
    expect(data[64:80], digest(data[:64]), "digest of the header")
    expect(data[80:PAGE], bytes(PAGE - 80), "rest of the header page")
    expect((at % PAGE, at + length), (0, len(data)), "place of the index")
    index = data[at:]
    expect(digest(index), index_digest, "digest of the index")
    image = _index(index)
    image.level = level
    memories = [bytearray(size) for _, size in image.blocks]
    used = bytearray(data[:at])
    used[:PAGE] = bytes(PAGE)
    for frame in image.frames:
        raw = data[frame.offset : frame.offset + frame.length]
        expect(digest(raw), frame.frame_digest, "digest of a frame")
        used[frame.offset : frame.offset + frame.length] = bytes(frame.length)
        pages = zstandard.ZstdDecompressor().decompress(raw)
        start = frame.row * WINDOW
        memory = memories[frame.block]
        taken = 0
        for page_index in range(WINDOW // PAGE):
            if frame.bits[page_index // 8] >> page_index % 8 & 1:
                place = start + page_index * PAGE
                memory[place : place + PAGE] = pages[taken : taken + PAGE]
                expect(any(pages[taken : taken + PAGE]), True, "a stored page is not zero")
                taken += PAGE
        expect(taken, len(pages), "bytes of a frame")
        held = bytes(memory[start : start + WINDOW])
        expect(digest(held), frame.memory_digest, "digest of the memory")
    expect(any(used), False, "bytes between the frames")
    for (idstr, size), memory in zip(image.blocks, memories, strict=True):
        expect(len(memory), size, f"size of {idstr}")
        image.contents[idstr] = bytes(memory)
    return image


def _index(index: bytes) -> ColdImage:
    """Take the index apart."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        expect(position + count <= len(index), True, "index is long enough")
        position += count
        return index[position - count : position]

    def number(kind: str) -> int:
        return int(struct.unpack(kind, take(struct.calcsize(kind)))[0])

    configuration = take(number(">I"))
    section_id = number(">I")
    tail = take(number(">Q"))
    blocks = []
    for _ in range(number(">I")):
        idstr = take(take(1)[0]).decode("ascii")
        blocks.append((idstr, number(">Q")))
    count = number(">Q")
    columns = [
        list(struct.unpack(f">{count}{kind}", take(count * struct.calcsize(f">{kind}"))))
        for kind in "IIQI"
    ]
    strings = [[take(width) for _ in range(count)] for width in (16, 16, 128)]
    expect(position, len(index), "end of the index")
    frames = [Frame(*row) for row in zip(*columns, *strings, strict=True)]
    places = [(frame.block, frame.row) for frame in frames]
    expect(places, sorted(set(places)), "order of the frames")
    return ColdImage(0, configuration, section_id, tail, blocks, frames, {})


def mend(data: bytearray) -> None:
    """Make both digests of a header fit again after its file was bent on purpose."""
    at, length = struct.unpack_from(">QQ", data, 32)
    data[48:64] = digest(bytes(data[at : at + length]))
    data[64:80] = digest(bytes(data[:64]))
