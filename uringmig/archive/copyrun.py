"""What a copy does for either tier: rows to channels, with progress and checkpoints; its end.

Whoever waits for the channels makes the checkpoints: the channels go on meanwhile, and a row counts
as done only when all its writes have completed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Final

from uringmig.archive.copied import CopiedGuest, TierResult
from uringmig.archive.copyjournal import Chunk
from uringmig.archive.intake import WindowIntake
from uringmig.archive.partialcopy import PartialCopy
from uringmig.contents.live import LiveContents
from uringmig.contents.source import Row, window_of
from uringmig.image.draft import Durable
from uringmig.image.manifest import ArchiveFields, ArchiveManifest, Settings
from uringmig.options import WriteOptions
from uringmig.progress import ChannelCounters, Phase, ProgressCallback, account, take_snapshot
from uringmig.result import describe_seconds, describe_settings
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.transfer.channel import ChannelFile, Pacer, WindowWork, run_round
from uringmig.units import MiB

#: What is copied twice after a kill is about this much; a checkpoint costs two flushes of the disk.
CHECKPOINT_BYTES: Final = 256 * MiB


class CopyRun:
    """One copy's channels, counters and journal.

    Args:
        guest: what is known of the memory that was copied.
        partial: the file being written.
        options: how to write it.
        engine: with what.
        progress: called with a `Snapshot` about ten times a second and at every phase.
        started: when the copy began, by `time.monotonic`.

    Attributes:
        done: rows whose writes have completed and that are in no checkpoint yet; channels append.
        counters: one for each channel.
    """

    def __init__(
        self,
        guest: CopiedGuest,
        partial: PartialCopy,
        *,
        options: WriteOptions,
        engine: EngineChoice,
        progress: ProgressCallback | None,
        started: float,
    ) -> None:
        self.done: deque[Row] = deque()
        self.counters = [ChannelCounters() for _ in range(options.channels)]
        self._guest = guest
        self._partial = partial
        self._options = options
        self._engine = engine
        self._progress = progress
        self._started = started
        self._total_bytes = guest.memory_bytes
        self._checkpointed_bytes = guest.resumed_bytes
        self.counters[0].finished_bytes = self.counters[0].scanned_bytes = guest.resumed_bytes

    def copy(
        self,
        intake: WindowIntake,
        rows: Sequence[Row],
        make_work: Callable[[ChannelCounters], WindowWork],
        chunk_of: Callable[[Row], Chunk],
        *,
        again: bool = False,
        paced: bool = True,
    ) -> None:
        """Copy ``rows`` and drain.

        Args:
            intake: of these rows; closed here.
            rows: in any order.
            make_work: a channel's side.
            chunk_of: what the journal keeps of a row.
            again: they were copied before.
            paced: the rate holds.

        Raises:
            UringmigError: the first failure of any channel; the others have stopped and drained.
        """
        shared = ChannelFile(
            file=self._partial.target.direct,
            path=self._partial.target.path,
            operation=Operation.WRITE,
            engine=self._engine,
            options=self._options,
            bounce=False,
        )
        # A channel takes whichever row comes next, not this window's: only the sum is right.
        tickets = [window_of(self._guest.contents.blocks, row) for row in rows]
        looked_at = sum(ticket.length_bytes for ticket in tickets)
        if again:
            self._total_bytes += looked_at
        else:  # what is not even looked at is a hole
            holes = self._total_bytes - self._guest.resumed_bytes - looked_at
            first = self.counters[0]
            first.scanned_bytes += holes
            first.zero_bytes += holes
            first.finished_bytes += holes
        pacer = Pacer(self._options.rate if paced else 0)
        try:
            with closing(
                run_round(shared, tickets, make_work, self.counters, pacer=pacer)
            ) as round_:
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
                    total_bytes=self._total_bytes,
                    seconds=time.monotonic() - self._started,
                )
            )

    @property
    def settings(self) -> Settings:
        """What really ran, for a manifest."""
        direct = self._partial.target.direct.direct
        return describe_settings(self._options, engine=self._engine.name, direct=direct)

    def seconds(self, durable: Durable) -> dict[str, float]:
        """Where the time went so far, for a manifest; ``stopped``: a live guest stood still."""
        elapsed = time.monotonic() - self._started
        told = describe_seconds(account(self.counters, elapsed=elapsed, sync=durable.sync_seconds))
        contents = self._guest.contents
        if isinstance(contents, LiveContents) and contents.stopped_seconds:
            told["stopped"] = round(contents.stopped_seconds, 6)
        return told

    @property
    def notes(self) -> list[str]:
        """What the operator should know of engine, file, journal and source."""
        partial = self._partial
        journal = partial.notes
        notes = (self._engine.note, *partial.target.notes, *journal, *self._guest.contents.notes)
        return [note for note in notes if note is not None]

    def publish(
        self,
        durable: Durable,
        described: ArchiveManifest,
        fields: ArchiveFields,
        *,
        shared_bytes: int,
        ratio: float,
    ) -> TierResult:
        """Give the durable image its name, and say what came of the copy.

        Raises:
            StorageError: the name does not exist, or still holds its former content.
        """
        target = self._partial.target
        file_bytes, allocated_bytes = target.main.size, target.main.allocated
        manifest_path = durable.publish(described)
        assert manifest_path is not None, "an entry has a manifest"
        return TierResult(
            path=target.path,
            manifest_path=manifest_path,
            tier=fields.tier,
            file_bytes=file_bytes,
            allocated_bytes=allocated_bytes,
            memory_bytes=fields.memory_bytes,
            stored_bytes=fields.stored_bytes,
            shared_bytes=shared_bytes,
            resumed_bytes=self._guest.resumed_bytes,
            written_bytes=sum(item.completed_bytes for item in self.counters),
            ratio=ratio,
            seconds=time.monotonic() - self._started,
            manifest=described,
            notes=tuple(dict.fromkeys((*described.notes, *target.notes))),
        )

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
