"""What a run would do and whether the disks hold it: the plan of ``--dry-run`` and of every run."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uringmig.batch.job import Tier
from uringmig.batch.messages import Sizes
from uringmig.errors import StorageError
from uringmig.storage.publication import PARTIAL
from uringmig.units import format_size


class PlanRow(Sizes, frozen=True, kw_only=True):
    """One job of a plan, and its sizes where they are known; ``at_most`` refuses no plan.

    Attributes:
        entry: its name in the archive.
        stored_at_most: ``stored_bytes`` is a bound, too; ``at_most`` alone is of ``file_bytes``.
        done: why there is nothing to do, or "".
        problem: why it is not known what there is to do, or "".
        warning: what will not be as asked for, or "".
        exit_code: of a run whose job this is, if it is already known that it cannot be done, or 0.
    """

    job: str
    entry: str
    archive: str
    tier: Tier
    stored_at_most: bool = False
    done: str = ""
    problem: str = ""
    warning: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """One file system and what its archives ask of it; bytes.

    Attributes:
        needed_bytes: at most.
        least_bytes: of it, without the jobs that may well take far less than their most.
        free_bytes: with what interrupted copies take there; None where the file system does not
            say, as ramfs and some FUSE do not.
    """

    archives: tuple[str, ...]
    needed_bytes: int
    least_bytes: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        """Nothing that is known says that it does not hold what is asked."""
        return self.free_bytes is None or self.least_bytes <= self.free_bytes

    @property
    def warning(self) -> str:
        """Why it may yet not hold it, or ""."""
        if self.free_bytes is None or not self.fits or self.needed_bytes <= self.free_bytes:
            return ""
        return (
            f"{', '.join(self.archives)}: may not fit: the plan needs at most "
            f"{format_size(self.needed_bytes)}, and {format_size(self.free_bytes)} are free"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole run."""

    rows: tuple[PlanRow, ...]
    spaces: tuple[Space, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be found out, one line each."""
        return tuple(
            f"{', '.join(space.archives)}: the file system does not say how much is free"
            for space in self.spaces
            if space.free_bytes is None
        )

    @property
    def warnings(self) -> list[str]:
        """File systems that may not hold what is asked."""
        return [space.warning for space in self.spaces if space.warning]

    def check(self) -> None:
        """Refuse a plan that cannot fit.

        Raises:
            StorageError: names the archive, what is needed and what is free.
        """
        for space in self.spaces:
            if space.free_bytes is not None and not space.fits:
                raise StorageError(
                    f"the plan needs {format_size(space.least_bytes)} "
                    f"({space.least_bytes} bytes) here, and "
                    f"{format_size(space.free_bytes)} ({space.free_bytes} bytes) are free",
                    path=", ".join(space.archives),
                    cure="make room (archive prune), or archive fewer VMs or in tier cold",
                )


def make_plan(
    rows: Sequence[PlanRow],
    free: Mapping[str, tuple[int, int | None]],
    *,
    unfinished: Mapping[str, int],
) -> Plan:
    """Add up what is asked of each file system.

    Args:
        rows: every job.
        free: for each archive, `free_space`.
        unfinished: for each archive, bytes that interrupted copies take there.
    """
    archives: dict[int, list[str]] = defaultdict(list)
    for archive, (number, _) in free.items():
        archives[number].append(archive)
    return Plan(
        rows=tuple(rows),
        spaces=tuple(
            Space(
                archives=tuple(names),
                needed_bytes=sum(row.file_bytes for row in rows if row.archive in names),
                least_bytes=sum(
                    row.file_bytes for row in rows if row.archive in names and not row.at_most
                ),
                free_bytes=None
                if (left := free[names[0]][1]) is None
                else left + sum(unfinished[name] for name in names),
            )
            for names in archives.values()
        ),
    )


def free_space(archive: str) -> tuple[int, int | None]:
    """The file system an archive lies on, or will lie on, and the bytes free there.

    None are told, which is another thing than 0, where the file system does not count.

    Raises:
        StorageError: it cannot be looked at.
    """
    at = Path(archive)
    try:
        while not os.path.exists(at) and at != at.parent:
            at = at.parent
        found = os.statvfs(at)
        number = at.stat().st_dev
    except OSError as error:
        raise StorageError("cannot look at the free space", errno=error.errno, path=at) from None
    return number, found.f_bavail * found.f_frsize if found.f_blocks else None


def taken_by_partial(image: str | os.PathLike[str]) -> int:
    """What an interrupted copy takes on the disk; 0 where there is none."""
    try:
        return Path(f"{os.fspath(image)}{PARTIAL}").stat().st_blocks * 512
    except OSError:
        return 0
