"""Memory that goes on changing while it is saved: looked at in copies only.

What is looked at where it lies may be another thing a moment later: zero pages, digest and written
bytes would not be those of one another.
"""

from __future__ import annotations

from uringmig.memory.source import MemorySource


class MovingMemory:
    """A `MemorySource` that goes on changing, as a `CopiedMemory`: it is only looked at in copies.

    Args:
        source: stays the caller's.
    """

    def __init__(self, source: MemorySource) -> None:
        self.length_bytes = source.length_bytes
        self.data_extents = source.data_extents
        self.data_bytes = source.data_bytes
        self.next_data = source.next_data
        self.read = source.copy_out
        self.forget_holes = source.forget_holes
