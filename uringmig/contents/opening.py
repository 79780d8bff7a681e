"""Which kind of file is it? Its first bytes say; nothing is believed of them but that."""

from __future__ import annotations

import os

from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import Contents
from uringmig.options import ReadOptions


def open_contents(
    path: str | os.PathLike[str],
    *,
    offset: int | None = None,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> Contents:
    """Open a mapped-ram image, QEMU's or ours.

    Args:
        path: the file.
        offset: where the image begins in the file, QEMU's ``offset=``; None is at its start.
        options: how to read.

    Returns:
        The contents, which the caller closes.

    Raises:
        FormatError: it is of no kind that can be read, or breaks a rule of its kind.
        StorageError: it cannot be read, or O_DIRECT is required and cannot be had.
        HostError: io_uring is required and cannot be had.
    """
    return MappedRamContents(path, offset=offset or 0, options=options)
