"""What becomes of the pages of one window, for whoever writes an image.  Pure.

A set bit stands over bytes that this save puts into the page's slot, or knows to be there. Only of
a slot that is fresh, a hole of a file that was emptied for this save, is it known that it reads as
zeros: in any other may lie what an earlier round wrote, or an interrupted copy, or what was shared
with an earlier image.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from uringmig.pages.runs import PageRuns, runs_from_bits
from uringmig.transfer.plan import bridge_gaps, gap_pages


class Rewritten(Struct, frozen=True):
    """Of a later round: the pages it is asked for, and all pages' bits until now; bool arrays."""

    selected: NDArray[np.bool_]
    bits: NDArray[np.bool_]


class WindowPages(Struct, frozen=True):
    """Pages of one window; bool arrays, one a page.

    Attributes:
        bits: as the bitmap is to have them.
        stored: pages whose bytes have to get into their slots.
        bridgeable: pages that may be written along.
    """

    bits: NDArray[np.bool_]
    stored: NDArray[np.bool_]
    bridgeable: NDArray[np.bool_]

    def runs(self, bridge_bytes: int) -> PageRuns:
        """What to write: the stored pages, gaps of less than ``bridge_bytes`` written through."""
        return runs_from_bits(
            bridge_gaps(self.stored, bridgeable=self.bridgeable, gap_pages=gap_pages(bridge_bytes))
        )


def settle_window(
    nonzero: NDArray[np.bool_],
    readable: NDArray[np.bool_],
    *,
    dense: bool,
    fresh: bool,
    later: Rewritten | None = None,
) -> WindowPages:
    """Decide which bits are set, which pages are written, and which may be.

    Args:
        nonzero: pages that hold anything but zeros.
        readable: pages that may be read; the others are holes of the memory, and zero.
        dense: every page has its bit set, zero or not.
        fresh: every slot reads as zeros, so that holes of a dense window need no write. Otherwise
            they are written too: their memory must be such that it may be read after all.
        later: a round after the first; pages that it is not asked for keep bits and bytes, and are
            not even written along.
    """
    bits = stored = nonzero
    bridgeable = readable
    if dense:
        bits = np.ones_like(nonzero)
        stored = readable if fresh else bits
    if later is not None:
        bits = np.where(later.selected, bits, later.bits)
        stored = stored & later.selected
        bridgeable = bridgeable & later.selected
    return WindowPages(bits, stored, bridgeable)
