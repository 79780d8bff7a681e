"""Passes over a guest's memory: the channels of each, their work, and the buffers of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from uringmig.image.catchup import CatchUpWork, skip_lasting_holes
from uringmig.image.savework import SavedBlock, SaveWork, skip_holes
from uringmig.image.windowview import WindowViews
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.progress import ChannelCounters
from uringmig.transfer.channel import ChannelFile, Pacer, Round, WindowWork, run_round
from uringmig.transfer.plan import Window, windows_of


class Passes:
    """What can be done with the pages of an image, one pass after the other.

    Args:
        shared: the file, and how it is written.
        blocks: of the image.
        options: how to write.
        counters: of each channel.
    """

    def __init__(
        self,
        shared: ChannelFile,
        blocks: list[SavedBlock],
        options: WriteOptions,
        counters: Sequence[ChannelCounters],
    ) -> None:
        self._shared = shared
        self._blocks = blocks
        self._options = options
        self._counters = counters
        self._pacer = Pacer(options.rate)
        self._buffers: list[list[NDArray[np.uint8]]] = [[] for _ in counters]

    def write(self, windows: Sequence[Window], *, first: bool, live: bool) -> Round:
        """Write the pages of ``windows`` that their blocks have selected.

        Args:
            windows: of the blocks.
            first: nothing has been written before.
            live: there will be a `catch_up`.
        """
        if first:
            windows = skip_holes(self._blocks, windows, self._counters[0])
        return self._run(
            windows,
            lambda counters, views: SaveWork(
                self._blocks, self._options, counters, views, live=live
            ),
            self._pacer,
        )

    def catch_up(self, *, paced: bool) -> Round:
        """Write what is not as it was written; not ``paced`` if a guest stands still for it."""
        counts = [block.layout.page_count for block in self._blocks]
        windows = windows_of(counts, window_pages=WINDOW_BYTES // PAGE_SIZE)
        return self._run(
            skip_lasting_holes(self._blocks, windows, self._counters[0]),
            lambda counters, views: CatchUpWork(self._blocks, self._options, counters, views),
            self._pacer if paced else Pacer(0),
        )

    def _run(
        self,
        windows: Sequence[Window],
        make_work: Callable[[ChannelCounters, WindowViews], WindowWork],
        pacer: Pacer,
    ) -> Round:
        """Have every channel do its work; memory is as the blocks have it now."""
        memories = [block.memory for block in self._blocks]
        buffers = iter(self._buffers)
        return run_round(
            self._shared,
            windows,
            lambda counters: make_work(
                counters, WindowViews(memories, self._options, next(buffers))
            ),
            self._counters,
            pacer=pacer,
        )
