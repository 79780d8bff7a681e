"""Digests of pieces of 64 KiB: which pieces have one, and the table of them in a manifest.  Pure.

A digest of a whole window says that something in 4 MiB is wrong. One of a piece says where, lets a
single page be checked without its window, and tells what changed from one image to the next. A
piece of which no page is set has none: it is zero, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import MismatchError
from uringmig.image.digest import PIECE_BYTES, PIECE_DIGEST_BYTES, zero_digest
from uringmig.options import WINDOW_BYTES
from uringmig.units import div_ceil

ROW_PIECES: Final = WINDOW_BYTES // PIECE_BYTES
#: Of all tables of one manifest: those of a dense TiB. It is held in memory more than once.
TABLES_BYTES_MAX: Final = (1 << 40) // PIECE_BYTES * PIECE_DIGEST_BYTES
#: The bits of a piece's 16 pages are one of these.
_PIECE_BITS: Final = np.uint16


def piece_count(used_length: int) -> int:
    """Pieces of a block; the last one may be shorter."""
    return div_ceil(used_length, PIECE_BYTES)


def no_digests(used_length: int) -> NDArray[np.uint8]:
    """Room for the digests of a block's pieces; memory that is not written to is not used up.

    Returns:
        uint8, (pieces, `PIECE_DIGEST_BYTES`); zero stands for a piece that nobody digested.
    """
    return np.zeros((piece_count(used_length), PIECE_DIGEST_BYTES), np.uint8)


def stored_pieces(packed: NDArray[np.uint8], used_length: int) -> NDArray[np.bool_]:
    """Which pieces of a block have any page that is set: one bool each.

    Args:
        packed: the block's bits, as on disk.
        used_length: of the block.
    """
    stored: NDArray[np.bool_] = packed.view(_PIECE_BITS)[: piece_count(used_length)] != 0
    return stored


def piece_table(made: NDArray[np.uint8], packed: NDArray[np.uint8], used_length: int) -> bytes:
    """The digests of a block's stored pieces, one after the other.

    Args:
        made: of all its pieces, see `no_digests`. One that nobody digested was a hole.
        packed: the block's bits, as on disk.
        used_length: of the block.
    """
    stored = stored_pieces(packed, used_length)
    table = made[stored]
    holes: NDArray[np.bool_] = np.logical_not(table.any(axis=1))
    table[holes] = _zero(PIECE_BYTES)
    if len(holes) and holes[-1] and stored[-1]:
        table[-1] = _zero(used_length - (len(stored) - 1) * PIECE_BYTES)
    return table.tobytes()


def _zero(length_bytes: int) -> NDArray[np.uint8]:
    """Digest of a piece of zeros."""
    return np.frombuffer(zero_digest(length_bytes), np.uint8)[:PIECE_DIGEST_BYTES]


class PieceTable:
    """A block's table as a manifest has it, by row.

    Args:
        table: see `piece_table`.
        packed: the block's bits, as on disk.
        used_length: of the block.
        idstr: of the block, for the message.

    Raises:
        MismatchError: it is not as long as the bits say.
    """

    def __init__(
        self, table: bytes, packed: NDArray[np.uint8], used_length: int, *, idstr: str
    ) -> None:
        self._stored = stored_pieces(packed, used_length)
        rows = div_ceil(len(self._stored), ROW_PIECES)
        counts = np.add.reduceat(self._stored, np.arange(rows) * ROW_PIECES, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(counts)])
        expected = int(self._before[-1]) * PIECE_DIGEST_BYTES
        if len(table) != expected:
            raise MismatchError(
                "length of the manifest's digests of pieces",
                block=idstr, expected=expected, found=len(table),
            )  # fmt: skip
        self._table = np.frombuffer(table, np.uint8).reshape(-1, PIECE_DIGEST_BYTES)

    def differing(self, row: int, found: NDArray[np.uint8]) -> Sequence[int]:
        """The pieces of a row whose digests are not the table's, by their number in the row.

        Args:
            row: of the block.
            found: digests of all pieces of the row: uint8, (pieces, `PIECE_DIGEST_BYTES`).
        """
        first = row * ROW_PIECES
        stored = np.flatnonzero(self._stored[first : first + ROW_PIECES])
        expected = self._table[self._before[row] : self._before[row + 1]]
        numbers: list[int] = stored[(found[stored] != expected).any(axis=1)].tolist()
        return numbers
