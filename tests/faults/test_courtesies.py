"""File systems that refuse what is only a courtesy: chmod, locks, the fsync of a folder.

What was asked for is done all the same, and a note says what could not be had.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archiveentries import add_entry
from batchjobs import check_archive, job, job_ends, make_image, run_jobs, write_jobs
from loopdisk import needs, run
from smallguests import OPTIONS, check_image, copy_of, left_in, make_guest, ramblocks_of
from strikes import refused as calls_refused

from uringmig import MappedRamWriter, SaveResult, verify
from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive, reindex
from uringmig.archive.restoring import OutputFormat, restore_file
from uringmig.errors import StorageError
from uringmig.storage.publication import Publication
from uringmig.storage.smallfile import publish_bytes


@contextlib.contextmanager
def bound(folder: Path, *options: str) -> Iterator[Path]:
    """A folder seen through FUSE."""
    needs("bindfs")
    source, point = folder / "source", folder / "point"
    source.mkdir()
    point.mkdir()
    run("bindfs", *options, str(source), str(point))
    try:
        yield point
    finally:
        run("umount", str(point))


def save(path: Path, number: int = 1) -> SaveResult:
    guest = make_guest(number)
    with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        result = writer.finish()
    check_image(path, copy_of(guest))
    assert not verify(path).mismatches
    return result


def test_refused_chmod_is_no_matter_where_the_mode_is_right(tmp_path: Path) -> None:
    with bound(tmp_path, "--chmod-deny") as folder:
        for number in (1, 2):
            result = save(folder / "vm", number)
            assert not any("others may read" in note for note in result.notes)
        assert left_in(folder) == ["vm", "vm.manifest.json"]


def test_refused_chmod_is_a_note_where_others_may_read(tmp_path: Path) -> None:
    """Library, small files, restores of both kinds."""
    with bound(tmp_path, "--chmod-deny", "--perms=a+rX") as folder:
        (note,) = [note for note in save(folder / "vm").notes if "others may read" in note]
        assert "keeps no modes (EPERM)" in note
        publish_bytes(folder / "small", b"small")
        with Archive.open(tmp_path / "archive", write=True) as archive:
            entry = add_entry(archive, "web")
            outputs: tuple[OutputFormat, ...] = ("hot", "plain")
            for output in outputs:
                done = restore_file(archive, entry.name, folder / output, output=output)
                assert any("others may read" in note for note in done.notes)
        assert left_in(folder) == [
            "hot", "hot.manifest.json", "plain", "small", "vm", "vm.manifest.json",
        ]  # fmt: skip


def test_command_line_tells_it_and_ends_well(tmp_path: Path) -> None:
    with bound(tmp_path, "--chmod-deny", "--perms=a+rX") as folder:
        with Archive.open(tmp_path / "archive", write=True) as archive:
            add_entry(archive, "web")
        done = subprocess.run(
            ["uringmig", "archive", "restore", tmp_path / "archive", "web", folder / "out"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "note: " in done.stderr
        assert "the file system keeps no modes" in done.stderr


def test_file_system_that_does_not_count_its_room_is_not_full(tmp_path: Path) -> None:
    """On ramfs all of statvfs is 0: that is no answer, and said to be none."""
    needs()
    make_image(tmp_path / "vm.mig")
    disk = tmp_path / "disk"
    disk.mkdir()
    run("mount", "-t", "ramfs", "none", str(disk))
    try:
        path = write_jobs(tmp_path, job("web", "image = 'vm.mig'", archive=str(disk / "archive")))
        for option in ("--dry-run", "--report=" + str(tmp_path)):
            ended = run_jobs(path, option)
            assert ended.code == 0, ended.err
            assert "does not say how much is free" in ended.err
        assert len(check_archive(disk / "archive")) == 1
    finally:
        run("umount", str(disk))


def refused(number: int) -> Any:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EROFS])
def test_whatever_chmod_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As fusefat (ENOSYS); a mode of a former file that cannot be changed."""
    (tmp_path / "vm.partial").touch(0o644)
    monkeypatch.setattr(os, "fchmod", refused(number))
    (note,) = [note for note in save(tmp_path / "vm").notes if "others may read" in note]
    assert errno.errorcode[number] in note


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_only_a_fresh_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Nobody can tell whether the writer of a file that was there lives, so it is left alone."""
    monkeypatch.setattr(fcntl, "flock", refused(number))
    assert any("has no locks" in note for note in save(tmp_path / "vm").notes)
    save(tmp_path / "vm", 2)
    (tmp_path / "vm.partial").write_bytes(b"somebody's")
    with pytest.raises(StorageError, match="remove it if no save is running"):
        Publication(tmp_path / "vm", sidecar=".json")
    assert (tmp_path / "vm.partial").read_bytes() == b"somebody's"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_an_archive_is_written_and_nothing_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Entries, notes of damage and removals are kept; what another may be writing is left alone."""
    monkeypatch.setattr(fcntl, "flock", refused(number))
    left = ["x.mig.journal", "x.mig.partial", "y.mig.manifest.json.partial", "y.mig.partial"]
    with Archive.open(tmp_path / "archive", write=True) as archive:
        add_entry(archive, "web")
        add_entry(archive, "old")
        for name in left:
            (archive.path / name).write_bytes(b"another's")
    with Archive.open(tmp_path / "archive", write=True) as archive:
        assert ["has no locks" in note for note in archive.notes] == [True]
        archive.remove("old")
        damage = Damage(0, "it is so", "2026-01-01T00:00:00+00:00")
        archive.note_checked(archive.find("web"), cursor=0, verified_at=None, damaged=[damage])
        assert archive.unkept == ""
    with Archive.open(tmp_path / "archive", write=False) as archive:
        assert [entry.name for entry in archive.entries()] == ["web"]
        assert archive.damage("web") == [damage]
        assert not archive.notes
    assert {name for name in left_in(tmp_path / "archive") if "partial" in name} == set(left[1:])
    assert reindex(tmp_path / "archive").entries == 1


