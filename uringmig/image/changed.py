"""What changed since it was written: the second look of a copy in two passes.  Pure.

A guest need not stand still while a disk works. In the first pass everything is written while it
runs, and a digest is kept of each piece of 64 KiB; then it is stopped, and everything is looked at
again: what has another digest now is written once more, and nothing else is. For any tier:

1. First pass, for each window: copy its memory to a buffer of your own, whatever kind of memory it
   is. Zero pages, digests and what is written are taken from that copy and from nothing else.
   Memory that is written from where it lies may change between its digest and the device's read,
   and change back before the second look, which then sees nothing: the image would be wrong.
   Keep ``digest.piecewise_digest(copy, start, length)[1]``, in an array as `pieces.no_digests`.
2. Wait until everything has been written; stop the guest.
3. Second pass, for each window: ``look = look_again(kept, memory, start, length)``, of what may be
   read of it now: holes come and go meanwhile. Memory may lie where it lies, since it stands still.
   Where ``look.changed`` is not empty, write what `SecondLook.pages` says, or the whole window
   where no less can be written, keep ``look.pieces`` in the place of what was kept, and take the
   window's own digest anew. A window that was nothing but hole (`rows_with_data`) and is so now
   need not be looked at.

Digests are xxh3's: a guest that is out to fool them could hide a change from its own image.
"""

from __future__ import annotations

import functools

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from uringmig.image import digest
from uringmig.image.digest import PIECE_BYTES, PIECE_DIGEST_BYTES
from uringmig.image.pieces import ROW_PIECES
from uringmig.options import PAGE_SIZE

_PIECE_PAGES = PIECE_BYTES // PAGE_SIZE


class SecondLook(Struct, frozen=True):
    """A second look at a window.

    Attributes:
        changed: numbers of the window's pieces that are not as they were written; ascending.
        pieces: digests of all its pieces as they are now, see `digest.piece_digests`.
    """

    changed: NDArray[np.int64]
    pieces: NDArray[np.uint8]

    def pages(self, page_count: int) -> NDArray[np.bool_]:
        """Which of the window's pages lie in a piece that changed; one bool each."""
        bits: NDArray[np.bool_] = np.zeros(len(self.pieces), np.bool_)
        bits[self.changed] = True
        return np.repeat(bits, _PIECE_PAGES)[:page_count]


def look_again(
    written: NDArray[np.uint8], memory: NDArray[np.uint8], start: list[int], length: list[int]
) -> SecondLook:
    """Compare a window with what was written of it.

    Args:
        written: digests of its pieces when it was written: uint8, (pieces, `PIECE_DIGEST_BYTES`); a
            row of zeros is a piece of zeros.
        memory: the window as it is now; only what follows of it is read.
        start: of what may be nonzero, in bytes from the window's start; sorted.
        length: of each.
    """
    found = digest.piece_digests(memory, start, length)
    return SecondLook(
        np.flatnonzero((_told(found, len(memory)) != _told(written, len(memory))).any(axis=1)),
        found,
    )


def rows_with_data(written: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which windows of a block were more than hole when they were written; one bool each.

    Args:
        written: digests of all pieces of the block, as `pieces.no_digests`.
    """
    rows = np.arange(0, len(written), ROW_PIECES)
    return np.add.reduceat(written.any(axis=1), rows, dtype=np.int64) > 0


def _told(pieces: NDArray[np.uint8], length_bytes: int) -> NDArray[np.uint8]:
    """The digests of a window's pieces, with that of zeros for those that nobody made."""
    return np.where(pieces.any(axis=1, keepdims=True), pieces, _zeros(length_bytes))


@functools.cache
def _zeros(length_bytes: int) -> NDArray[np.uint8]:
    """Digests of the pieces of a window of zeros."""
    ends = range(0, length_bytes, PIECE_BYTES)
    whole = b"".join(
        digest.zero_digest(min(PIECE_BYTES, length_bytes - at))[:PIECE_DIGEST_BYTES] for at in ends
    )
    return np.frombuffer(whole, np.uint8).reshape(-1, PIECE_DIGEST_BYTES)
