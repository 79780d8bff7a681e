"""What is done and what is to be done: the archives of a run, and the run's journal.

The journal lies in the archive of the first job. Only this module writes to catalogues and journal;
the archives' locks are held from opening to closing, so a second run of the same job file, or of
another that shares an archive, is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from uringmig.archive.dedup import sharing_trouble
from uringmig.archive.directory import Archive, EntryFiles
from uringmig.archive.entry import Entry, check_name
from uringmig.archive.folder import has_archive
from uringmig.batch import journal
from uringmig.batch.job import TIME_FIELD, JobFile, entry_name
from uringmig.batch.messages import Archived
from uringmig.batch.planning import taken_by_partial
from uringmig.batch.record import RunRecord, read_state
from uringmig.batch.state import JobState
from uringmig.errors import LimitError, StateError, StorageError, UringmigError

TIME_FORMAT: Final = "%Y%m%dT%H%M%SZ"
#: As many seconds as runs that begin in one second.
_AHEAD_MOST: Final = timedelta(minutes=1)


class Ledger:
    """Archives and journal of one run; a context manager.

    Args:
        job_file: the checked job file.
        text: what it was parsed from.
        write: lock the archives, make those that are missing, and begin or continue the journal;
            otherwise nothing is changed.
        resume_within_s: an interrupted run that is not older than this is gone on with.

    Attributes:
        time: what ``{time}`` stands for.
        resumed: this run goes on with an interrupted one.
        notes: what the operator should know, one line each.
        warnings: what is wrong with an archive or the journal, one line each.

    Raises:
        StateError: two jobs have one entry, or an archive is none.
        StorageError: an archive is locked by another process, or cannot be written.
    """

    def __init__(
        self, job_file: JobFile, *, text: str, write: bool, resume_within_s: float
    ) -> None:
        self.job_file = job_file
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._resources = ExitStack()
        self._archives: dict[str, Archive] = {}
        self._entries: dict[str, dict[str, Entry]] = {}
        try:
            self._open_archives(write)
            self._open_journal(journal.digest_text(text), write, resume_within_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up locks and files; harmless when called again."""
        self._resources.close()

    @property
    def archives(self) -> list[str]:
        """Paths of the archives, each once."""
        return sorted({job.archive for job in self.job_file.jobs})

    def states(self) -> list[JobState]:
        """Every job, with what an interrupted run has finished marked as such.

        Raises:
            StateError: two jobs have one entry.
        """
        host = socket.gethostname()
        states = [
            JobState(job, entry_name(job, host=host, time=self.time)) for job in self.job_file.jobs
        ]
        owners: dict[tuple[str, str], str] = {}
        for state in states:
            place = (state.job.archive, state.entry)
            if place in owners:
                raise StateError(
                    f"{self.job_file.path}: jobs {owners[place]!r} and {state.job.name!r} have the "
                    f"same entry {state.entry!r}; write {{name}} into it"
                )
            owners[place] = state.job.name
            self._recognize(state)
        return states

    def clear_leftovers(self, states: list[JobState]) -> None:
        """Remove interrupted copies that no job of this run goes on with."""
        wanted = {
            (state.job.archive, state.entry, state.job.tier) for state in states if not state.final
        }
        places = set()
        for names in wanted:
            # What no entry can be called, or one is called already, its job is told later.
            with contextlib.suppress(StateError):
                places.add(self._place(*names).image)
        for archive in self._archives.values():
            if archive.may_be_shared:
                continue  # they may be another run's, at work
            for place in archive.unfinished():
                if place.image not in places:
                    try:
                        archive.discard(place)
                    except StorageError as error:
                        self.notes.append(f"leftovers remain: {error}")

    def check_entry(self, state: JobState, *, new: bool) -> None:
        """Refuse what `start` would, before anything is read.

        Args:
            state: of the job.
            new: it is known that the entry is to be made; otherwise it may be the one there is.

        Raises:
            StateError: no entry can have this name; or, if ``new``, there is one.
        """
        check_name(state.entry)
        # What was begun before the run was interrupted may have been published meanwhile.
        archive = self._archives.get(state.job.archive)
        if new and archive and self._state.started.get(state.job.name) != state.entry:
            archive.check_free(state.entry)

    def unchanged(self, state: JobState, fingerprint: str) -> bool:
        """Say whether the entry is there already, of a source that has not changed since."""
        entry = self._find(state.job.archive, state.entry)
        return (
            entry is not None
            and entry.tier == state.job.tier
            and fingerprint != ""
            and entry.source_fingerprint == fingerprint
            and entry.is_sound
        )

    def sharing_trouble(self, state: JobState) -> tuple[str | None, bool]:
        """Say why a job with ``dedup`` will share nothing, as far as can be known beforehand.

        Returns:
            That, or None; and whether there is an earlier image to share with.
        """
        job = state.job
        if not job.dedup:
            return None, False
        archive = self._archives.get(job.archive)
        previous = None if archive is None else archive.latest_of(job.vm)
        above = (Path(job.archive), *Path(job.archive).parents)
        folder = next(at for at in above if os.path.isdir(at))
        trouble = sharing_trouble(folder, None if previous is None else Path(previous.image))
        return trouble, previous is not None

    def start(self, state: JobState) -> tuple[EntryFiles, str | None]:
        """Note that a job begins to write.

        Returns:
            Where its files go, and the image to share pages with, if it is to.

        Raises:
            StateError: there is an entry of this name, or none can have it.
        """
        job = state.job
        place = self._place(job.archive, state.entry, job.tier)
        previous = self._archives[job.archive].latest_of(job.vm) if job.dedup else None
        self._record.append(journal.Started(job=job.name, entry=state.entry))
        return place, None if previous is None else previous.image

    def finish(self, state: JobState, archived: Archived) -> None:
        """Put a job's entry into the catalogue, and note that."""
        try:
            archive = self._archives[state.job.archive]
            entry = archive.add(archived.image)
            if archived.verified:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                archive.note_checked(entry, cursor=0, verified_at=now)
        except UringmigError as error:
            # Its files are there; whoever opens the archive next finds it.
            state.warnings.append(f"the entry is not yet in the catalogue: {error}")
        self._record.append(
            journal.Finished(
                job=state.job.name,
                entry=state.entry,
                content_digest=archived.content_digest,
                fingerprint=archived.fingerprint,
            )
        )

    def adopt(self, state: JobState, place: EntryFiles) -> Archived | None:
        """An entry that is whole although its worker could not say so any more, or None."""
        archive = self._archives[state.job.archive]
        try:
            # If it was killed between the two renames, this gives the manifest its name.
            archive.heal()
            archived = describe_entry(archive.find(state.entry))
        except UringmigError:
            return None
        if state.job.verify:
            state.warnings.append("the entry is whole, but was not read back")
        return archived

    def fail(self, state: JobState, place: EntryFiles | None, *, stopped: bool) -> None:
        """Remove what a job has left that nobody goes on with, and note that it is given up.

        Args:
            state: of the job.
            place: where it was writing, if it was.
            stopped: the run was stopped, and the next one goes on with it.
        """
        if place is not None:
            # A later run, too, has an entry of this name if there is no time in it.
            again = stopped or TIME_FIELD not in state.job.entry
            try:
                if not (again and os.path.exists(place.journal)):
                    self._archives[state.job.archive].discard(place)
            except StorageError as error:
                state.warnings.append(f"leftovers remain: {error}")
        self._record.append(journal.Failed(job=state.job.name, kind=state.kind, error=state.error))

    def unfinished_bytes(self, archive: str) -> int:
        """What interrupted copies take in an archive: they go on there, or are removed."""
        opened = self._archives.get(archive)
        if opened is None:
            return 0
        return sum(taken_by_partial(place.image) for place in opened.unfinished())

    def end(self) -> None:
        """Note that every job is through."""
        self._record.append(journal.Ended(at=time.time()))
        if self._record.trouble:
            self.warnings.append(self._record.trouble)

    def _open_archives(self, write: bool) -> None:
        """Open every archive, always in one order."""
        for path in self.archives:
            if not write and not has_archive(Path(path)):
                self._entries[path] = {}
                continue
            archive = self._resources.enter_context(Archive.open(path, write=write))
            self._archives[path] = archive
            entries = archive.entries()
            self._entries[path] = {entry.name: entry for entry in entries if entry.is_sound}
            self.warnings += archive.notes
            self.warnings += [f"{e.name}: {e.trouble}" for e in entries if e.trouble]
            if archive.catalogue_note:
                self.notes.append(archive.catalogue_note)

    def _open_journal(self, digest: str, write: bool, resume_within_s: float) -> None:
        """Go on with an interrupted run's journal, or begin one.

        No promise rests on it: entries are whole or not there without it, and it only saves what
        an interrupted run has done from being done again. So trouble with it is told and costs no
        night, as it is when it comes later.
        """
        path = self._journal_path()
        now = time.time()
        self._state = journal.RunState()
        with self._told("the run begins anew"):
            self._state = read_state(path)
        self.resumed = self._state.resumable(job_digest=digest, now=now, within_s=resume_within_s)
        begun = former = self._state.begun
        if not self.resumed or begun is None:
            self._state = journal.RunState()
            begun = journal.Begun(
                job_file=self.job_file.path,
                job_digest=digest,
                time=time_after(now, None if former is None else former.time),
                at=now,
            )
        self.time = begun.time
        self._record = RunRecord(path)
        if write:
            self._resources.callback(self._record.close)
            with self._told("if the run is interrupted, the next one begins anew"):
                if self.resumed:
                    self._record.go_on(self._state)
                else:
                    self._record.begin(begun)

    @contextlib.contextmanager
    def _told(self, meaning: str) -> Iterator[None]:
        """Make trouble with the journal a warning; but what this process may not have is one."""
        try:
            yield
        except LimitError:
            raise
        except (StateError, StorageError) as error:
            self.warnings.append(f"{meaning}: {error}")

    def _journal_path(self) -> Path:
        """In the first job's archive; one for each job file, by its path."""
        path = self.job_file.path
        name = f".{Path(path).stem}-{journal.digest_text(path)[:8]}{journal.SUFFIX}"
        return Path(self.job_file.jobs[0].archive) / name

    def _recognize(self, state: JobState) -> None:
        """Mark a job that an interrupted run had finished, if its entry is still what it was."""
        entry = self._find(state.job.archive, state.entry)
        name = state.job.name
        finished = self._state.finished.get(name)
        if entry is None:
            return
        if finished is not None and entry.content_digest == finished.content_digest:
            state.notes.append("finished before the run was interrupted")
        elif self._state.started.get(name) == state.entry:
            # Killed between the publication and the record of it.
            state.notes.append("published before the run was interrupted")
        else:
            return
        state.stage = "skipped"
        state.archived = describe_entry(entry)

    def _find(self, archive: str, name: str) -> Entry | None:
        """A sound entry as it was when the run began."""
        return self._entries[archive].get(name)

    def _place(self, archive: str, name: str, tier: str) -> EntryFiles:
        return self._archives[archive].place(name, "cold" if tier == "cold" else "hot")


