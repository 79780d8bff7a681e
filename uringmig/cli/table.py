"""Rows of text with their columns below each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_GAP: Final = "  "


def table_lines(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Lay rows out, each as long as the others.

    Args:
        rows: the first may be a heading; none is no line.
        numbers: all columns but the first are set to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def laid_out(cell: str, column: int) -> str:
        width = widths[column]
        return cell.rjust(width) if numbers and column else cell.ljust(width)

    return [
        _GAP.join(laid_out(cell, column) for column, cell in enumerate(row)).rstrip()
        for row in rows
    ]
