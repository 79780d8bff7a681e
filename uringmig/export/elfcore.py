"""An ELF core file as bytes, like that of QEMU's ``dump-guest-memory`` without paging.  Pure.

QEMU: dump/dump.c. A PT_LOAD for each segment, at its physical address, ``p_filesz`` equal to
``p_memsz``: readers skip a segment whose end is not in the file, so holes are holes of the file.
Other than QEMU's the segments begin at whole pages of the file, which O_DIRECT writes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from uringmig.export.guestmap import Segment
from uringmig.options import PAGE_SIZE
from uringmig.units import align_up

_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_NHDR: Final = struct.Struct("<III")
#: Magic, ELFCLASS64, ELFDATA2LSB, EV_CURRENT.
_IDENT: Final = b"\x7fELF\x02\x01\x01"
_ET_CORE: Final = 4
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_NOTE_ALIGN: Final = 4


def note(name: bytes, kind: int, content: bytes) -> bytes:
    """One note; name and content padded."""
    named = name + b"\0"
    header = _NHDR.pack(len(named), len(content), kind)
    return header + _padded(named) + _padded(content)


class ElfPlace:
    """Where everything of a core file lies.

    Args:
        segments: ascending.
        notes_room: bytes that all notes have at most; how many there are may be known later.

    Attributes:
        offsets: of each segment in the file.
        size: of the file.
    """

    def __init__(self, segments: Sequence[Segment], *, notes_room: int) -> None:
        self._segments = segments
        self._notes_at = _EHDR.size + _PHDR.size * (len(segments) + 1)
        self._notes_room = notes_room
        at = align_up(self._notes_at + notes_room, PAGE_SIZE)
        self.offsets = []
        for one in segments:
            self.offsets.append(at)
            at += one.length
        self.size = at

    def head(self, notes: bytes) -> bytes:
        """The file's beginning: headers and notes."""
        assert len(notes) <= self._notes_room, (len(notes), self._notes_room)
        count = len(self._segments) + 1
        ehdr = _EHDR.pack(
            _IDENT, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0,
            _EHDR.size, _PHDR.size, count, 0, 0, 0,
        )  # fmt: skip
        phdrs = [_PHDR.pack(_PT_NOTE, 0, self._notes_at, 0, 0, len(notes), len(notes), _NOTE_ALIGN)]
        phdrs += [
            _PHDR.pack(_PT_LOAD, 0, at, one.start, one.start, one.length, one.length, 0)
            for one, at in zip(self._segments, self.offsets, strict=True)
        ]
        return ehdr + b"".join(phdrs) + notes


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _NOTE_ALIGN)
