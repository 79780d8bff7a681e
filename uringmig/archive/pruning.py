"""Entries that no rule keeps, removed; by default only told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.archive.retention import Decision, plan_prune
from uringmig.errors import StateError


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What was decided, and done; sizes in bytes.

    Attributes:
        decisions: over every entry concerned, oldest first.
        removed: whether the entries that no rule keeps are gone; else nothing was touched.
        file_bytes: length of the files that go; with reflinks they may have taken less.
    """

    path: str
    decisions: tuple[Decision, ...]
    removed: bool
    file_bytes: int


def prune(
    archive: Archive,
    *,
    keep_last: int = 0,
    keep_daily: int = 0,
    keep_weekly: int = 0,
    keep_monthly: int = 0,
    vm: str | None = None,
    forget: Sequence[str] = (),
    delete: bool = False,
    now: datetime | None = None,
) -> PruneReport:
    """Decide which entries go, and remove them if asked to; see `archive.retention`.

    Args:
        archive: open for writing if anything is to be removed.
        keep_last: so many of the newest of each machine.
        keep_daily: the newest of each of so many days.
        keep_weekly: likewise of weeks.
        keep_monthly: likewise of months.
        vm: only this machine's; None is all.
        forget: names of damaged or missing entries to remove, whatever the rules say; with them no
            rule need be given.
        delete: remove them; else only say which.
        now: the present time, with its time zone; None asks the clock.

    Raises:
        StateError: no rule is given, an entry to forget is sound or none, or the archive is open
            for reading only.
        StorageError: a file cannot be removed; what was removed before stays so.
    """
    dropped = [_forgettable(archive.find(name)) for name in dict.fromkeys(forget)]
    decisions = [Decision(entry, ()) for entry in dropped]
    rules = (keep_last, keep_daily, keep_weekly, keep_monthly)
    if any(rules) or not dropped:
        # What opening the archive has just published is in no plan that was shown before.
        aside = {*forget, *archive.healed.published}
        entries = [entry for entry in archive.entries() if entry.name not in aside]
        decisions += plan_prune(
            [entry for entry in entries if vm in (None, entry.vm)],
            keep_last=keep_last,
            keep_daily=keep_daily,
            keep_weekly=keep_weekly,
            keep_monthly=keep_monthly,
            now=now or datetime.now(UTC),
        )
    going = [decision.entry for decision in decisions if not decision.keep]
    if delete:
        archive.remove_entries(going)
    return PruneReport(
        path=str(archive.path),
        decisions=tuple(decisions),
        removed=delete,
        file_bytes=sum(entry.file_bytes for entry in going),
    )


def _forgettable(entry: Entry) -> Entry:
    """An entry that may be dropped by its name.

    Raises:
        StateError: nothing is wrong with it.
    """
    if entry.is_sound:
        raise StateError(f"entry {entry.name!r} is neither damaged nor missing; rules prune those")
    return entry
