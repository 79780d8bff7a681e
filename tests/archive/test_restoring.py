"""An entry back as a file: what was saved, or nothing; from either tier to either form."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archiveentries import add_cold_entry, add_entry, flip, place_of
from commandline import uringmig
from contentsreading import collect
from loopdisk import mounted
from pagecache import drop, resident_bytes
from smallguests import MIB, OPTIONS, check_image, copy_of, left_in, make_guest

from uringmig import verify
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.archive.restoring import OutputFormat, restore_file
from uringmig.contents.opening import open_contents
from uringmig.errors import MismatchError, StateError, StorageError
from uringmig.options import ReadOptions, WriteOptions
from uringmig.progress import Snapshot

RAM = 9 * MIB
TIERS = pytest.mark.parametrize("add", [add_entry, add_cold_entry], ids=["hot", "cold"])
OUTPUTS = pytest.mark.parametrize("output", ["hot", "plain"])

Add = Callable[..., Entry]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(tmp_path / "a", write=True) as archive:
        yield archive


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A name in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "vm"


@TIERS
def test_hot_file_is_the_image_that_was_saved(archive: Archive, add: Add, out: Path) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    done = restore_file(archive, "one", out, write=OPTIONS)
    check_image(out, copy_of(make_guest(ram_bytes=RAM)))
    report = verify(out)
    assert (report.mismatches, report.manifest_path) == ((), f"{out}.manifest.json")
    assert (done.path, done.memory_bytes) == (str(out), entry.memory_bytes)
    assert done.file_bytes == out.stat().st_size
    assert left_in(out.parent) == ["vm", "vm.manifest.json"]
    # The same guest from another tier is the same file.
    other = add_cold_entry if add is add_entry else add_entry
    other(archive, "two", ram_bytes=RAM)
    restore_file(archive, "two", out.with_name("other"), write=OPTIONS)
    assert out.read_bytes() == out.with_name("other").read_bytes()


@TIERS
def test_plain_file_holds_the_same_memory(archive: Archive, add: Add, out: Path) -> None:
    add(archive, "one", ram_bytes=RAM)
    out.write_text("former")
    Path(f"{out}.manifest.json").write_text("of the former")
    done = restore_file(archive, "one", out, output="plain")
    assert done.file_bytes == out.stat().st_size
    with open_contents(out) as contents:
        assert contents.kind == "plain"
        memory = collect(contents)
    assert {idstr: bytes(data) for idstr, data in memory.items()} == copy_of(
        make_guest(ram_bytes=RAM)
    )
    assert left_in(out.parent) == ["vm"]


@TIERS
@OUTPUTS
@pytest.mark.parametrize("chunk", [0, 3])
def test_damage_ends_the_restore_and_publishes_nothing(
    archive: Archive, add: Add, out: Path, output: OutputFormat, chunk: int
) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    out.write_text("former")
    offset, told = place_of(entry, chunk)
    flip(entry.image, offset)
    with pytest.raises(MismatchError, match=f"chunk.* at offset {told}"):
        restore_file(archive, "one", out, output=output)
    assert left_in(out.parent) == ["vm"]
    assert out.read_text() == "former"


@OUTPUTS
def test_damaged_device_state_ends_the_restore(
    archive: Archive, out: Path, output: OutputFormat
) -> None:
    entry = add_entry(archive, "one", ram_bytes=RAM, content_digest="ab" * 16)
    with pytest.raises(MismatchError, match="digest of the whole guest"):
        restore_file(archive, "one", out, output=output)
    assert left_in(out.parent) == []
    assert Path(entry.image).exists()


@TIERS
@OUTPUTS
def test_full_disk_is_told_and_nothing_is_left(
    archive: Archive, add: Add, tmp_path: Path, output: OutputFormat
) -> None:
    add(archive, "one", ram_bytes=24 * MIB)
    with mounted("ext4", tmp_path, size=8 * MIB) as disk:
        with pytest.raises(StorageError) as caught:
            restore_file(archive, "one", disk / "vm", output=output)
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert left_in(disk) == ["lost+found"]


def test_names_that_cannot_be(archive: Archive, out: Path) -> None:
    add_entry(archive, "one")
    with pytest.raises(StateError, match="no entry 'two'"):
        restore_file(archive, "two", out)
    with pytest.raises(StateError, match="in the archive itself"):
        restore_file(archive, "one", archive.path / "copy.mig")
    assert left_in(out.parent) == []


@TIERS
@OUTPUTS
def test_page_cache_stays_clean(
    archive: Archive, add: Add, out: Path, output: OutputFormat
) -> None:
    entry = add(archive, "one", ram_bytes=16 * MIB)
    drop(entry.image)
    restore_file(
        archive, "one", out, output=output,
        read=ReadOptions(direct="required"), write=WriteOptions(direct="required"),
    )  # fmt: skip
    assert resident_bytes(entry.image) < MIB
    assert resident_bytes(out) < MIB


@OUTPUTS
def test_progress_ends_with_publishing(archive: Archive, out: Path, output: OutputFormat) -> None:
    add_entry(archive, "one", ram_bytes=RAM)
    told: list[Snapshot] = []
    restore_file(archive, "one", out, output=output, progress=told.append)
    assert [snapshot.phase for snapshot in told][-2:] == ["sync", "publish"]
    assert all(0 <= snapshot.share <= 1 for snapshot in told)


def test_command_restores_and_refuses(archive: Archive, out: Path) -> None:
    entry = add_cold_entry(archive, "one", ram_bytes=RAM)
    folder = archive.path
    done = uringmig("archive", "restore", folder, "one", out, "--json")
    assert done.code == 0
    assert done.result()["content_digest"] == entry.content_digest
    check_image(out, copy_of(make_guest(ram_bytes=RAM)))
    plain = uringmig("archive", "restore", folder, "one", out, "--as", "plain")
    assert (plain.code, plain.out.count("plain stream of")) == (0, 1)
    for arguments in ([], [out, "--qmp", "/no/socket"]):
        neither = uringmig("archive", "restore", folder, "one", *arguments)
        assert neither.code == 2
        assert "say where to" in neither.err
    flip(entry.image, place_of(entry, 0)[0])
    bad = uringmig("archive", "restore", folder, "one", out.with_name("bad"))
    assert (bad.code, bad.out, bad.err.count("\n")) == (3, "", 1)
    assert not out.with_name("bad").exists()


def test_name_that_is_a_link_is_followed(archive: Archive, tmp_path: Path, out: Path) -> None:
    """To bigger storage, say: the link stays, and what looks at an image looks through it too."""
    add_entry(archive, "one", ram_bytes=RAM)
    link = tmp_path / "link"
    link.symlink_to(out)
    done = uringmig("archive", "restore", archive.path, "one", link, "--json")
    assert (done.code, done.result()["path"]) == (0, str(out))
    assert link.is_symlink()
    assert left_in(out.parent) == ["vm", "vm.manifest.json"]
    assert verify(link).manifest_path == f"{out}.manifest.json"
    shown = uringmig("inspect", link, "--json").result()
    assert shown["manifest_path"] == f"{out}.manifest.json"
    inside = tmp_path / "inside"
    inside.symlink_to(archive.path / "other.mig")
    with pytest.raises(StateError, match="in the archive itself"):
        restore_file(archive, "one", inside)


@pytest.mark.parametrize("where", ["new/", "out/", "loop", "file/"])
def test_name_of_no_file_is_2(archive: Archive, tmp_path: Path, out: Path, where: str) -> None:
    add_entry(archive, "one")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    before = left_in(tmp_path)
    done = uringmig("archive", "restore", archive.path, "one", f"{tmp_path}/{where}")
    assert done.code == 2
    assert left_in(tmp_path) == before
    assert left_in(out.parent) == []
    assert (tmp_path / "file").read_text() == "mine"
