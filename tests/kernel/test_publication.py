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


def noted_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Note every step in ``folder`` from now on: the call and the names it is about."""
    steps: list[tuple[str, ...]] = []

    def named(what: str | int) -> str:
        path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
        return str(path.relative_to(folder))

    def note(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def noted(*arguments: Any) -> Any:
            called = (name, *map(named, arguments))
            result = real(*arguments)
            steps.append(called)
            return result

        monkeypatch.setattr(os, name, noted)

    for name in ("fsync", "fdatasync", "rename", "unlink", "link"):
        note(name)
    return steps


def test_steps_come_in_the_order_that_no_crash_can_confuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is gone before the new file has its name; each step that must be first is synced."""
    published(tmp_path / "vm", b"old", b"old")
    publication = Publication(tmp_path / "vm", sidecar=".json")
    steps = noted_steps(tmp_path, monkeypatch)
    publication.publish(b"new")
    assert steps == [
        ("fdatasync", "vm.json.partial"),
        ("link", "vm", "vm.former~"),
        ("rename", "vm.json", "vm.json.former~"),
        ("fsync", "."),
        ("rename", "vm.partial", "vm"),
        ("fsync", "."),
        ("rename", "vm.json.partial", "vm.json"),
        ("fsync", "."),
        ("unlink", "vm.json.former~"),
        ("unlink", "vm.former~"),
    ]


@pytest.mark.parametrize("former", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_no_power_cut_mixes_two_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: bool, links: bool
) -> None:
    """Whatever of the steps since the last sync is forgotten, image and sidecar belong together."""
    if former:
        published(tmp_path / "vm", b"old", b"old")
    publication = Publication(tmp_path / "vm", sidecar=".json")
    if not links:
        monkeypatch.setattr(os, "link", refuse_with(errno.EPERM))
    steps = noted_steps(tmp_path, monkeypatch)
    publication.publish(b"new")
    safe = {"vm": "old", "vm.json": "old"} if former else {}
    safe |= {"vm.partial": "new"}
    # That its content is synced says nothing of a new file's name.
    pending: list[tuple[str, ...]] = [("create", "new", "vm.json.partial")]
    for step in steps:
        if step[0] == "fsync":
            safe, pending = after(safe, pending), []
        elif step[0] != "fdatasync":
            pending.append(step)
        for kept in range(1 << len(pending)):
            found = after(safe, [one for n, one in enumerate(pending) if kept >> n & 1])
            if "vm" in found and "vm.json" in found:
                assert found["vm"] == found["vm.json"], (step, found)
            if found.get("vm.json") == "new":
                assert found.get("vm") == "new", (step, found)
            if found.get("vm") == "new":
                # It has its sidecar, or healing finds it.
                assert "new" in (found.get("vm.json"), found.get("vm.json.partial")), (step, found)
            if former:
                assert "old" in (found.get("vm"), found.get("vm.former~")) or found["vm"] == "new"
    assert safe == {"vm": "new", "vm.json": "new"} | (
        {"vm.former~": "old", "vm.json.former~": "old"} if former else {}
    )


def after(names: dict[str, str], steps: list[tuple[str, ...]]) -> dict[str, str]:
    """What names there are when ``steps`` were done, and no others."""
    names = dict(names)
    for call, source, *to in steps:
        if call == "create":
            names[to[0]] = source
        if source not in names:
            continue
        if call == "link":
            names[to[0]] = names[source]
        elif call == "rename":
            names[to[0]] = names.pop(source)
        else:
            del names[source]
    return names


def refuse_with(number: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("sidecar", [b"new", None])
@pytest.mark.parametrize("steps", range(12))
def test_killed_publication_is_healed_by_the_next_writer(
    tmp_path: Path, steps: int, sidecar: bytes | None, links: bool
) -> None:
    """After a kill at any step: the old image with the old sidecar, or the new one's own."""
    published(tmp_path / "vm", b"old", b"old")
    pid = os.fork()
    if not pid:
        publication = Publication(tmp_path / "vm", sidecar=".json")
        publication.main.write_at(0, b"new")
        left = steps
        if not links:
            os.link = refuse_with(errno.EPERM)

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                if not left:
                    os._exit(1)
                left -= 1
                return real(*arguments, **named)

            return step

        for name in ("fsync", "fdatasync", "rename", "unlink", "link"):
            setattr(os, name, dying(getattr(os, name)))
        publication.publish(sidecar)
        os._exit(0)
    os.waitpid(pid, 0)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if "vm.json" in found and "vm" in found:
        assert found["vm"] == found["vm.json"]
    Publication(tmp_path / "vm", sidecar=".json").discard()
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    image, beside = names.pop("vm"), names.pop("vm.json", None)
    assert beside == (b"old" if image == b"old" else sidecar)
    assert not set(names) - {"vm.json.partial"}
    published(tmp_path / "vm", b"third", None)
    assert left_in(tmp_path) == ["vm"]


@pytest.mark.parametrize("name", ["rename", "fsync", "fdatasync", "unlink", "open", "link"])
@pytest.mark.parametrize("good", range(4))
@pytest.mark.parametrize("former", [True, False])
def test_step_that_fails_leaves_the_former_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, good: int, former: bool
) -> None:
    """EIO at any step: the former file and its sidecar, nothing half-made beside them."""
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
        assert left == ({"vm": b"old", "vm.json": b"old"} if former else {})
    else:
        monkeypatch.undo()
        assert (tmp_path / "vm").read_bytes() == (tmp_path / "vm.json").read_bytes() == b"new"
        # There is another way to keep the former file, and no need to remove it at once.
        assert calls <= good or name in ("link", "unlink")
        published(tmp_path / "vm", b"next", b"next")
        assert left_in(tmp_path) == ["vm", "vm.json"]


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


@pytest.mark.parametrize("kind", ["link", "fifo", "hard link"])
def test_sidecar_goes_into_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    """Whatever lies where the sidecar is written is replaced, and never written into."""
    (tmp_path / "precious").write_bytes(b"precious")
    place = tmp_path / "vm.json.partial"
    if kind == "link":
        place.symlink_to(tmp_path / "precious")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.hardlink_to(tmp_path / "precious")
    published(tmp_path / "vm", b"new", b"{}")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "vm.json").read_bytes() == b"{}"
    assert left_in(tmp_path) == ["precious", "vm", "vm.json"]


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


def test_name_too_long_for_its_sidecar_is_refused_at_once(tmp_path: Path) -> None:
    longest = 255 - len(".json.partial")
    Publication(tmp_path / ("n" * longest), sidecar=".json").discard()
    with pytest.raises(StateError, match="is 2 bytes too long"):
        Publication(tmp_path / ("ü" + "n" * longest), sidecar=".json")
    assert list(tmp_path.iterdir()) == []
