"""Memory that the process already holds: numpy arrays, mmaps, bytearrays, bytes. Never copied."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import StateError
from uringmig.memory.source import Extents, check_range
from uringmig.options import PAGE_SIZE
from uringmig.units import is_aligned


class BufferMemory:
    """A caller's buffer as a `MemorySource`, and as a `MemorySink` where it is writable.

    It keeps the buffer alive until `close`, and takes all of it for data: holes are not looked for.

    Args:
        buffer: anything with a C-contiguous buffer, of any shape and item size; a positive whole
            number of pages long. O_DIRECT takes it where it lies only if page aligned.

    Raises:
        StateError: the buffer is not contiguous, empty, or not a whole number of pages.
    """

    def __init__(self, buffer: object) -> None:
        self._view: NDArray[np.uint8] | None = _as_bytes(buffer)
        self.length_bytes = len(self._view)
        if self.length_bytes == 0 or not is_aligned(self.length_bytes, PAGE_SIZE):
            raise StateError(
                f"memory of {self.length_bytes} bytes is not a positive multiple of {PAGE_SIZE}"
            )

    @property
    def view(self) -> NDArray[np.uint8]:
        """The buffer as 1-D uint8; read-only if the buffer is."""
        if self._view is None:
            raise StateError("the memory is closed")
        return self._view

    @property
    def address(self) -> int:
        """Address of the first byte; whatever alignment the buffer has."""
        return self.view.ctypes.data

    def data_extents(self, *, start: int, length: int) -> Extents:
        """Give the whole range: any byte of a buffer may be nonzero.

        Raises:
            StateError: the range is not in the memory or not page aligned, or it is closed.
        """
        check_range(start=start, length=length, length_bytes=len(self.view))
        return Extents.from_pairs([(start, start + length)] if length else [])

    def data_bytes(self) -> int:
        """All: any byte of a buffer may be nonzero."""
        return len(self.view)

    def next_data(self, start: int) -> int:
        """Give ``start`` back: any byte of a buffer may be nonzero."""
        check_range(start=start, length=0, length_bytes=len(self.view))
        return start

    def copy_out(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        """See `MemorySource.copy_out`."""
        view = self.view
        for first, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True):
            into[first - start : first - start + length] = view[first : first + length]

    def forget_holes(self) -> None:
        """Do nothing: none is remembered."""

    def prefault(self, *, start: int, length: int) -> None:
        """Do nothing: memory of this process is mapped already, or when it is first read."""

    def map_out(self, *, start: int, length: int) -> None:
        """Do nothing: memory of this process is its own."""

    def close(self) -> None:
        """Let go of the buffer; further calls do nothing."""
        self._view = None


def _as_bytes(buffer: object) -> NDArray[np.uint8]:
    """View a buffer as 1-D uint8 without a copy."""
    try:
        flat = memoryview(buffer)  # type: ignore[arg-type]  # what is no buffer is refused below
        if not flat.c_contiguous:
            raise StateError("the memory's buffer is not C-contiguous")
        if "O" in flat.format:
            # An array of Python objects: guest bytes read into it would be taken for pointers.
            raise StateError("the memory's buffer holds Python objects")
        return np.frombuffer(flat, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise StateError(f"the memory is not a usable buffer: {error}") from error
