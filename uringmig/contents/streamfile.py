"""Contents written as a file that is one plain stream; it appears whole or not at all."""

from __future__ import annotations

import os
from contextlib import closing

from uringmig.contents.source import Contents
from uringmig.contents.streaming import plain_pieces
from uringmig.image import manifest
from uringmig.image.draft import Durable, make_durable
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.progress import ProgressCallback, Teller
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.imagetarget import NamedTarget
from uringmig.storage.mainfile import MainFile
from uringmig.units import align_down


def write_stream(
    contents: Contents,
    out: str | os.PathLike[str],
    *,
    options: WriteOptions,
    progress: ProgressCallback | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Write a plain stream, which any QEMU loads.

    Args:
        contents: opened by the caller, and stays the caller's.
        out: the file's final name; a manifest beside a former file goes.
        options: how to write.
        progress: called with a `Snapshot` about ten times a second.

    Returns:
        Bytes of the file, and what the operator should know, one line each.

    Raises:
        FormatError: the contents break a rule of their format.
        MismatchError: the source is not what its manifest says, or was changed meanwhile.
        StorageError: reading or writing failed; nothing is published.
    """
    target = NamedTarget(out, mode=options.direct, sidecar_suffix=manifest.SUFFIX)
    try:
        file = _StreamFile(target, contents, progress)
        with closing(plain_pieces(contents)) as pieces:
            for piece in pieces:
                file.append(piece)
        durable = file.finish()
        size = target.main.size
        durable.publish(None)
    finally:
        target.close()
    return size, target.notes


class _StreamFile:
    """A file written from its beginning to its end, in whole windows, without the page cache."""

    def __init__(
        self, target: NamedTarget, contents: Contents, progress: ProgressCallback | None
    ) -> None:
        self._target = target
        self._direct = MainFile(target.direct.fd, target.path)
        self._total_bytes = contents.stored_bytes()
        self._teller = Teller(progress, total_bytes=self._total_bytes)
        self._buffer = aligned_buffer(WINDOW_BYTES)
        self._filled = 0
        self._written = 0

    def append(self, piece: memoryview) -> None:
        """Add a piece; it is copied.

        Raises:
            StorageError: a write failed.
        """
        while len(piece):
            count = min(len(piece), len(self._buffer) - self._filled)
            self._buffer.data[self._filled : self._filled + count] = piece[:count]
            self._filled += count
            piece = piece[count:]
            if self._filled == len(self._buffer):
                self._flush(self._filled)
                self._filled = 0

    def finish(self) -> Durable:
        """Write the rest and make all of it durable.

        Raises:
            StorageError: nothing may be said to be safe after this.
        """
        whole = align_down(self._filled, PAGE_SIZE)
        self._flush(whole)
        main = self._target.main
        main.write_at(self._written, self._buffer[whole : self._filled].data)
        return make_durable(main, self._teller.tell, self._target.publish)

    def _flush(self, length: int) -> None:
        """Write the beginning of the buffer."""
        self._direct.write_at(self._written, self._buffer[:length].data)
        self._written += length
        counters = self._teller.counters
        counters.completed_bytes = self._written
        counters.finished_bytes = min(self._written, self._total_bytes)
        self._teller.tell("write", now=False)