def time_after(now: float, former: str | None) -> str:
    """What ``{time}`` stands for in a run that begins now: later than in the run before it.

    That one may have begun in the same second, and its entries have their names already.

    Args:
        now: seconds since 1970.
        former: what it stood for there, if that is known.
    """
    moment = datetime.fromtimestamp(now, UTC).replace(microsecond=0)
    with contextlib.suppress(ValueError):
        last = datetime.strptime(former or "", TIME_FORMAT).replace(tzinfo=UTC)
        # Of a clock that was wrong then by more than this nothing is to be learnt.
        if timedelta(0) <= last - moment < _AHEAD_MOST:
            moment = last + timedelta(seconds=1)
    return moment.strftime(TIME_FORMAT)


def describe_entry(entry: Entry) -> Archived:
    """What the catalogue knows of an entry that this process did not see being made."""
    return Archived(
        image=entry.image,
        kind=entry.source_kind,
        content_digest=entry.content_digest,
        fingerprint=entry.source_fingerprint,
        memory_bytes=entry.memory_bytes,
        stored_bytes=entry.stored_bytes,
        file_bytes=entry.file_bytes,
        allocated_bytes=Path(entry.image).stat().st_blocks * 512,
        ratio=entry.stored_bytes / max(1, entry.file_bytes),
        verified=entry.condition == "good",
    )
