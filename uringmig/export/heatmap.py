"""A picture of where two images differ: each block from first page to last, line by line."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from uringmig.errors import HostError, StateError
from uringmig.export.difference import BlockDiff, DiffReport
from uringmig.options import PAGE_SIZE
from uringmig.storage.smallfile import publish_bytes
from uringmig.units import format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS: Final = ("png", "svg", "pdf")
#: Parts of a block in a line of the picture.
_LINE: Final = 64


def check_plot(path: str | os.PathLike[str]) -> None:
    """Refuse what would fail when everything has been compared.

    Raises:
        StateError: the name's suffix is of no picture.
        HostError: matplotlib is not installed.
    """
    if Path(path).suffix[1:] not in _FORMATS:
        raise StateError(f"{os.fspath(path)}: a picture is named .{', .'.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise HostError("a picture needs matplotlib: pip install 'uringmig[report]'")


def plot_diff(report: DiffReport, path: str | os.PathLike[str]) -> None:
    """Draw where two images differ.

    Args:
        report: of the two.
        path: the picture's final name, ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        StateError: the name is of no picture, or cannot be a file's.
        HostError: matplotlib is not installed.
        StorageError: the file holds its former content.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    blocks = [block for block in report.blocks if block.density]
    figure = Figure(figsize=(9, 1.5 + 2 * max(1, len(blocks))), layout="constrained")
    figure.suptitle(f"{Path(report.a).name} and {Path(report.b).name}")
    for number, block in enumerate(blocks):
        _draw(figure, block, number, len(blocks))
    if not blocks:
        figure.text(0.5, 0.4, "the memory is the same", ha="center")
    data = io.BytesIO()
    figure.savefig(data, format=Path(path).suffix[1:])
    publish_bytes(path, data.getvalue())


def _draw(figure: Figure, block: BlockDiff, number: int, count: int) -> None:
    """One block: the share of pages that differ in each part of it."""
    length = max(block.length_a or 0, block.length_b or 0)
    parts = len(block.density)
    share = np.full(-(-parts // _LINE) * _LINE, np.nan)
    # Of whole pages some parts have one more than others.
    share[:parts] = np.minimum(1, np.array(block.density) * parts / (length // PAGE_SIZE))
    axes = figure.add_subplot(count, 1, number + 1)
    picture = axes.imshow(
        share.reshape(-1, _LINE), aspect="auto", cmap="viridis", vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    differing = block.differing_bytes + block.only_a_bytes + block.only_b_bytes
    axes.set_title(f"{block.idstr}: {format_size(differing)} of {format_size(length)} differ")
    axes.set_xticks([])
    axes.set_yticks([])
    line = format_size(length * min(_LINE, parts) // parts)
    axes.set_xlabel(f"{line} a line")
    figure.colorbar(picture, ax=axes, label="share of pages")
