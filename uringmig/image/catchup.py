"""The second pass of a save: memory stands still now, and what changed is written once more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uringmig.image import digest
from uringmig.image.changed import look_again, rows_with_data
from uringmig.image.savework import SavedBlock
from uringmig.image.window import Rewritten, settle_window
from uringmig.image.windowview import Holes, WindowView, WindowViews
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.pages import bitmap
from uringmig.progress import ChannelCounters
from uringmig.storage.requests import NOTHING, IoPlan
from uringmig.transfer.plan import Window


class CatchUpWork:
    """One channel's side of the second pass; its windows are of `WINDOW_BYTES`.

    Args:
        blocks: of the image, with the digests of what was written.
        options: how to write.
        counters: the channel's.
        views: how this channel looks at memory.
    """

    def __init__(
        self,
        blocks: list[SavedBlock],
        options: WriteOptions,
        counters: ChannelCounters,
        views: WindowViews,
    ) -> None:
        self._blocks = blocks
        self._options = options
        self._counters = counters
        self._views = views
        self._changed: WindowView | None = None

    @property
    def windows_max(self) -> int:
        """As many as there are buffers."""
        return self._views.windows_max

    def plan(self, window: Window) -> IoPlan:
        """Look at the window, and plan to write the pieces that differ from what was written."""
        block = self._blocks[window.block_index]
        view = self._views.look(window, filled=block.dense)
        kept = block.pieces_of(window.start_bytes)
        again = look_again(kept, view.memory, view.data.start.tolist(), view.data.length.tolist())
        if not len(again.changed):
            self._changed = None
            return NOTHING
        self._changed = view
        kept[:] = again.pieces
        before = bitmap.unpack(
            block.bitmap, first_page=window.first_page, page_count=window.page_count
        )
        nonzero, readable = view.page_bits()
        pages = settle_window(
            nonzero,
            readable,
            dense=block.dense,
            fresh=False,
            later=Rewritten(selected=again.pages(window.page_count), bits=before),
        )
        fewer = int(np.count_nonzero(before)) - int(np.count_nonzero(pages.bits))
        self._counters.zero_bytes += PAGE_SIZE * fewer
        return block.plan_pages(window, pages, view.memory, self._options)

    def submitted(self, window: Window) -> None:
        """Digest a window that changed, while the device has work."""
        view = self._changed
        if view is None or not self._options.manifest:
            return
        whole = digest.sparse_digest(
            view.memory, view.data.start.tolist(), view.data.length.tolist()
        )
        self._blocks[window.block_index].put_digest(window.start_bytes, whole)

    def finished(self, window: Window) -> None:
        """What was written of it is where it belongs."""
        self._views.let_go(window, unmap=False)  # a guest waits


def skip_lasting_holes(
    blocks: Sequence[SavedBlock], windows: Sequence[Window], counters: ChannelCounters
) -> list[Window]:
    """Give back the windows to be looked at again: all but those that were hole, and are.

    An idle guest is mostly holes, and it stands still while this is found out.
    """
    kept = []
    with_data = [rows_with_data(block.pieces) for block in blocks]
    holes = Holes([block.memory for block in blocks])
    for window in windows:
        row = window.start_bytes // WINDOW_BYTES
        if with_data[window.block_index][row] or not holes.cover(window):
            kept.append(window)
            continue
        counters.scanned_bytes += window.length_bytes
        counters.finished_bytes += window.length_bytes
    return kept
