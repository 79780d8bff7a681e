"""Digests of memory, one for each window of a block, and of the main stream.

xxh3-128: not against an adversary, but it keeps pace with memory. Holes and zero pages count as the
zero bytes they stand for, so a digest is that of the guest's memory, however it was stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from uringmig.options import WINDOW_BYTES
from uringmig.units import KiB, div_ceil

ALGORITHM: Final = "xxh3-128"
DIGEST_BYTES: Final = 16
#: What has a digest of its own besides its window's.
PIECE_BYTES: Final = 64 * KiB
#: So much is kept of a piece's digest: 16 letters of a manifest's text, 256 KiB for a GiB. A piece
#: is only ever compared with what it was, for which 96 bits are as good as 128.
PIECE_DIGEST_BYTES: Final = 12

_ZEROS: Final = bytes(WINDOW_BYTES)
#: Pieces that are digested one by one, and then together for the window, from the cache: of more
#: than a few the second look would go to memory, and with one at a time Python has more to do.
_GROUP_BYTES: Final = 4 * PIECE_BYTES


@functools.cache
def zero_digest(length_bytes: int) -> bytes:
    """Digest of ``length_bytes`` zero bytes, at most a window."""
    return xxhash.xxh3_128_digest(memoryview(_ZEROS)[:length_bytes])


def window_digest(memory: NDArray[np.uint8]) -> bytes:
    """Digest of one window; the GIL is released meanwhile."""
    return xxhash.xxh3_128_digest(memory.data)


def sparse_digest(memory: NDArray[np.uint8], start: list[int], length: list[int]) -> bytes:
    """Digest of a window of which only the given extents (bytes, sorted) may be read.

    Everything else is a hole: zero, and not to be touched.
    """
    if not start:
        return zero_digest(len(memory))
    if length[0] == len(memory):
        return window_digest(memory)
    state = xxhash.xxh3_128()
    at = 0
    for first, count in zip(start, length, strict=True):
        state.update(memoryview(_ZEROS)[: first - at])
        state.update(memory[first : first + count].data)
        at = first + count
    state.update(memoryview(_ZEROS)[: len(memory) - at])
    return state.digest()


def piecewise_digest(
    memory: NDArray[np.uint8], start: list[int], length: list[int]
) -> tuple[bytes, NDArray[np.uint8]]:
    """As `sparse_digest`, and with it the digests of the window's pieces, as `piece_digests`."""
    state = xxhash.xxh3_128()
    found: list[bytes] = []
    for group, length_bytes in _groups(memory, start, length):
        found += _of_pieces(group, length_bytes)
        state.update(memoryview(_ZEROS)[:length_bytes] if group is None else group)
    return state.digest(), _table(found)


def piece_digests(
    memory: NDArray[np.uint8], start: list[int], length: list[int]
) -> NDArray[np.uint8]:
    """Digests of a window's pieces, of which only the given extents (bytes, sorted) may be read.

    Returns:
        Of each `PIECE_BYTES` the first bytes of its digest: uint8, (pieces, `PIECE_DIGEST_BYTES`).
        Where all around a piece is a hole too, it may be zero instead.
    """
    found: list[bytes] = []
    for group, length_bytes in _groups(memory, start, length):
        found += _of_pieces(group, length_bytes)
    return _table(found)


def _groups(
    memory: NDArray[np.uint8], start: list[int], length: list[int]
) -> Iterator[tuple[memoryview | None, int]]:
    """A window, `_GROUP_BYTES` at a time, with zeros in its holes; None is nothing but hole."""
    count = 0
    for at in range(0, len(memory), _GROUP_BYTES):
        end = min(at + _GROUP_BYTES, len(memory))
        while count < len(start) and start[count] + length[count] <= at:
            count += 1
        if count == len(start) or start[count] >= end:
            yield None, end - at
        elif start[count] > at or start[count] + length[count] < end:
            yield _filled(memory, at, end, start[count:], length[count:]).data, end - at
        else:
            yield memory[at:end].data, end - at


def _of_pieces(group: memoryview | None, length_bytes: int) -> list[bytes]:
    """Digests of the pieces of a group."""
    if group is None:
        return [bytes(DIGEST_BYTES)] * div_ceil(length_bytes, PIECE_BYTES)
    return [
        xxhash.xxh3_128_digest(group[first : first + PIECE_BYTES])
        for first in range(0, length_bytes, PIECE_BYTES)
    ]


def _table(found: list[bytes]) -> NDArray[np.uint8]:
    """What is kept of each digest."""
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST_BYTES)[
        :, :PIECE_DIGEST_BYTES
    ]


def _filled(
    memory: NDArray[np.uint8], at: int, end: int, start: list[int], length: list[int]
) -> NDArray[np.uint8]:
    """Memory from ``at`` to ``end``, with zeros where it may not be read."""
    filled = np.zeros(end - at, np.uint8)
    for first, count in zip(start, length, strict=True):
        if first >= end:
            break
        low, high = max(first, at), min(first + count, end)
        filled[low - at : high - at] = memory[low:high]
    return filled


def bytes_digest(data: bytes | memoryview) -> bytes:
    """Digest of any bytes; the GIL is released meanwhile."""
    return xxhash.xxh3_128_digest(data)


def content_digest(
    *, machine: str, blocks: Iterable[tuple[str, int, Sequence[bytes]]], device_state: bytes
) -> str:
    """Digest of a whole guest, however it is stored: equal for every tier of an archive; hex.

    Args:
        machine: machine type.
        blocks: idstr, used_length in bytes and the digests of all windows, in the image's order.
        device_state: everything after ram's START section.
    """
    state = xxhash.xxh3_128()

    def add(data: bytes) -> None:
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)

    add(machine.encode())
    for idstr, used_length, digests in blocks:
        add(idstr.encode())
        add(used_length.to_bytes(8, "big"))
        add(b"".join(digests))
    add(device_state)
    return state.hexdigest()


class StreamDigest:
    """Digest of the main stream's pieces in file order: offset, length and bytes of each."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, offset: int, data: bytes | memoryview) -> None:
        """Add the piece at ``offset``."""
        self._state.update(offset.to_bytes(8, "big") + len(data).to_bytes(8, "big"))
        self._state.update(data)

    def hexdigest(self) -> str:
        """The digest of all pieces so far, as hex."""
        return self._state.hexdigest()
