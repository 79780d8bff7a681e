"""A window and the digest that it should have: one comparison, for whoever reads contents."""

from __future__ import annotations

from collections.abc import Sequence

from uringmig.contents.source import WindowRead
from uringmig.errors import MismatchError
from uringmig.image import digest
from uringmig.options import WINDOW_BYTES

#: Of every block in order, the digest of every row, as hex; as a manifest has them.
Digests = Sequence[Sequence[str]]


def window_digest(read: WindowRead) -> bytes:
    """Digest of a window's memory; what may be a hole is not touched."""
    if read.digest is not None:
        return read.digest
    data = read.data
    if data is None or (read.filled and len(data)):
        return digest.window_digest(read.memory)
    return digest.sparse_digest(read.memory, data.start.tolist(), data.length.tolist())


def compare_window(
    read: WindowRead, expected: str, *, block: str, offset: int | None = None, path: str = ""
) -> MismatchError | None:
    """Compare a window with its digest; None is: it is what was saved.

    Args:
        read: the window.
        expected: the digest, hex.
        block: the window's block, for the message.
        offset: where the window is in its file, if it is there in one piece.
        path: the file, where the message would not tell otherwise.
    """
    found = window_digest(read).hex()
    if found == expected:
        return None
    place = f"chunk {read.row} (guest bytes from {read.row * WINDOW_BYTES:#x})"
    return MismatchError(
        f"{path + ': ' if path else ''}contents differ in {place}",
        block=block,
        offset=offset,
        expected=expected,
        found=found,
    )
