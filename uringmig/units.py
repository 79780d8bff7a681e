"""Sizes in bytes: names, rounding, and text both ways.  Division says which way it rounds."""

from __future__ import annotations

import re
from typing import Final

from uringmig.errors import StateError

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

_FACTORS: Final = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


def div_ceil(dividend: int, divisor: int) -> int:
    """Divide, rounding up."""
    return -(-dividend // divisor)


def align_up(value: int, alignment: int) -> int:
    """Round up to the next multiple of ``alignment``."""
    return div_ceil(value, alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    """Round down to a multiple of ``alignment``."""
    return value - value % alignment


def is_aligned(value: int, alignment: int) -> bool:
    """Say whether ``value`` is a multiple of ``alignment``."""
    return value % alignment == 0


def parse_size(text: str) -> int:
    """Read ``4096``, ``512K``, ``1MiB`` or ``1.5G`` (powers of 1024) as bytes.

    Raises:
        StateError: the text is not a size in whole bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise StateError(f"not a size: {text!r} (write for example 4096, 512K, 1M, 2G)")
    size = float(match[1]) * _FACTORS[match[2].upper()]
    if size != int(size):
        raise StateError(f"not a whole number of bytes: {text!r}")
    return int(size)


def format_size(size_bytes: float) -> str:
    """Write a byte count for people: ``512 B``, ``1.5 KiB``, ``2.0 GiB``."""
    for unit, factor in (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"
