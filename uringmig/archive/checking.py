"""Are the entries of an archive still what was saved?  All, a share, or what there is time for.

A chunk is a window of a block, in the order of blocks and rows. A pass over an entry looks at every
chunk once; where it stopped, the catalogue remembers, and the next partial run goes on there: so a
tenth every night has seen all after ten. An entry is good when a pass has ended and no damage of it
is known; damage is forgotten when the same place is found good again.

Everything damaged is found, not only the first: a chunk that cannot be read, unpacked or compared
is told with its place, and the next one looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from uringmig.archive.damagenotes import STREAM_CHUNK, Damage
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.archive.opening import OpenedEntry, open_entry
from uringmig.contents.source import Row, all_rows, row_length
from uringmig.errors import BytesError, LimitError, StateError, StorageError, UringmigError
from uringmig.image.manifest import Tier
from uringmig.options import ReadOptions
from uringmig.progress import ProgressCallback, Teller

#: Chunks between two looks at the clock: half a gigabyte of guest, a fraction of a second.
_SLICE_CHUNKS: Final = 128
#: What was found is kept so often: a kill loses no more than this, and the disk is not kept busy.
_KEEP_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryCheck:
    """What was seen of one entry.

    Attributes:
        chunks: of its memory.
        checked_chunks: looked at now.
        checked_bytes: guest memory in these.
        pass_ended: every chunk has been looked at since this pass over the entry began.
        damage: found now.
        notes: what the operator should know, one line each.
    """

    name: str
    tier: Tier
    chunks: int
    checked_chunks: int
    checked_bytes: int
    pass_ended: bool
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveCheck:
    """What a verification of an archive found.

    Attributes:
        entries: as far as there was time, in the order they were looked at.
        not_reached: names of entries for which there was no time.
        checked_bytes: guest memory compared with its digest.
        damaged: entries in which damage was found now.
        known_damaged: names of others whose damage is known from before and was not disproved now.
        seconds: elapsed.
        notes: what the operator should know, one line each.
    """

    path: str
    entries: tuple[EntryCheck, ...]
    not_reached: tuple[str, ...]
    checked_bytes: int
    damaged: int
    known_damaged: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...]


def verify_archive(
    archive: Archive,
    *,
    names: Sequence[str] = (),
    share: float | None = None,
    seconds: float | None = None,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
) -> ArchiveCheck:
    """Compare entries with their manifests; reads with O_DIRECT, through the options' engine.

    Args:
        archive: open for reading or writing; what is found goes into its catalogue either way.
        names: only these entries; none is all.
        share: of each entry's chunks, above 0 and at most 1, from where the last run stopped; None
            is all of them, from the first.
        seconds: stop after this long, and go on there the next time; None is no limit. At least
            one slice of half a gigabyte is always looked at.
        options: how to read.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        StateError: no such entry, or a share or time that is none.
        StorageError: the folder cannot be read. An image that cannot be read is damage.
        HostError: io_uring is required and cannot be had.
    """
    if share is not None and not 0 < share <= 1:
        raise StateError(f"a share is above 0 and at most 1 (100%), not {share}")
    if seconds is not None and seconds <= 0:
        raise StateError(f"a time limit is above 0, not {seconds}")
    run = _Run(archive, _chosen(archive, names), share, seconds, options, progress)
    return run.report()


def _chosen(archive: Archive, names: Sequence[str]) -> list[Entry]:
    """Entries in the order of need: a pass that goes on, never checked, longest ago."""
    wanted = dict.fromkeys(names)
    entries = [archive.find(name) for name in wanted] if wanted else archive.entries()
    return sorted(
        entries,
        key=lambda entry: (entry.verify_cursor == 0, entry.verified_at or "", entry.created_time),
    )


class _Run:
    """One verification: entries one after the other, as long as there is time."""

    def __init__(
        self,
        archive: Archive,
        entries: list[Entry],
        share: float | None,
        seconds: float | None,
        options: ReadOptions,
        progress: ProgressCallback | None,
    ) -> None:
        self.archive = archive
        self.options = options
        self.share = share
        self.resumes = share is not None or seconds is not None
        self._entries = entries
        self._started = time.monotonic()
        self._deadline = math.inf if seconds is None else self._started + seconds
        total_bytes = int(sum(entry.memory_bytes for entry in entries) * (share or 1))
        self._teller = Teller(progress, total_bytes=total_bytes)

    def report(self) -> ArchiveCheck:
        """Look at the entries."""
        checks: list[EntryCheck] = []
        doubtful = {entry.name for entry in self._entries if not entry.is_sound}
        for entry in self._entries:
            if checks and self.out_of_time():
                break
            visit = _Visit(self, entry)
            check = visit.check()
            if check is not None:
                checks.append(check)
            if check is None or check.damage or visit.is_cleared:
                doubtful.discard(entry.name)
        self._teller.tell("verify")
        reached = {check.name for check in checks}
        notes = [f"what was found cannot all be kept: {self.archive.unkept}"]
        return ArchiveCheck(
            path=str(self.archive.path),
            entries=tuple(checks),
            not_reached=tuple(e.name for e in self._entries if e.name not in reached),
            checked_bytes=self._teller.counters.finished_bytes,
            damaged=sum(bool(check.damage) for check in checks),
            known_damaged=tuple(e.name for e in self._entries if e.name in doubtful),
            seconds=time.monotonic() - self._started,
            notes=tuple(notes if self.archive.unkept else ()),
        )

    def out_of_time(self) -> bool:
        """Say whether to stop."""
        return time.monotonic() >= self._deadline

    def tell(self, more_bytes: int) -> None:
        """Count what has been looked at, and tell of it."""
        counters = self._teller.counters
        counters.scanned_bytes += more_bytes
        counters.finished_bytes += more_bytes
        counters.completed_bytes += more_bytes
        self._teller.tell("verify", now=False)


@dataclass(slots=True)
class _Visit:
    """One entry's turn in a run."""

    run: _Run
    entry: Entry
    good: list[int] = field(default_factory=list)
    cleared: set[int] = field(default_factory=set)
    all_seen: bool = False
    fresh: list[Damage] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    kept_at: float = field(default_factory=time.monotonic)
    checked_chunks: int = 0
    checked_bytes: int = 0

    def check(self) -> EntryCheck | None:
        """Look at the entry; None if it was removed meanwhile."""
        try:
            opened = open_entry(self.entry, options=self.run.options, compared=True)
        except LimitError:
            raise  # no word of the entry
        except (BytesError, StorageError) as error:
            if not self.run.archive.has(self.entry.name):
                return None
            self._found(STREAM_CHUNK, error)
            return self._end(chunks=0, cursor=0, pass_ended=True)
        with opened:
            for mismatch in opened.stream_damage:
                self._found(STREAM_CHUNK, mismatch)
            if not opened.stream_damage:
                self.good.append(STREAM_CHUNK)
            return self._check_chunks(opened)

    def _check_chunks(self, opened: OpenedEntry) -> EntryCheck:
        """Look at chunks from the cursor on, slice by slice."""
        rows = all_rows(opened.contents.blocks)
        cursor = self.entry.verify_cursor if self.run.resumes else 0
        cursor = cursor if cursor < len(rows) else 0
        stop = len(rows)
        if self.run.share is not None:
            stop = min(stop, cursor + math.ceil(self.run.share * len(rows)))
        while cursor < stop:
            chunks = range(cursor, min(cursor + _SLICE_CHUNKS, stop))
            self._check_slice(opened, rows, chunks)
            cursor = chunks.stop
            if time.monotonic() - self.kept_at >= _KEEP_SECONDS:
                self._keep(cursor, verified_at=None)
            if self.run.out_of_time():
                break
        ended = cursor == len(rows)
        self.all_seen = self.checked_chunks == len(rows)
        return self._end(
            chunks=len(rows),
            cursor=0 if ended else cursor,
            pass_ended=ended,
            notes=opened.contents.notes,
        )

    def _check_slice(self, opened: OpenedEntry, rows: list[Row], chunks: range) -> None:
        """Look at some chunks."""
        numbers = {rows[chunk]: chunk for chunk in chunks}
        try:
            for row, error in _looked_at(opened, list(numbers)):
                if error is None:
                    self.good.append(numbers[row])
                else:
                    self._found(numbers[row], error)
                length = row_length(opened.contents.blocks[row[0]], row[1])
                self.checked_chunks += 1
                self.checked_bytes += length
                self.run.tell(length)
        except BytesError as error:
            self._found(STREAM_CHUNK, error)

    def _found(self, chunk: int, error: UringmigError) -> None:
        """Note a damage."""
        damage = Damage(chunk, str(error), _now())
        self.damage.append(damage)
        self.fresh.append(damage)

    @property
    def is_cleared(self) -> bool:
        """Whether every place that was known to be damaged was found good."""
        if self.all_seen:
            return not self.damage
        known = {damage.chunk for damage in self.run.archive.damage(self.entry.name)}
        return known <= self.cleared

    def _keep(self, cursor: int, *, verified_at: str | None) -> None:
        """Have the archive keep what is known by now."""
        self.run.archive.note_checked(
            self.entry,
            cursor=cursor,
            verified_at=verified_at,
            good=self.good,
            damaged=self.damage if self.all_seen else self.fresh,
            all_seen=self.all_seen,
        )
        self.cleared.update(self.good)
        self.good, self.fresh = [], []
        self.kept_at = time.monotonic()

    def _end(
        self, *, chunks: int, cursor: int, pass_ended: bool, notes: Sequence[str] = ()
    ) -> EntryCheck:
        """Keep the rest, and say what came of the visit."""
        self._keep(cursor, verified_at=_now() if pass_ended and chunks else None)
        return EntryCheck(
            name=self.entry.name,
            tier=self.entry.tier,
            chunks=chunks,
            checked_chunks=self.checked_chunks,
            checked_bytes=self.checked_bytes,
            pass_ended=pass_ended,
            damage=tuple(self.damage),
            notes=tuple(notes),
        )


def _looked_at(
    opened: OpenedEntry, rows: Sequence[Row]
) -> Iterator[tuple[Row, UringmigError | None]]:
    """Every row once, with what is wrong with it.

    A row that cannot even be read ends the reading ahead, and does not say which it was: so what is
    left is looked at in halves, until that row is alone.

    Raises:
        MismatchError: the file changed while it was read.
    """
    left = dict.fromkeys(rows)
    try:
        for window in opened.contents.windows(rows):
            row = (window.block_index, window.row)
            mismatch = opened.mismatch(window)
            del left[row]
            yield row, mismatch
    except LimitError:
        raise
    except (BytesError, StorageError) as error:
        remaining = list(left)
        if len(remaining) == 1:
            yield remaining[0], error
        elif remaining:
            half = len(remaining) // 2
            yield from _looked_at(opened, remaining[:half])
            yield from _looked_at(opened, remaining[half:])
        else:
            raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
