"""Memory written to a file at the places where a format has it; what is zero stays a hole.

Read ahead by the contents' channels, written by ours, both with O_DIRECT where it can be had. Only
rows that have a place in the file are read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.archive.intake import Intake, TakenWindow
from uringmig.contents.source import Contents, Row, window_of
from uringmig.export.guestmap import Segment
from uringmig.export.vmcoreinfo import VmcoreinfoSearch
from uringmig.image.draft import Durable, make_durable
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.pages.runs import runs_from_bits
from uringmig.progress import ChannelCounters, Phase, ProgressCallback, take_snapshot
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.imagetarget import NamedTarget
from uringmig.storage.requests import NOTHING, IoPlan
from uringmig.transfer.channel import ChannelFile, run_round
from uringmig.transfer.plan import Window, bridge_gaps, gap_pages, plan_runs

_WINDOW_PAGES: Final = WINDOW_BYTES // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages of one row that go to one place.

    Attributes:
        first_page: of the row.
        page_count: not zero.
        file_offset: of the first page.
    """

    first_page: int
    page_count: int
    file_offset: int


def pieces_of(segments: Sequence[Segment], offsets: Sequence[int]) -> dict[Row, list[Piece]]:
    """Cut segments at the bounds of rows.

    Args:
        segments: each of whole pages.
        offsets: of each in the file.
    """
    found: dict[Row, list[Piece]] = defaultdict(list)
    for one, at in zip(segments, offsets, strict=True):
        offset, end = one.offset, one.offset + one.length
        while offset < end:
            row, within = divmod(offset, WINDOW_BYTES)
            length = min(WINDOW_BYTES - within, end - offset)
            piece = Piece(within // PAGE_SIZE, length // PAGE_SIZE, at + offset - one.offset)
            found[one.block_index, row].append(piece)
            offset += length
    return dict(found)


class PlacedCopy:
    """One file of placed memory on its way.

    Args:
        contents: what is copied.
        target: its file, of the caller's.
        pieces: which pages go where.
        size: of the whole file in bytes.
        options: how to write.
        engine: with what.
        progress: called with a `Snapshot` about ten times a second and at every phase.
        search: looks at every page on its way.

    Attributes:
        counters: one for each channel.
    """

    def __init__(
        self,
        contents: Contents,
        target: NamedTarget,
        pieces: dict[Row, list[Piece]],
        *,
        size: int,
        options: WriteOptions,
        engine: EngineChoice,
        progress: ProgressCallback | None,
        search: VmcoreinfoSearch | None,
    ) -> None:
        self.counters = [ChannelCounters() for _ in range(options.channels)]
        self._contents = contents
        self._target = target
        self._pieces = pieces
        self._options = options
        self._progress = progress
        self._search = search
        self._started = time.monotonic()
        self._tickets = [window_of(contents.blocks, row) for row in sorted(pieces)]
        self._total_bytes = sum(window.length_bytes for window in self._tickets)
        self._shared = ChannelFile(
            file=target.direct,
            path=target.path,
            operation=Operation.WRITE,
            engine=engine,
            options=options,
            bounce=False,
        )
        target.main.set_size(size)

    def run(self) -> None:
        """Copy everything, and drain.

        Raises:
            UringmigError: the first failure of any channel; the others have stopped and drained.
        """
        intake = Intake(self._contents, sorted(self._pieces))
        try:
            with closing(
                run_round(
                    self._shared,
                    self._tickets,
                    lambda counters: _PlacedWork(
                        intake, self._pieces, self._options, counters, self._search
                    ),
                    self.counters,
                )
            ) as round_:
                for _ in round_:
                    self._tell("write")
            intake.finish()
        finally:
            intake.close()
        self._tell("write")

    def finish(self, heads: Sequence[tuple[int, bytes]]) -> Durable:
        """Write what is not memory, and make all of it durable.

        Args:
            heads: offset and bytes of each piece.

        Raises:
            StorageError: nothing may be said to be safe after this.
        """
        for offset, data in heads:
            self._target.main.write_at(offset, data)
        return make_durable(self._target.main, self._tell, self._target.publish)

    def _tell(self, phase: Phase) -> None:
        """Hand a snapshot to whoever looks on."""
        if self._progress is not None:
            self._progress(
                take_snapshot(
                    phase,
                    self.counters,
                    total_bytes=self._total_bytes,
                    seconds=time.monotonic() - self._started,
                )
            )


class _PlacedWork:
    """One channel's side: takes a window in, and writes its pages wherever they have a place."""

    def __init__(
        self,
        intake: Intake,
        pieces: dict[Row, list[Piece]],
        options: WriteOptions,
        counters: ChannelCounters,
        search: VmcoreinfoSearch | None,
    ) -> None:
        self.windows_max = options.windows_held
        self._intake = intake
        self._pieces = pieces
        self._options = options
        self._counters = counters
        self._search = search
        self._free = [aligned_buffer(WINDOW_BYTES) for _ in range(self.windows_max + 1)]
        self._open: dict[Window, TakenWindow] = {}

    def plan(self, window: Window) -> IoPlan:
        """Take in whichever window comes next, and plan the writes of its pages."""
        held = self._open[window] = self._intake.take(self._free.pop())
        nonzero = held.nonzero()
        self._counters.zero_bytes += PAGE_SIZE * int(np.count_nonzero(~nonzero))
        if not nonzero.any():
            return NOTHING
        if self._search is not None:
            self._search.look(held.memory, nonzero)
        wanted = bridge_gaps(
            nonzero, bridgeable=held.readable(), gap_pages=gap_pages(self._options.bridge)
        )
        plans = [self._plan_piece(held, wanted, piece) for piece in self._pieces[held.row]]
        if len(plans) == 1:
            return plans[0]
        return IoPlan(
            address=np.concatenate([plan.address for plan in plans]),
            length=np.concatenate([plan.length for plan in plans]),
            file_offset=np.concatenate([plan.file_offset for plan in plans]),
        )

    def submitted(self, window: Window) -> None:
        """Nothing can be done beside the device."""

    def finished(self, window: Window) -> None:
        """The window's pages are where they belong."""
        self._free.append(self._open.pop(window).buffer)

    def _plan_piece(self, held: TakenWindow, wanted: NDArray[np.bool_], piece: Piece) -> IoPlan:
        """Plan the writes of one piece's pages."""
        pages = slice(piece.first_page, piece.first_page + piece.page_count)
        return plan_runs(
            runs_from_bits(wanted[pages]),
            address=held.memory.ctypes.data + piece.first_page * PAGE_SIZE,
            file_offset=piece.file_offset,
            block_size=self._options.block_size,
        )
