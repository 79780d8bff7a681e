"""Which names a file may be published under: links, folders, names that cannot be replaced."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopdisk import mounted, needs, run
from smallguests import left_in

from uringmig.errors import StateError, StorageError
from uringmig.storage.publication import Publication
from uringmig.storage.smallfile import publish_bytes

NOBODY = 65534


def published(path: str | Path, data: bytes = b"new", sidecar: bytes | None = b"new") -> None:
    publication = Publication(path, sidecar=".json")
    try:
        publication.main.write_at(0, data)
        publication.main.sync()
        publication.publish(sidecar)
    finally:
        publication.discard()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_link_is_followed(tmp_path: Path, there: bool, relative: bool) -> None:
    """The link stays; the file is where it leads to, its sidecar beside it, as QEMU would do."""
    big = tmp_path / "big"
    big.mkdir()
    if there:
        published(big / "vm", b"old", b"old")
    (tmp_path / "vm").symlink_to("big/vm" if relative else big / "vm")
    (tmp_path / "again").symlink_to("vm")
    published(tmp_path / "again")
    assert (tmp_path / "again").is_symlink()
    assert left_in(big) == ["vm", "vm.json"]
    assert (tmp_path / "vm").read_bytes() == b"new"
    assert left_in(tmp_path) == ["again", "big", "vm"]


def test_name_through_a_linked_folder_is_what_the_kernel_says(tmp_path: Path) -> None:
    """``link/../vm`` lies beside the folder the link leads to, not beside the link."""
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    published(f"{tmp_path}/link/../vm")
    assert left_in(tmp_path / "far") == ["away", "vm", "vm.json"]


@pytest.mark.parametrize("name", ["", "sub/", "vm/", ".", "sub/.", ".."])
def test_name_of_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A trailing slash says folder; what it stands before is not made into a file."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StateError):
        Publication(name, sidecar=".json")
    assert left_in(tmp_path) == ["sub"]


def test_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(StateError, match="loop"):
        Publication(tmp_path / "a", sidecar=".json")
    assert left_in(tmp_path) == ["a", "b"]


def test_link_to_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(StateError, match="not a regular file"):
        Publication(tmp_path / "null", sidecar=".json")
    with (tmp_path / "gone").open("w") as file:
        (tmp_path / "gone").unlink()
        with pytest.raises(StateError, match="has no name"):
            Publication(f"/proc/self/fd/{file.fileno()}", sidecar=".json")


@pytest.mark.parametrize("suffix", ["", ".json", ".former~", ".json.partial"])
def test_folder_under_any_name_is_refused_and_kept(tmp_path: Path, suffix: str) -> None:
    """Also an empty one, and before anything is written."""
    (tmp_path / f"vm{suffix}").mkdir()
    with pytest.raises(StateError):
        Publication(tmp_path / "vm", sidecar=".json")
    assert left_in(tmp_path) == [f"vm{suffix}"]


@contextlib.contextmanager
def bind_mounted(path: Path) -> Iterator[None]:
    """A file mounted over ``path``, as containers do with single files."""
    needs("mount")
    other = path.with_name("host")
    other.write_bytes(b"host")
    run("mount", "--bind", str(other), str(path))
    try:
        yield
    finally:
        run("umount", str(path))
        other.unlink()


@contextlib.contextmanager
def attribute(path: Path, letter: str) -> Iterator[None]:
    needs("chattr")
    run("chattr", f"+{letter}", str(path))
    try:
        yield
    finally:
        run("chattr", f"-{letter}", str(path))


@pytest.mark.parametrize("which", ["vm", "vm.json"])
@pytest.mark.parametrize("how", ["mount", "immutable", "append-only", "folder append-only"])
def test_name_that_cannot_be_replaced_is_refused_before_a_byte(
    tmp_path: Path, which: str, how: str
) -> None:
    """The former file keeps its sidecar, and no partial file is made."""
    with mounted("ext4", tmp_path, size=16 << 20) as folder:
        published(folder / "vm", b"old", b"old")
        before = left_in(folder)
        match how:
            case "mount":
                trouble = bind_mounted(folder / which)
            case "immutable":
                trouble = attribute(folder / which, "i")
            case "append-only":
                trouble = attribute(folder / which, "a")
            case _:
                trouble = attribute(folder, "a")
        with trouble, pytest.raises(StorageError, match=r"cannot be (replaced|published)"):
            Publication(folder / "vm", sidecar=".json")
        assert left_in(folder) == before
        assert (folder / "vm").read_bytes() == (folder / "vm.json").read_bytes() == b"old"
        published(folder / "vm")


AS_NOBODY = """
import os, sys
from uringmig.errors import UringmigError
from uringmig.storage.publication import Publication
os.setgid(65534); os.setuid(65534)
try:
    publication = Publication(sys.argv[1], sidecar=".json")
    publication.main.write_at(0, b"new")
    publication.publish(b"new")
