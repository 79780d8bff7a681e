"""Plans: what is asked of each file system, and the refusal of what cannot fit."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from msgspec.structs import replace

from uringmig.batch.planning import PlanRow, free_space, make_plan
from uringmig.errors import StorageError

#: No interrupted copies anywhere.
NONE: defaultdict[str, int] = defaultdict(int)


def row(job: str, archive: str, file_bytes: int) -> PlanRow:
    return PlanRow(job=job, entry=job, archive=archive, tier="hot", file_bytes=file_bytes)


def test_archives_of_one_file_system_share_its_space() -> None:
    rows = [row("a", "/x/1", 60), row("b", "/x/2", 50), row("c", "/y", 10)]
    plan = make_plan(rows, {"/x/1": (1, 100), "/x/2": (1, 100), "/y": (2, 10)}, unfinished=NONE)
    first, second = plan.spaces
    assert (first.archives, first.needed_bytes, first.fits) == (("/x/1", "/x/2"), 110, False)
    assert (second.archives, second.needed_bytes, second.fits) == (("/y",), 10, True)


def test_interrupted_copies_are_room_that_is_there() -> None:
    """They go on where they lie, or are removed before anything is written."""
    rows = [row("a", "/x/1", 60), row("b", "/x/2", 50)]
    free = {"/x/1": (1, 80), "/x/2": (1, 80)}
    (space,) = make_plan(rows, free, unfinished={"/x/1": 20, "/x/2": 10}).spaces
    assert (space.free_bytes, space.fits) == (110, True)


def test_file_system_that_does_not_count_is_not_full() -> None:
    """No answer is not 0: it is said, and the run goes on."""
    plan = make_plan([row("a", "/x", 1024)], {"/x": (1, None)}, unfinished=NONE)
    plan.check()
    assert plan.notes == ("/x: the file system does not say how much is free",)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    plan = make_plan([row("a", "/x", 2048)], {"/x": (1, 1024)}, unfinished=NONE)
    with pytest.raises(StorageError, match=r"^/x: the plan needs 2\.0 KiB \(2048 bytes\) here"):
        plan.check()
    make_plan([row("a", "/x", 1024)], {"/x": (1, 1024)}, unfinished=NONE).check()


def test_free_space_of_an_archive_that_is_still_to_be_made(tmp_path: Path) -> None:
    number, free = free_space(str(tmp_path / "not" / "yet"))
    assert number == tmp_path.stat().st_dev
    found = os.statvfs(tmp_path)
    assert free is not None
    assert 0 < free <= found.f_blocks * found.f_frsize


def test_archive_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    number, _ = free_space(str(tmp_path / "file" / "archive"))
    assert number == tmp_path.stat().st_dev


def test_a_bound_alone_refuses_no_plan() -> None:
    """A stream of 9 times 100 bytes may hold one page nine times over: nobody knows before."""
    certain = row("a", "/x", 60)
    bound = replace(row("b", "/x", 900), at_most=True)
    plan = make_plan([certain, bound], {"/x": (1, 100)}, unfinished=NONE)
    plan.check()
    [space] = plan.spaces
    assert (space.needed_bytes, space.least_bytes, space.fits) == (960, 60, True)
    assert plan.warnings == ["/x: may not fit: the plan needs at most 960 B, and 100 B are free"]
    with pytest.raises(StorageError, match="the plan needs 110 B"):
        make_plan([row("c", "/x", 110), bound], {"/x": (1, 100)}, unfinished=NONE).check()
    assert make_plan([certain], {"/x": (1, 100)}, unfinished=NONE).warnings == []
