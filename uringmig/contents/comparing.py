"""A window and the digest that it should have: one comparison, for whoever reads contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from uringmig.contents.source import WindowRead
from uringmig.errors import MismatchError
from uringmig.image import digest
from uringmig.image.digest import PIECE_BYTES
from uringmig.image.pieces import PieceTable
from uringmig.options import WINDOW_BYTES

#: Of every block in order, the digest of every row, as hex; as a manifest has them.
Digests = Sequence[Sequence[str]]
_NAMED_MAX: Final = 4


def window_digest(read: WindowRead) -> bytes:
    """Digest of a window's memory; what may be a hole is not touched."""
    if read.digest is not None:
        return read.digest
    data = read.data
    if data is None or (read.filled and len(data)):
        return digest.window_digest(read.memory)
    return digest.sparse_digest(read.memory, data.start.tolist(), data.length.tolist())


def compare_window(
    read: WindowRead,
    expected: str,
    *,
    block: str,
    offset: int | None = None,
    path: str = "",
    table: PieceTable | None = None,
) -> MismatchError | None:
    """Compare a window with its digest; None is: it is what was saved.

    Args:
        read: the window.
        expected: the digest, hex.
        block: the window's block, for the message.
        offset: where the window is in its file, if it is there in one piece.
        path: the file, where the message would not tell otherwise.
        table: of the window's block; it names the pieces that differ, and where the window came
            with digests of its pieces, those of the table are compared too.
    """
    found = window_digest(read).hex()
    same = found == expected
    place = f"chunk {read.row} (guest bytes from {read.row * WINDOW_BYTES:#x})"
    differing: Sequence[int] = ()
    if table is not None and read.pieces is not None:
        differing = table.differing(read.row, read.pieces)
    if same and not differing:
        return None
    what = "contents differ in" if not same else "the manifest is at odds with itself on"
    return MismatchError(
        f"{path + ': ' if path else ''}{what} {place}",
        block=block,
        offset=offset,
        expected=None if same else expected,
        found=None if same else found,
        detail=_pieces(read.row, differing) if differing else None,
    )


def _pieces(row: int, numbers: Sequence[int]) -> str:
    """Name pieces of a row by their guest bytes; the first few, there may be 64."""
    at = [f"{row * WINDOW_BYTES + number * PIECE_BYTES:#x}" for number in numbers]
    more = f" and {len(at) - _NAMED_MAX} more" if len(at) > _NAMED_MAX else ""
    return f"in the 64 KiB from {', '.join(at[:_NAMED_MAX])}{more}"