except UringmigError as error:
    sys.exit(f"{error.exit_code} {error}")
print("\\n".join(publication.notes))
"""


def as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    """Publish as another user."""
    needs()
    for folder in path.parents:
        if folder != Path("/") and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 1)
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(path)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("theirs", ["vm", "vm.json", "vm.json.partial"])
def test_file_of_another_in_a_sticky_folder_is_refused_before_a_byte(
    tmp_path: Path, theirs: str
) -> None:
    """As an image that libvirt has given to QEMU's user."""
    folder = tmp_path / "sticky"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / theirs).write_bytes(b"old")
    done = as_nobody(folder / "vm")
    assert done.returncode
    assert done.stderr.startswith("5 ")
    assert "another user's" in done.stderr
    assert left_in(folder) == [theirs]


def test_folder_that_may_be_written_and_not_read(tmp_path: Path) -> None:
    """Its fsync needs an open that is refused; names are made durable another way."""
    folder = tmp_path / "drop"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o300)
    done = as_nobody(folder / "vm")
    assert (done.returncode, done.stderr) == (0, "")
    assert left_in(folder) == ["vm", "vm.json"]


@pytest.mark.parametrize("kind", ["foreign", "linked", "fifo"])
def test_partial_file_of_another_is_not_taken_over(tmp_path: Path, kind: str) -> None:
    """Whoever laid it there could read the memory that is written into it."""
    needs()
    theirs = tmp_path / "vm.partial"
    if kind == "fifo":
        os.mkfifo(theirs)
    else:
        theirs.write_bytes(b"theirs")
    if kind == "linked":
        (tmp_path / "precious").hardlink_to(theirs)
    else:
        os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(StorageError, match=r"another user|another name|not a regular"):
        Publication(tmp_path / "vm", sidecar=".json")
    if kind != "fifo":
        assert theirs.read_bytes() == b"theirs"


def test_small_file_is_whole_private_and_follows_links(tmp_path: Path) -> None:
    """Whatever the umask; a failed one leaves the former content."""
    (tmp_path / "real").mkdir()
    (tmp_path / "note").symlink_to("real/note")
    mask = os.umask(0)
    try:
        publish_bytes(tmp_path / "note", b"one")
        publish_bytes(tmp_path / "open", b"all", mode=0o644)
    finally:
        os.umask(mask)
    assert (tmp_path / "real/note").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o644
    mask = os.umask(0o777)
    try:
        publish_bytes(tmp_path / "open", b"again", mode=0o644)
    finally:
        os.umask(mask)
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o644
    assert left_in(tmp_path) == ["note", "open", "real"]


def test_files_of_others_beside_the_name_stay(tmp_path: Path) -> None:
    """Copies that somebody keeps under names that look much like ours."""
    theirs = ["vm.former", "vm.old", "vm.bak", "vm~", "vm.json.former"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    for data in (b"one", b"two"):
        published(tmp_path / "vm", data, data)
    assert left_in(tmp_path) == sorted([*theirs, "vm", "vm.json"])
    assert {(tmp_path / name).read_text() for name in theirs} == {"mine"}
