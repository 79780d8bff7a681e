"""Reads a source whole by its protocol, touching only what may be touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.source import Contents, Row, all_rows, row_length
from uringmig.options import WINDOW_BYTES

PAGE = 4096


def assert_zero_beside(memory: NDArray[np.uint8], pieces: list[tuple[int, int]]) -> None:
    """Outside the pieces there is nothing left of what the buffer held before."""
    rest = np.ones(len(memory), np.bool_)
    for start, length in pieces:
        rest[start : start + length] = False
    assert not memory[rest].any()


def collect(source: Contents, rows: Sequence[Row] | None = None) -> dict[str, bytes]:
    """Put windows together, touching only what may be touched; each row exactly once."""
    wanted = all_rows(source.blocks) if rows is None else rows
    memory = {block.idstr: bytearray(block.used_length) for block in source.blocks}
    seen = []
    for read in source.windows(wanted):
        seen.append((read.block_index, read.row))
        block = source.blocks[read.block_index]
        assert len(read.memory) == row_length(block, read.row)
        assert read.memory.ctypes.data % PAGE == 0
        pieces = [(0, len(read.memory))]
        if read.data is not None:
            pieces = list(zip(read.data.start.tolist(), read.data.length.tolist(), strict=True))
            if source.kind != "memory":  # nothing else has holes that looking would fill
                assert_zero_beside(read.memory, pieces)
        for start, length in pieces:
            at = read.row * WINDOW_BYTES + start
            memory[block.idstr][at : at + length] = read.memory[start : start + length].data
    assert sorted(seen) == sorted(wanted)
    return {idstr: bytes(data) for idstr, data in memory.items()}
