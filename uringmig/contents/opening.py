"""Which kind of file is it? Its first bytes say; nothing else in them is trusted.

A save image of libvirt's holds a plain stream (raw) or mapped-ram (sparse). The domain's XML is not
taken over: an archived guest is QEMU's image alone.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass

from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.plainfile import PlainFileContents
from uringmig.contents.plainlook import PlainLook
from uringmig.contents.source import Contents
from uringmig.errors import StateError
from uringmig.format import libvirt
from uringmig.format.libvirt import LibvirtHeader
from uringmig.format.plainstream import read_opening
from uringmig.options import ReadOptions
from uringmig.storage.mainfile import READ_BYTES, open_for_reading


def open_contents(
    path: str | os.PathLike[str],
    *,
    offset: int | None = None,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> Contents:
    """Open a mapped-ram image, a plain migration stream, or a libvirt save image.

    Args:
        path: the file.
        offset: where QEMU's image or stream begins in the file, its ``offset=``; None is at the
            start, or where libvirt's header says.
        options: how to read.

    Returns:
        The contents, which the caller closes.

    Raises:
        StateError: a negative offset.
        FormatError: it is of no kind that can be read, or breaks a rule of its kind.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """
    found = _recognize(path, offset)
    if found.mapped_ram:
        return MappedRamContents(
            path, offset=found.base, options=options, kind=found.kind, notes=found.notes
        )
    return PlainFileContents(
        path, offset=found.base, options=options, kind=found.kind, notes=found.notes
    )


def look_at(path: str | os.PathLike[str], *, offset: int | None = None) -> PlainLook | None:
    """Look at a file that must be read whole to be opened, a plain stream; None for other kinds.

    Args:
        path: the file.
        offset: as for `open_contents`.

    Raises:
        StateError: a negative offset.
        FormatError: it is of no kind that can be read, or breaks a rule of its kind.
        StorageError: it cannot be read.
    """
    found = _recognize(path, offset)
    return None if found.mapped_ram else PlainLook(path, offset=found.base, kind=found.kind)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a file is: where QEMU's image begins in it, and whether that is mapped-ram."""

    kind: str
    base: int
    mapped_ram: bool
    notes: tuple[str, ...] = ()


def _recognize(path: str | os.PathLike[str], offset: int | None) -> _Found:
    """Tell the kind of a file by its first bytes."""
    base = offset or 0
    if base < 0:
        raise StateError(f"offset must not be negative: {base}")
    with closing(open_for_reading(os.fspath(path))) as main:
        head = main.read_at(base, READ_BYTES)
        if offset is None and head.startswith((libvirt.MAGIC, libvirt.MAGIC_PART)):
            header = LibvirtHeader.unpack(main.read_at(0, LibvirtHeader.STRUCT.size))
            form = "sparse" if header.sparse else "raw"
            state = "running" if header.was_running else "paused"
            note = f"{form} libvirt image of a guest that was {state}; its XML is left out"
            return _Found("libvirt", header.stream_offset, header.sparse, (note,))
    mapped = read_opening(head, at=base).mapped_ram
    return _Found("mapped-ram" if mapped else "plain", base, mapped)
