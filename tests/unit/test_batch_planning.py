"""Plans: what is asked of each file system, and the refusal of what cannot fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from uringmig.batch.planning import PlanRow, free_space, make_plan
from uringmig.errors import StorageError


def row(job: str, archive: str, file_bytes: int) -> PlanRow:
    return PlanRow(job=job, entry=job, archive=archive, tier="hot", file_bytes=file_bytes)


def test_archives_of_one_file_system_share_its_space() -> None:
    rows = [row("a", "/x/1", 60), row("b", "/x/2", 50), row("c", "/y", 10)]
    plan = make_plan(rows, {"/x/1": (1, 100), "/x/2": (1, 100), "/y": (2, 10)})
    first, second = plan.spaces
    assert (first.archives, first.needed_bytes, first.fits) == (("/x/1", "/x/2"), 110, False)
    assert (second.archives, second.needed_bytes, second.fits) == (("/y",), 10, True)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    plan = make_plan([row("a", "/x", 2048)], {"/x": (1, 1024)})
    with pytest.raises(StorageError, match=r"^/x: the plan needs 2\.0 KiB \(2048 bytes\) here"):
        plan.check()
    make_plan([row("a", "/x", 1024)], {"/x": (1, 1024)}).check()


def test_free_space_of_an_archive_that_is_still_to_be_made(tmp_path: Path) -> None:
    number, free = free_space(str(tmp_path / "not" / "yet"))
    assert number == tmp_path.stat().st_dev
    found = os.statvfs(tmp_path)
    assert 0 < free <= found.f_blocks * found.f_frsize


def test_archive_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    number, _ = free_space(str(tmp_path / "file" / "archive"))
    assert number == tmp_path.stat().st_dev
