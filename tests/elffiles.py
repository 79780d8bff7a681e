"""An independent reader of ELF core files and LiME files: struct, and nothing of uringmig."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Core:
    """One ELF core: notes as (name, type, content); segments as (paddr, file offset, length)."""

    path: Path
    machine: int = 0
    notes: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self, address: int, length: int) -> bytes:
        """Bytes at a physical address, all within one segment."""
        for start, at, size in self.segments:
            if start <= address and address + length <= start + size:
                with self.path.open("rb") as file:
                    file.seek(at + address - start)
                    return file.read(length)
        raise AssertionError(f"nothing at {address:#x}")


def read_core(path: Path) -> Core:
    """Read headers and notes of a 64-bit little-endian core; strict about what readers ask for."""
    core = Core(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        assert head[:7] == b"\x7fELF\x02\x01\x01"
        kind, core.machine = struct.unpack_from("<HH", head, 16)
        assert kind == 4
        (phoff,) = struct.unpack_from("<Q", head, 32)
        phentsize, phnum = struct.unpack_from("<HH", head, 54)
        assert phentsize == 56
        for number in range(phnum):
            file.seek(phoff + number * phentsize)
            header = struct.unpack("<IIQQQQQQ", file.read(phentsize))
            kind, _, offset, _, paddr, filesz, memsz, _ = header
            assert filesz == memsz
            assert offset + filesz <= size
            if kind == 4:
                file.seek(offset)
                core.notes += read_notes(file.read(filesz))
            else:
                assert kind == 1
                assert filesz > 0
                core.segments.append((paddr, offset, filesz))
    assert core.segments == sorted(core.segments)
    return core


def read_notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at < len(data):
        named, length, kind = struct.unpack_from("<III", data, at)
        name = data[at + 12 : at + 12 + named].rstrip(b"\0")
        at += 12 + (named + 3) // 4 * 4
        yield name, kind, data[at : at + length]
        at += (length + 3) // 4 * 4
    assert at == len(data)


def read_lime(path: Path) -> list[tuple[int, int, int]]:
    """First address, file offset and length of each range of a LiME file."""
    ranges = []
    size = path.stat().st_size
    with path.open("rb") as file:
        at, end = 0, -1
        while at < size:
            file.seek(at)
            magic, version, first, last, reserved = struct.unpack("<IIQQQ", file.read(32))
            assert (magic, version, reserved) == (0x4C694D45, 1, 0)
            assert end < first <= last
            ranges.append((first, at + 32, last - first + 1))
            at, end = at + 32 + last - first + 1, last
    assert at == size
    return ranges
