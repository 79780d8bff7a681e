"""The middle of a copy into either tier: rows to channels, with progress and checkpoints.

Whoever waits for the channels makes the checkpoints: the channels go on meanwhile, and a row counts
as done only when all its writes have completed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Final

from uringmig.archive.copyjournal import Chunk
from uringmig.archive.intake import Intake
from uringmig.archive.partialcopy import PartialCopy
from uringmig.archive.tier import CopiedGuest
from uringmig.channel import ChannelFile, WindowWork, run_round
from uringmig.contents.source import Row, window_of
from uringmig.progress import (
    ChannelCounters,
    Phase,
    ProgressCallback,
    take_snapshot,
)
from uringmig.units import MiB

#: What is copied twice after a kill is about this much; a checkpoint costs two flushes of the disk.
CHECKPOINT_BYTES: Final = 256 * MiB


class CopyRun:
    """One copy's channels, counters and journal.

    Args:
        guest: what is known of the memory that was copied.
        partial: the file being written.
        shared: what the channels need to write it.
        progress: called with a `Snapshot` about ten times a second and at every phase.

    Attributes:
        done: rows whose writes have completed and that are in no checkpoint yet; channels append.
        counters: one for each channel.
    """

    def __init__(
        self,
        guest: CopiedGuest,
        partial: PartialCopy,
        shared: ChannelFile,
        progress: ProgressCallback | None,
    ) -> None:
        self.started = time.monotonic()
        self.done: deque[Row] = deque()
        self.counters = [ChannelCounters() for _ in range(shared.options.channels)]
        self._guest = guest
        self._partial = partial
        self._shared = shared
        self._progress = progress
        self._checkpointed_bytes = 0

    def copy(
        self,
        intake: Intake,
        rows: Sequence[Row],
        make_work: Callable[[ChannelCounters], WindowWork],
        chunk_of: Callable[[Row], Chunk],
    ) -> None:
        """Copy ``rows`` and drain.

        Raises:
            UringmigError: the first failure of any channel; the others have stopped and drained.
        """
        # To a channel a window is only a ticket for whichever comes next; the sum is right.
        tickets = [window_of(self._guest.contents.blocks, row) for row in rows]
        self.counters[0].finished_bytes = self.counters[0].scanned_bytes = self._guest.resumed_bytes
        self._checkpointed_bytes = self._guest.resumed_bytes
        try:
            with closing(run_round(self._shared, tickets, make_work, self.counters)) as round_:
                for _ in round_:
                    self.tell("write")
                    self._maybe_checkpoint(chunk_of)
            intake.finish()
        finally:
            intake.close()
        self.tell("write")

    def tell(self, phase: Phase) -> None:
        """Hand a snapshot to whoever looks on."""
        if self._progress is not None:
            self._progress(
                take_snapshot(
                    phase,
                    self.counters,
                    total_bytes=self._guest.memory_bytes,
                    seconds=time.monotonic() - self.started,
                )
            )

    @property
    def written_bytes(self) -> int:
        """Moved to the file."""
        return sum(item.completed_bytes for item in self.counters)

    def _maybe_checkpoint(self, chunk_of: Callable[[Row], Chunk]) -> None:
        """Make a checkpoint if enough has been copied since the last one."""
        if not self._partial.resumable:
            self.done.clear()  # nobody will ask
            return
        finished = sum(item.finished_bytes for item in self.counters)
        if finished - self._checkpointed_bytes < CHECKPOINT_BYTES:
            return
        self._checkpointed_bytes = finished
        rows = [self.done.popleft() for _ in range(len(self.done))]
        self._partial.checkpoint([chunk_of(row) for row in rows])
