"""What a process has mapped: /proc/PID/maps, line by line.  Linux: fs/proc/task_mmu.c."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from msgspec import Struct

#: Linux: show_map_vma in fs/proc/task_mmu.c.
_LINE: Final = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<mode>\S{4}) (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+) *(?P<name>.*)"
)


class Mapping(Struct, frozen=True):
    """One line.

    Attributes:
        start: its first address.
        end: the address after its last.
        writable: the process may write to it.
        shared: mapped shared; what is written to it is the file's.
        offset: where in the file it begins, in bytes.
        device: (major, minor) of the file; on btrfs and overlayfs not what stat(2) gives.
        inode: of the file; 0 is memory without one.
        name: of the file; that of a removed one ends in ``(deleted)``.
    """

    start: int
    end: int
    writable: bool
    shared: bool
    offset: int
    device: tuple[int, int]
    inode: int
    name: str


def overlapping(mappings: Iterable[Mapping], start: int, end: int) -> list[Mapping]:
    """Those that have anything between two addresses, in their order."""
    return [mapping for mapping in mappings if mapping.start < end and start < mapping.end]


def mappings_of(pid: int) -> list[Mapping]:
    """Everything that a process has mapped, by address.

    Raises:
        OSError: there is no such process, or we may not look.
    """
    text = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    return [
        Mapping(
            start=int(match["start"], 16),
            end=int(match["end"], 16),
            writable=match["mode"][1] == "w",
            shared=match["mode"][3] == "s",
            offset=int(match["offset"], 16),
            device=(int(match["major"], 16), int(match["minor"], 16)),
            inode=int(match["inode"]),
            name=match["name"],
        )
        for match in map(_LINE.fullmatch, text.splitlines())
        if match is not None
    ]
