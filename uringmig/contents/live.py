"""Contents that lie in memory at hand, this host's: any window may be looked at, at any time.

Files of memory whose guest stands still, or the memory of a QEMU whose guest runs. One that runs is
copied in two passes: everything while it runs, then what has changed, while it stands still.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.source import Contents, WindowRead, row_of
from uringmig.memory.moving import MovingMemory
from uringmig.memory.source import CopiedMemory, Extents, MemorySource
from uringmig.transfer.plan import Window

Memory = MemorySource | CopiedMemory


@runtime_checkable
class LiveContents(Contents, Protocol):
    """Memory that may change for as long as its guest runs; nothing of it is ever resumed.

    Attributes:
        memories: each block's, in their order; may be asked from several threads.
        stopped_seconds: how long its guest stood still for it; 0.0 if it did not run before.
    """

    @property
    def memories(self) -> Sequence[Memory]: ...  # noqa: D102

    @property
    def stopped_seconds(self) -> float: ...  # noqa: D102

    def runs(self) -> bool:
        """Whether the guest runs now, and goes on until `standstill`."""

    def standstill(self) -> AbstractContextManager[None]:
        """Have the guest stand still within the block: what is read there is of one moment.

        Device state and machine are those of that moment, and known only afterwards. A guest that
        ran goes on when the block ends, whatever happened in it.

        Raises:
            PeerError: its guest cannot stand still, or somebody let it go on meanwhile.
        """


class MemoryReader:
    """Looks at windows of memory; may be used by several threads, each with its own buffer.

    Args:
        memories: of each block.
        copied: numbers of the blocks that are only looked at in copies, mapped or not.
    """

    def __init__(self, memories: Sequence[Memory], *, copied: Collection[int] = ()) -> None:
        # Asked once: what a protocol has takes long to find out.
        self._mapped = [memory if isinstance(memory, MemorySource) else None for memory in memories]
        self._memories = list(memories)
        for number in copied:
            mapped, self._mapped[number] = self._mapped[number], None
            if mapped is not None:
                self._memories[number] = MovingMemory(mapped)

    def read(self, window: Window, buffer: NDArray[np.uint8]) -> WindowRead:
        """Look at one window: a view of where it lies, or a copy if it lies elsewhere.

        Args:
            window: of a block.
            buffer: a window long, for a copy; of which only what may be nonzero is written.
        """
        memory, mapped = self._memories[window.block_index], self._mapped[window.block_index]
        first, length = window.start_bytes, window.length_bytes
        found = memory.data_extents(start=first, length=length)
        if mapped is not None:
            for start, count in zip(found.start.tolist(), found.length.tolist(), strict=True):
                mapped.prefault(start=start, length=count)
            view = mapped.view[first : first + length]
        else:
            assert isinstance(memory, CopiedMemory), "memory is either mapped or copied"
            view = buffer[:length]
            memory.read(found, view, start=first)
        data = None
        if found.total_bytes < length:
            data = Extents(found.start - first, found.length.copy())
        return WindowRead(*row_of(window), view, data)
