"""Sizes in bytes, durations: names, rounding, text both ways.  Division says how it rounds."""

from __future__ import annotations

import re
from typing import Final

from uringmig.errors import StateError

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

_FACTORS: Final = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
#: Twenty digits are more than any file has bytes, and few enough to be worked with exactly.
_SIZE: Final = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")


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
    whole, _, part = match[1].partition(".")
    factor = _FACTORS[match[2].upper()]
    size, rest = divmod(int(whole + part) * factor, int("1" + "0" * len(part)))
    if rest:
        raise StateError(f"not a whole number of bytes: {text!r}")
    return size


def format_size(size_bytes: float) -> str:
    """Write a byte count for people: ``512 B``, ``1.5 KiB``, ``2.0 GiB``."""
    for unit, factor in (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def parse_duration(text: str) -> float:
    """Read ``90s``, ``30m``, ``1.5h`` or ``1h30m`` as seconds; ``0`` needs no unit.

    Raises:
        StateError: the text is not a duration.
    """
    text = text.strip()
    if text == "0":
        return 0.0
    if _DURATION.fullmatch(text) is None:
        raise StateError(f"not a duration: {text!r} (write for example 90s, 30m, 1h30m)")
    parts = re.findall(r"([\d.]+)([smhd])", text)
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """Write seconds for people: ``4.2 s``, ``3m05s``, ``2h07m``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{left:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m"
