"""A position in bytes that may not all be there yet.

Rules: a read that lacks bytes raises `StarvedError` and the caller starts its item again when more
have come, so an item is read whole or not at all. Every read knows the absolute offset it is at.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from uringmig.errors import FormatError

BE32: Final = Struct(">I")
BE64: Final = Struct(">Q")


class StarvedError(Exception):
    """An item goes on past the bytes at hand; never leaves this folder."""


class Cursor:
    """Reads big-endian fields from ``data``.

    Attributes:
        position: index into ``data`` of the next byte.
        offset: absolute offset of the next byte in the stream or file.
    """

    __slots__ = ("_data", "_origin", "position")

    def __init__(self, data: bytes | bytearray, *, offset: int, position: int = 0) -> None:
        """Begin at ``data[position]``, which lies at absolute ``offset``."""
        self._data = data
        self._origin = offset - position
        self.position = position

    @property
    def offset(self) -> int:
        """Absolute offset of the next byte."""
        return self._origin + self.position

    def peek(self, byte_count: int) -> bytes:
        """Return the next bytes without moving.

        Raises:
            StarvedError: they are not all there.
        """
        end = self.position + byte_count
        if end > len(self._data):
            raise StarvedError
        return bytes(self._data[self.position : end])

    def ahead(self, byte_count: int) -> bytes:
        """Return the next bytes without moving, or as many of them as are there."""
        return bytes(self._data[self.position : self.position + byte_count])

    def take(self, byte_count: int) -> bytes:
        """Return the next bytes and move past them.

        Raises:
            StarvedError: they are not all there; the position has not moved.
        """
        data = self.peek(byte_count)
        self.position += byte_count
        return data

    def u8(self) -> int:
        """Read one byte."""
        return self.take(1)[0]

    def be32(self) -> int:
        """Read 32 bits."""
        value: int = BE32.unpack(self.take(4))[0]
        return value

    def be64(self) -> int:
        """Read 64 bits."""
        value: int = BE64.unpack(self.take(8))[0]
        return value

    def lstr(self, what: str) -> str:
        """Read a length byte and a name of that length.

        Raises:
            FormatError: the name is empty, or not printable ASCII as all of QEMU's are.
            StarvedError: it is not all there.
        """
        at = self.offset
        return printable(self.take(self.u8()), what=what, at=at)


def printable(raw: bytes, *, what: str, at: int) -> str:
    """Decode a name: ASCII from space to tilde, at least one character.

    Raises:
        FormatError: ``what`` at ``at`` is something else.
    """
    if not raw:
        raise FormatError(f"{what} is empty", offset=at, found=0, expected="1 or more characters")
    if not (raw.isascii() and (text := raw.decode("ascii")).isprintable()):
        raise FormatError(f"{what} is not text", offset=at, expected="printable ASCII", found=raw)
    return text
