"""The name comes last: what is synced before, and what is left when a step of it fails."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from smallguests import left_in

from uringmig.errors import StateError, StorageError
from uringmig.storage.publication import Publication


def published(path: Path, data: bytes, sidecar: bytes | None) -> None:
    publication = Publication(path, sidecar=".json")
    publication.main.write_at(0, data)
    publication.main.sync()
    publication.publish(sidecar)


def test_name_is_given_to_a_whole_file(tmp_path: Path) -> None:
    publication = Publication(tmp_path / "vm", sidecar=".json")
    publication.main.write_at(0, b"image")
    assert left_in(tmp_path) == ["vm.partial"]
    publication.publish(b"{}")
    assert left_in(tmp_path) == ["vm", "vm.json"]
    assert (tmp_path / "vm").read_bytes() == b"image"
    assert (tmp_path / "vm.json").read_bytes() == b"{}"
    publication.discard()
    assert left_in(tmp_path) == ["vm", "vm.json"]


def test_steps_come_in_the_order_that_no_crash_can_confuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old sidecar goes durably before the new file comes; the folder is synced last."""
    published(tmp_path / "vm", b"old", b"old")
    publication = Publication(tmp_path / "vm", sidecar=".json")
    steps: list[str] = []

    def note(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def noted(*arguments: Any) -> Any:
            what = arguments[0]
            what = str(Path(f"/proc/self/fd/{what}").readlink()) if isinstance(what, int) else what
            steps.append(f"{name} {what.removeprefix(str(tmp_path))}")
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "fdatasync", "rename", "unlink"):
        note(name)
    publication.publish(b"new")
    assert steps == [
        "fdatasync /vm.json.partial",
        "unlink /vm.json",
        "fsync ",
        "rename /vm.partial",
        "rename /vm.json.partial",
        "fsync ",
    ]


@pytest.mark.parametrize("name", ["rename", "fsync", "fdatasync", "unlink", "open"])
@pytest.mark.parametrize("good", range(3))
@pytest.mark.parametrize("former", [True, False])
def test_step_that_fails_leaves_the_former_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, good: int, former: bool
) -> None:
    """EIO at any step: no new file under the name, nothing half-made beside it."""
    if former:
        published(tmp_path / "vm", b"old", b"old")
    publication = Publication(tmp_path / "vm", sidecar=".json")
    publication.main.write_at(0, b"new")
    real, calls = getattr(os, name), 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == good + 1:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, failing)
    try:
        publication.publish(b"new")
    except StorageError as error:
        assert error.errno == errno.EIO  # noqa: PT017 - a step may not be there at all
        monkeypatch.undo()
        publication.discard()
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert left.pop("vm.json", b"old") == b"old"
        assert left in ({}, {"vm": b"old"})
    else:
        assert calls <= good
        monkeypatch.undo()
        assert (tmp_path / "vm").read_bytes() == b"new"


def test_discard_removes_the_partial_file_only(tmp_path: Path) -> None:
    published(tmp_path / "vm", b"old", b"old")
    publication = Publication(tmp_path / "vm", sidecar=".json")
    publication.discard()
    publication.discard()
    assert left_in(tmp_path) == ["vm", "vm.json"]


def test_partial_file_that_cannot_be_removed_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that failed and is read-only now: the next writer takes the file over."""
    publication = Publication(tmp_path / "vm", sidecar=".json")

    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "unlink", refuse)
    publication.discard()
    monkeypatch.undo()
    assert publication.main.fd == -1
    published(tmp_path / "vm", b"new", None)
    assert left_in(tmp_path) == ["vm"]


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_sidecar_goes_into_a_file_of_its_own_or_nowhere(tmp_path: Path, kind: str) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    place = tmp_path / "vm.json.partial"
    if kind == "link":
        place.symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(place)
    with pytest.raises(StorageError, match="cannot publish"):
        published(tmp_path / "vm", b"new", b"{}")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "vm").exists()


def test_lock_is_held_until_the_end_and_not_longer(tmp_path: Path) -> None:
    publication = Publication(tmp_path / "vm", sidecar=".json")
    with (tmp_path / "vm.partial").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with pytest.raises(StorageError, match="another save"):
        Publication(tmp_path / "vm", sidecar=".json")
    assert left_in(tmp_path) == ["vm.partial"], "the loser has removed the winner's file"
    publication.publish(None)
    with (tmp_path / "vm").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_file_is_for_its_owner_only_whatever_the_mask(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        published(tmp_path / "vm", b"secret", b"{}")
    finally:
        os.umask(mask)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o600] * 2


def test_relative_name_is_of_the_folder_it_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publication = Publication("vm", sidecar=".json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    publication.publish(b"{}")
    assert left_in(tmp_path) == ["elsewhere", "vm", "vm.json"]


def test_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "vm").symlink_to("target")
    published(tmp_path / "vm", b"image", None)
    assert (tmp_path / "target").read_text() == "mine"
    assert not (tmp_path / "vm").is_symlink()


def test_folder_under_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    with pytest.raises(StateError):
        Publication(tmp_path / "vm", sidecar=".json")
    assert left_in(tmp_path) == ["vm"]


def test_name_too_long_for_its_sidecar_is_refused_at_once(tmp_path: Path) -> None:
    longest = 255 - len(".json.partial")
    Publication(tmp_path / ("n" * longest), sidecar=".json").discard()
    with pytest.raises(StateError, match="is 2 bytes too long"):
        Publication(tmp_path / ("ü" + "n" * longest), sidecar=".json")
    assert list(tmp_path.iterdir()) == []
