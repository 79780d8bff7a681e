"""The run's journal as a file: torn ends are cut off, a full disk ends it and not the run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batchjobs import check_archive, job, job_ends, make_image, run_jobs, summary_of, write_jobs
from loopdisk import mounted
from strikes import refused

from uringmig.archive.directory import Archive
from uringmig.batch.journal import Begun, RunState, Started, digest_text, encode, replay
from uringmig.batch.record import RunRecord, read_state
from uringmig.errors import StorageError
from uringmig.units import KiB, MiB

BEGUN = Begun(job_file="/j", job_digest="d", time="T", at=1.0)


def test_begun_gone_on_with_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / ".run"
    assert read_state(path) == RunState()
    record = RunRecord(path)
    record.begin(BEGUN)
    record.append(Started(job="a", entry="a-T"))
    record.close()
    record.close()
    with path.open("ab") as file:
        file.write(encode(Started(job="b", entry="b-T"))[:-5])
    state = read_state(path)
    assert state.started == {"a": "a-T"}
    again = RunRecord(path)
    again.go_on(state)
    again.append(Started(job="c", entry="c-T"))
    again.close()
    assert read_state(path).started == {"a": "a-T", "c": "c-T"}
    assert read_state(path).length == path.stat().st_size
    RunRecord(path).begin(BEGUN)
    assert read_state(path).started == {}
    assert [one.name for one in tmp_path.iterdir()] == [".run"]


def test_full_disk_is_told_once_and_leaves_what_was_durable(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, size=8 * MiB) as folder:
        record = RunRecord(folder / ".run")
        record.begin(BEGUN)
        for size in (MiB, 4 * KiB, 4 * KiB):
            # What was set aside for metadata is given back once that is written.
            with contextlib.suppress(OSError), (folder / "fill").open("ab", buffering=0) as fill:
                while True:
                    fill.write(bytes(size))
            os.sync()
        for number in range(2000):
            record.append(Started(job=f"job{number}", entry="e"))
        assert "the journal ends here: No space left" in record.trouble
        trouble = record.trouble
        record.append(Started(job="more", entry="e"))
        assert record.trouble == trouble
        record.close()
        state = replay((folder / ".run").read_bytes())
        assert state.begun == BEGUN
        assert "more" not in state.started
        with pytest.raises(StorageError, match=r"\.other.*ENOSPC"):
            RunRecord(folder / ".other").begin(BEGUN)
        assert not list(folder.glob(".other*"))


def test_journal_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ".run").mkdir()
    with pytest.raises(StorageError, match="cannot read the journal"):
        read_state(tmp_path / ".run")


def interrupted(path: Path, *, at: float) -> Path:
    """An archive with the journal of a run of the job file that did nothing; the journal."""
    archive = path.with_name("archive")
    Archive.open(archive, write=True).close()
    journal = archive / f".jobs-{digest_text(str(path))[:8]}.run"
    digest = digest_text(path.read_text())
    RunRecord(journal).begin(Begun(job_file=str(path), job_digest=digest, time="T", at=at))
    return journal


TROUBLES = [
    ("read", "EIO", "", ["begins anew"]),
    ("pwrite64", "ENOSPC", ".partial", ["if the run is interrupted"]),
    ("ftruncate", "EIO", "", ["if the run is interrupted"]),
    ("write", "EIO", "", ["the journal ends here"]),
]


@pytest.mark.parametrize(("call", "error", "suffix", "told"), TROUBLES)
def test_trouble_with_the_journal_is_a_warning_and_costs_no_night(
    tmp_path: Path, call: str, error: str, suffix: str, told: list[str]
) -> None:
    """Not read, not begun, not gone on with, not appended to: every job is done, and 1 is said."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("web", "image = 'vm.mig'"))
    journal = interrupted(path, at=time.time() if call == "ftruncate" else 0.0)
    ended = refused(
        *(tmp_path, call, error, "archive", "run", path, "--json", "--report", tmp_path / "r"),
        only=[Path(f"{journal}{suffix}")],
    )
    assert ended.code == 1, ended.err
    assert job_ends(ended)["web"]["stage"] == "done"
    assert check_archive(tmp_path / "archive")
    (report,) = (tmp_path / "r").glob("*.json")
    for warnings in (summary_of(ended)["warnings"], json.loads(report.read_bytes())["warnings"]):
        assert [text in one for text, one in zip(told, warnings, strict=True)] == [True], warnings
    assert ended.err.count("warning: ") == 1
    assert str(journal) in ended.err


def test_something_else_in_the_place_of_the_journal_costs_no_night(tmp_path: Path) -> None:
    """A folder can neither be read nor replaced: both are told, if the run cannot begin as well."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("web", "image = 'vm.mig'"))
    journal = interrupted(path, at=0.0)
    journal.unlink()
    journal.mkdir()
    for options in (["--dry-run"], []):
        ended = run_jobs(path, *options)
        assert ended.code == 1
        assert ended.err.count("warning: ") == 2 - len(options), ended.err
    refused_run = ("--scheduler", "tcp://h:1", "--workers", 2, "--report", tmp_path / "r")
    assert run_jobs(path, *refused_run).code == 2
    (report,) = (tmp_path / "r").glob("*.json")
    assert len(json.loads(report.read_bytes())["warnings"]) == 2
    journal.rmdir()
    assert check_archive(tmp_path / "archive")


def test_a_record_is_durable_when_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning is synced before it has its name, a record before `append` returns."""
    steps: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        real: Callable[..., Any] = getattr(os, name)

        def step(what: int | str, *others: Any) -> Any:
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else what
            steps.append(f"{name} {Path(path).name}")
            return real(what, *others)

        return step

    for name in ("write", "fdatasync", "fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name))
    record = RunRecord(tmp_path / ".run")
    record.begin(BEGUN)
    assert steps == ["fdatasync .run.partial", "rename .run.partial", f"fsync {tmp_path.name}"]
    steps.clear()
    record.append(Started(job="a", entry="a-T"))
    assert steps == ["write .run", "fdatasync .run"]
    record.close()


def test_what_names_guests_is_its_owner_s_only(tmp_path: Path) -> None:
    """Journal and reports, whatever the umask; metrics are for a collector of another user."""
    mask = os.umask(0)
    try:
        make_image(tmp_path / "vm.mig")
        path = write_jobs(tmp_path, job("web", "image = 'vm.mig'"))
        assert not run_jobs(
            path, "--report", tmp_path / "reports", "--metrics-file", tmp_path / "u.prom"
        ).code
    finally:
        os.umask(mask)
    written = [*(tmp_path / "reports").iterdir(), *(tmp_path / "archive").iterdir()]
    assert len(written) >= 5
    assert {file.name: file.stat().st_mode & 0o077 for file in written if file.is_file()} == {
        file.name: 0 for file in written if file.is_file()
    }
    assert (tmp_path / "u.prom").stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.rglob("*.partial"))
