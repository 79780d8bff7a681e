"""What every opened source gives: blocks, device state, and memory window by window.

Rules for every source:

- A row is `WINDOW_BYTES` of one block, the last one of a block may be shorter; rows are asked for
  in any number and order, and each comes once, in any order.
- The memory of a window is good until the next one is asked for, unless it was exchanged; at most
  one is out at a time.
- Closing the iterator, or an error in whoever uses it, ends the reading ahead; the source stays
  usable. One iterator at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import StateError
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.image.guestfacts import GuestFacts
from uringmig.memory.source import Extents
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.transfer.plan import Window
from uringmig.units import div_ceil

#: Block index and row: names one window of a guest's memory.
Row = tuple[int, int]

_WINDOW_PAGES = WINDOW_BYTES // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class ContentsBlock:
    """One ramblock: its name and its size in bytes."""

    idstr: str
    used_length: int

    @property
    def row_count(self) -> int:
        """Rows of the block; the last one may be shorter than a window."""
        return div_ceil(self.used_length, WINDOW_BYTES)


@dataclass(frozen=True, slots=True)
class WindowRead:
    """One window's memory.

    Attributes:
        block_index: of the source's ``blocks``.
        row: of the block.
        memory: uint8, page aligned, as long as the window; may be read-only.
        data: what may be nonzero, in bytes from the window's start; None is all of it. Everything
            else is zero, and must not be touched unless ``filled``: it may be a hole of shared
            memory.
        digest: of the memory, if the channel that read it made one. Of contents that were opened
            only to be compared, ``memory`` is empty then.
        pieces: with ``digest``, the digests of the window's pieces, see `digest.piecewise_digest`.
        filled: ``memory`` is a buffer with zeros where no data is: all may be read.
        exchange: keeps the memory without a copy. Call it with a buffer of your own: it returns the
            buffer that the memory lies in, which is yours then, and takes yours in its place. It
            returns None if yours does not fit; then the memory goes with the next window as ever.
    """

    block_index: int
    row: int
    memory: NDArray[np.uint8]
    data: Extents | None
    filled: bool = False
    digest: bytes | None = None
    pieces: NDArray[np.uint8] | None = None
    exchange: Callable[[NDArray[np.uint8]], NDArray[np.uint8] | None] | None = None


class Contents(Protocol):
    """A guest's memory and device state, whatever they are read from; a context manager.

    Attributes:
        kind: ``mapped-ram``, ``plain``, ``libvirt``, ``memory`` or ``cold``.
        path: the file, or the first of several.
        configuration: as the mapped-ram image to be written names it: its capabilities are exactly
            ``mapped-ram``.
        section_id: of the ram section, which the device state names too.
        blocks: in the order of the stream.
        notes: what the operator should know, one line each.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> str: ...  # noqa: D102

    @property
    def configuration(self) -> Configuration: ...  # noqa: D102

    @property
    def section_id(self) -> int: ...  # noqa: D102

    @property
    def blocks(self) -> tuple[ContentsBlock, ...]: ...  # noqa: D102

    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def device_state(self) -> DeviceState:
        """Everything after ram's START section, as a mapped-ram image has it."""

    def guest(self) -> GuestFacts | None:
        """The machine, as the QEMU that ran it described it, if that is known; may add a note."""

    def stored_bytes(self) -> int:
        """Bytes in pages not known to be zero: an estimate, for plans."""

    def fingerprint(self) -> str:
        """Text that changes whenever the source may have changed since it was opened before."""

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """Read rows, ahead of whoever takes them; memory is bounded and the page cache kept clean.

        Raises:
            StateError: a row that the source does not have, or it is closed.
            FormatError: the file ends inside a page, or breaks another rule.
            MismatchError: the file changed while it was read.
            StorageError: a read failed.
        """

    def close(self) -> None:
        """Let go of files and memory; further calls do nothing."""


def each_row(blocks: Sequence[ContentsBlock]) -> Iterator[Row]:
    """Every row of every block, in their order."""
    return ((number, row) for number, block in enumerate(blocks) for row in range(block.row_count))


def all_rows(blocks: Sequence[ContentsBlock]) -> list[Row]:
    """As `each_row`, all at once."""
    return list(each_row(blocks))


def row_length(block: ContentsBlock, row: int) -> int:
    """Bytes of a row of a block."""
    return min(WINDOW_BYTES, block.used_length - row * WINDOW_BYTES)


def window_of(blocks: Sequence[ContentsBlock], row: Row) -> Window:
    """The window that a row names.

    Raises:
        StateError: there is no such block or row.
    """
    block_index, number = row
    if not (0 <= block_index < len(blocks) and 0 <= number < blocks[block_index].row_count):
        raise StateError(f"no row {number} of block {block_index}")
    length = row_length(blocks[block_index], number)
    return Window(block_index, number * _WINDOW_PAGES, length // PAGE_SIZE)


def row_of(window: Window) -> Row:
    """The row that a window is."""
    return window.block_index, window.first_page // _WINDOW_PAGES
