"""Too few descriptors: a limit of this process is told as that, and never as a fault of a file."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archiveentries import add_cold_entry, add_entry, put_damage
from smallguests import left_in

from uringmig import StorageError, UringmigError, verify
from uringmig.archive.catalogue import Catalogue
from uringmig.archive.checking import verify_archive
from uringmig.archive.coldread import open_cold
from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.archive.restoring import restore_file
from uringmig.batch.messages import failure
from uringmig.cli.jobfile import read_job_text
from uringmig.contents.source import all_rows
from uringmig.errors import LimitError, StorageLimitError
from uringmig.options import ReadOptions

RECORDED = Damage(0, "it was so", "2026-01-01T00:00:00+00:00")


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Have this process get no more than ``count`` further descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = [os.open("/", os.O_RDONLY) for _ in range(count)]
    # From the first number that is free now, whatever is open above it.
    number = os.open("/", os.O_RDONLY)
    for fd in (*lowest, number):
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def listed(folder: Path) -> None:
    with Archive.open(folder / "a", write=False) as archive:
        assert [entry.damaged_chunks for entry in archive.entries()] == [0, 1]
        assert archive.damage("y") == [RECORDED]
        assert not archive.notes


def verified(folder: Path) -> None:
    with Archive.open(folder / "a", write=True) as archive:
        assert not verify_archive(archive, names=["x"]).damaged


def compared(folder: Path) -> None:
    with Archive.open(folder / "a", write=False) as archive:
        image = archive.find("x").image
        if image.endswith(".mig"):
            assert not verify(image).mismatches
        else:
            with open_cold(image, options=ReadOptions()) as contents:
                assert list(contents.windows(all_rows(contents.blocks)))


def restored(folder: Path) -> None:
    with Archive.open(folder / "a", write=False) as archive:
        restore_file(archive, "x", folder / "out")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_limit_is_told_by_the_errno_wherever_it_is_met(number: int) -> None:
    error = StorageError("cannot open", errno=number, path="/a/b")
    assert isinstance(error, StorageLimitError)
    assert isinstance(error, LimitError)
    assert (error.exit_code, error.may_pass) == (6, True)
    assert (error.errno, error.path) == (number, "/a/b")
    assert str(error).startswith(f"/a/b: cannot open: {os.strerror(number)} (")
    assert "; " in str(error), "no cure"
    assert failure("job", error).exit_code == 6
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("number", [None, errno.EIO, errno.EMFILE])
def test_an_error_can_be_made_the_way_a_cluster_carries_it(number: int | None) -> None:
    """Dask has its errors made without arguments, by ``__new__``, and filled in afterwards."""
    error = StorageError("cannot open", errno=number, path="/a/b")
    copy = type(error).__new__(type(error))
    vars(copy).update(vars(error))
    copy.args = error.args
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("number", [None, errno.EIO, errno.EAGAIN, errno.ENOSPC])
def test_what_is_said_of_the_file_is_no_limit(number: int | None) -> None:
    """EAGAIN is: another process holds a lock on it."""
    error = StorageError("cannot lock", errno=number)
    assert not isinstance(error, LimitError)
    assert error.exit_code == 5


def test_the_catalogue_says_so_too(tmp_path: Path) -> None:
    """SQLite only says that it cannot open a file."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        add_entry(archive, "x")
    ends = []
    for count in range(8):
        with descriptors_left(count):
            try:
                ends.append(len(Catalogue(tmp_path / "a").rows()))
            except StorageError as error:
                ends.append(error.exit_code)
    assert sorted(ends, reverse=True) == ends
    assert set(ends) == {6, 1}


def test_a_job_file_that_cannot_be_opened_for_want_of_descriptors(tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").touch()
    with descriptors_left(0), pytest.raises(LimitError):
        read_job_text(tmp_path / "jobs.toml")


@pytest.mark.parametrize("add", [add_entry, add_cold_entry], ids=["hot", "cold"])
@pytest.mark.parametrize("act", [listed, verified, compared, restored])
def test_no_entry_is_damaged_for_want_of_descriptors(
    tmp_path: Path, add: Callable[..., Entry], act: Callable[[Path], None]
) -> None:
    """However many there are: what looks at an entry does it, or ends by the limit."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        add(archive, "x")
        add(archive, "y")
        put_damage(archive, "y", RECORDED)
    act(tmp_path)  # what is loaded only when it is needed is there
    before = left_in(tmp_path / "a")
    codes = []
    for count in range(16):
        with descriptors_left(count):
            codes.append(exit_code_of(act, tmp_path))
        assert left_in(tmp_path / "a") == before
    enough = codes.index(0)
    assert codes == [6] * enough + [0] * (16 - enough)
    assert enough
    listed(tmp_path)


def exit_code_of(act: Callable[[Path], None], folder: Path) -> int:
    try:
        act(folder)
    except UringmigError as error:
        return error.exit_code
    return 0