def test_a_run_without_locks_is_done_with_a_warning(tmp_path: Path) -> None:
    """It says so once, and does not take another's interrupted copy for leftovers of its own."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("web", "image = 'vm.mig'"))
    Archive.open(tmp_path / "archive", write=True).close()
    for name in ("x.mig.partial", "x.mig.journal"):
        (tmp_path / "archive" / name).write_bytes(b"another's")
    ended = calls_refused(tmp_path, "flock", "ENOLCK", "archive", "run", path, "--json", only=())
    assert ended.code == 1
    assert ended.err.count("warning: ") == 1
    assert "has no locks (ENOLCK): let no second process" in ended.err
    assert job_ends(ended)["web"]["stage"] == "done"
    assert (tmp_path / "archive" / "x.mig.partial").read_bytes() == b"another's"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_folder_that_cannot_be_synced_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some FUSE and network file systems do not know an fsync of a folder; EIO is another thing."""
    monkeypatch.setattr(os, "fsync", refused(number))
    assert any("when a name is durable" in note for note in save(tmp_path / "vm").notes)
    monkeypatch.setattr(os, "fsync", refused(errno.EIO))
    with pytest.raises(StorageError, match="EIO"):
        save(tmp_path / "vm", 2)
    assert left_in(tmp_path) == ["vm", "vm.manifest.json"]
    check_image(tmp_path / "vm", copy_of(make_guest(1)))


def test_partial_file_is_taken_over_where_files_have_another_owner(tmp_path: Path) -> None:
    """Some file systems give every file one owner: a killed save's is ours all the same."""
    with bound(tmp_path, "--force-user=nobody") as folder:
        (folder / "vm.partial").write_bytes(b"left by a killed save")
        save(folder / "vm")
        assert left_in(folder) == ["vm", "vm.manifest.json"]
