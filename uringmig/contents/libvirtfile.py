"""A save image of libvirt's as contents: raw is a plain stream, sparse is mapped-ram.

The domain's XML is not taken over: an archived guest is QEMU's image alone.
"""

from __future__ import annotations

import os
from contextlib import closing

from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.plainfile import PlainFileContents
from uringmig.format.libvirt import LibvirtHeader
from uringmig.options import ReadOptions
from uringmig.storage.mainfile import open_for_reading

KIND = "libvirt"


def open_libvirt(
    path: str | os.PathLike[str], *, options: ReadOptions
) -> MappedRamContents | PlainFileContents:
    """Open what ``virsh save`` has written.

    Raises:
        FormatError: it is no such image, incomplete or compressed, or what it holds breaks a rule.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """
    with closing(open_for_reading(os.fspath(path))) as main:
        header = LibvirtHeader.unpack(main.read_at(0, LibvirtHeader.STRUCT.size))
    form = "sparse" if header.sparse else "raw"
    state = "running" if header.was_running else "paused"
    notes = (f"{form} libvirt image of a guest that was {state}; its XML is left out",)
    kind = MappedRamContents if header.sparse else PlainFileContents
    return kind(path, offset=header.stream_offset, options=options, kind=KIND, notes=notes)
