"""A small file replaced as a whole: reports, profiles, metrics, the beginning of a journal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from uringmig.storage.publication import PRIVATE, Publication


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, mode: int = PRIVATE) -> Iterator[Publication]:
    """Hold the name of a small file, as its only writer, for the time of a ``with`` block.

    What was not published when the block is left is gone, and the former file is still there.

    Raises:
        StateError: the name cannot be a file's.
        StorageError: the file cannot be made, or another writer holds it.
    """
    publication = Publication(path, sidecar=None, mode=mode)
    try:
        yield publication
    finally:
        publication.discard()


def publish_bytes(path: str | os.PathLike[str], data: bytes, *, mode: int = PRIVATE) -> None:
    """Replace a file by ``data``, durably: a reader finds the former content or all of this.

    Args:
        path: its name.
        data: its new content.
        mode: for whom it is, whatever the umask.

    Raises:
        StateError: the name cannot be a file's.
        StorageError: the file holds its former content.
    """
    with replacing(path, mode=mode) as publication:
        publication.main.write_at(0, data)
        publication.main.sync()
        publication.publish(None)
