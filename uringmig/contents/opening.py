"""Which kind of file is it? Its first bytes say; nothing is believed of them but that."""

from __future__ import annotations

import os
from contextlib import closing

from uringmig.contents.libvirtfile import open_libvirt
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.plainfile import PlainFileContents
from uringmig.contents.source import Contents
from uringmig.errors import StateError
from uringmig.format import libvirt
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
    base = offset or 0
    if base < 0:
        raise StateError(f"offset must not be negative: {base}")
    with closing(open_for_reading(os.fspath(path))) as main:
        head = main.read_at(base, READ_BYTES)
    if offset is None and head.startswith((libvirt.MAGIC, libvirt.MAGIC_PART)):
        return open_libvirt(path, options=options)
    mapped = read_opening(head, at=base).mapped_ram
    kind = MappedRamContents if mapped else PlainFileContents
    return kind(path, offset=base, options=options)
