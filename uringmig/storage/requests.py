"""Descriptors of I/O, shared by planner, transfer and engines: structs of arrays, no behaviour.

One entry is one request: so many bytes between an address in this process and an offset in a
file. Memory is named by address so that guest RAM moves from where it lies; whoever makes a batch
keeps the memory mapped until the completion.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


def _check(arrays: Any) -> None:
    """Assert the invariant of a struct of arrays (1-D, int64, equal length) and freeze it.

    Some ten of these are made for each window of memory, so this is kept short: the names are
    those of the fields, and one shape says both dimension and length.
    """
    shape = None
    for name in arrays.__struct_fields__:
        array = getattr(arrays, name)
        assert array.dtype == np.int64, (name, array.dtype)
        assert array.shape == (shape or (len(array),)), (name, array.shape, shape)
        shape = array.shape
        array.flags.writeable = False


class IoPlan(Struct, frozen=True):
    """Requests not yet issued: ``address``, ``length`` (bytes), ``file_offset``; all int64, 1-D."""

    address: Int64Array
    length: Int64Array
    file_offset: Int64Array

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.length)

    @property
    def total_bytes(self) -> int:
        """Bytes all requests move together."""
        return int(self.length.sum())


_NONE = np.empty(0, np.int64)
#: A plan of no request.
NOTHING: Final = IoPlan(_NONE, _NONE, _NONE)


class IoBatch(Struct, frozen=True):
    """Requests for an engine: as `IoPlan`, and a ``token`` that comes back with the result."""

    address: Int64Array
    length: Int64Array
    file_offset: Int64Array
    token: Int64Array

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.token)


class Completions(Struct, frozen=True):
    """Results from an engine: ``token``, and ``result`` in bytes moved (>= 0) or -errno."""

    token: Int64Array
    result: Int64Array

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.token)
