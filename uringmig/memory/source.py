"""What guest RAM looks like to the rest: an address, a view, and where it may hold data.

Rules for every source and sink:

- Bytes are named by offset from the beginning of the memory, page aligned; ``address`` is where
  offset 0 lies in this process, page aligned where O_DIRECT is to take it from there.
- Outside `MemorySource.data_extents` all bytes are zero, and the view must not be read there:
  reading a hole of a shared mapping allocates it on the host.
- Views and addresses are good until ``close``. A view that outlives it keeps its memory mapped; an
  address does not.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from uringmig.errors import StateError
from uringmig.options import PAGE_SIZE
from uringmig.units import is_aligned

Int64Array = NDArray[np.int64]


class Extents(Struct, frozen=True):
    """Byte ranges of a memory: sorted, disjoint, never empty; 1-D int64 arrays, made read-only.

    Attributes:
        start: offset of each range from the beginning of the memory, in bytes.
        length: bytes in each range, > 0.
    """

    start: Int64Array
    length: Int64Array

    def __post_init__(self) -> None:
        """Assert the invariants and freeze the arrays."""
        assert self.start.ndim == 1, self.start.shape
        assert self.start.shape == self.length.shape, (self.start.shape, self.length.shape)
        assert self.start.dtype == np.int64, self.start.dtype
        assert self.length.dtype == np.int64, self.length.dtype
        assert (self.length > 0).all()
        assert (self.start[1:] >= (self.start + self.length)[:-1]).all()
        self.start.flags.writeable = False
        self.length.flags.writeable = False

    @classmethod
    def from_pairs(cls, pairs: list[tuple[int, int]]) -> Extents:
        """Make extents of (start, end) pairs, sorted and disjoint; those that touch are joined."""
        if len(pairs) == 1:  # nearly always, for a window of a guest
            [(first, limit)] = pairs
            return cls(np.array([first], np.int64), np.array([limit - first], np.int64))
        bounds = np.array(pairs, np.int64).reshape(-1, 2)
        splits = np.flatnonzero(bounds[1:, 0] > bounds[:-1, 1])
        start = bounds[np.concatenate([[0], splits + 1]), 0] if len(bounds) else bounds[:, 0]
        end = bounds[np.concatenate([splits, [-1]]), 1] if len(bounds) else bounds[:, 1]
        return cls(start.copy(), end - start)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def total_bytes(self) -> int:
        """Bytes in all ranges together."""
        return int(self.length.sum())

    def clip(self, *, start: int, length: int) -> Extents:
        """Keep what lies in ``length`` bytes from ``start`` on; offsets stay the same."""
        first = np.maximum(self.start, start)
        end = np.minimum(self.start + self.length, start + length)
        kept = first < end
        return Extents(first[kept], (end - first)[kept])


@runtime_checkable
class MemorySource(Protocol):
    """Guest RAM to be saved; may be asked from several threads at the same time.

    Attributes:
        length_bytes: size, a whole number of pages.
        address: where offset 0 lies in this process.
        view: the whole memory, 1-D uint8 of ``length_bytes``; may be read-only.
    """

    @property
    def length_bytes(self) -> int: ...  # noqa: D102

    @property
    def address(self) -> int: ...  # noqa: D102

    @property
    def view(self) -> NDArray[np.uint8]: ...  # noqa: D102

    def data_extents(self, *, start: int, length: int) -> Extents:
        """Say where in ``length`` bytes from ``start`` on bytes may be nonzero; page aligned.

        What is a hole now may have data a moment later, if the memory changes meanwhile; and what
        was found to be data may be told from memory until `forget_holes`.

        Raises:
            StateError: the range is not in the memory or not page aligned, or it is closed.
            StorageError: the kernel refused to tell.
        """

    def data_bytes(self) -> int:
        """Count the bytes that may be nonzero: for plans, so the memory may change meanwhile.

        What it costs, in time and in memory, is not to grow with the number of extents.

        Raises:
            StateError: it is closed.
            StorageError: the kernel refused to tell.
        """

    def next_data(self, start: int) -> int:
        """Say from where on bytes may be nonzero: ``start``, or the end of the hole it lies in.

        Raises:
            StateError: ``start`` is not in the memory or not page aligned, or it is closed.
            StorageError: the kernel refused to tell.
        """

    def copy_out(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        """Copy ``extents`` as `CopiedMemory.read` does; the memory may change meanwhile.

        What has become a hole since is zeros, and stays a hole.

        Raises:
            StateError: it is closed.
            StorageError: the memory cannot be read.
        """

    def forget_holes(self) -> None:
        """Ask anew where data is from now on: the memory has changed since."""

    def prefault(self, *, start: int, length: int) -> None:
        """Map pages in that will be read, all at once: cheaper than a fault for every few.

        It only saves time: reading works without it, too. Must not be called for a hole, which it
        would allocate.
        """

    def map_out(self, *, start: int, length: int) -> None:
        """Unmap pages that are done with; reading them works as before, and maps them in anew.

        It only saves time: `close` would have to unmap them all, when there is nothing else to do.
        """

    def close(self) -> None:
        """Let go of the memory; further calls do nothing."""


@runtime_checkable
class CopiedMemory(Protocol):
    """Guest RAM to be saved that lies elsewhere, and is copied to be looked at.

    Otherwise as a `MemorySource`: bytes are named by offset from the beginning, and outside
    `data_extents` all are zero and not to be read. May be asked from several threads.

    Attributes:
        length_bytes: size, a whole number of pages.
    """

    @property
    def length_bytes(self) -> int: ...  # noqa: D102

    def data_extents(self, *, start: int, length: int) -> Extents:
        """Say where in ``length`` bytes from ``start`` on bytes may be nonzero; page aligned."""

    def data_bytes(self) -> int:
        """Count the bytes that may be nonzero; see `MemorySource.data_bytes`."""

    def next_data(self, start: int) -> int:
        """Say from where on bytes may be nonzero: ``start``, or the end of the hole it lies in."""

    def read(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        """Copy ``extents`` to where they belong in a window that begins at ``start``.

        Args:
            extents: within the window, as `data_extents` gave them.
            into: the window, 1-D uint8, writable; what is not in an extent stays as it is.
            start: offset of the window's first byte in the memory.
        """

    def forget_holes(self) -> None:
        """Ask anew where data is from now on: the memory has changed since."""


@runtime_checkable
class MemorySink(Protocol):
    """Guest RAM to be filled.

    Attributes:
        length_bytes: size, a whole number of pages.
        address: where offset 0 lies in this process.
        view: the whole memory, 1-D uint8 of ``length_bytes``, writable.
    """

    @property
    def length_bytes(self) -> int: ...  # noqa: D102

    @property
    def address(self) -> int: ...  # noqa: D102

    @property
    def view(self) -> NDArray[np.uint8]: ...  # noqa: D102

    def close(self) -> None:
        """Let go of the memory; further calls do nothing."""


def check_range(*, start: int, length: int, length_bytes: int) -> None:
    """Refuse a byte range that is not made of whole pages of a memory of ``length_bytes``.

    Raises:
        StateError: names the range and the rule.
    """
    if not is_aligned(start, PAGE_SIZE) or not is_aligned(length, PAGE_SIZE):
        raise StateError(f"range {start:#x} + {length:#x} is not made of pages of {PAGE_SIZE}")
    if start < 0 or length < 0 or start + length > length_bytes:
        raise StateError(f"range {start:#x} + {length:#x} is not in memory of {length_bytes:#x}")
