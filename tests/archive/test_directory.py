"""An archive's folder and its catalogue: entries whole or not at all, whoever is killed when."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from archiveentries import add_entry, publish_hot_image, put_damage
from otheruser import let_everybody_search
from smallguests import left_in, make_guest

from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive, reindex
from uringmig.archive.entry import check_name, read_entry
from uringmig.errors import FormatError, MismatchError, StateError, StorageError


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(tmp_path / "a", write=True) as archive:
        yield archive


def test_entry_is_found_by_readers_and_after_reopening(archive: Archive) -> None:
    made = add_entry(archive, "one", vm="web1")
    assert made.image == str(archive.path / "one.mig")
    with Archive.open(archive.path, write=False) as reader:
        assert reader.entries() == [made]
        assert reader.find("one") == made
        with pytest.raises(StateError, match="no entry 'two' among its 1"):
            reader.find("two")
        with pytest.raises(StateError, match="reading only"):
            reader.remove("one")
    archive.close()
    with Archive.open(archive.path, write=True) as again:
        assert again.entries() == [made]
        assert again.notes == []
    assert left_in(archive.path) == [
        ".lock",
        "catalogue.sqlite",
        "one.mig",
        "one.mig.manifest.json",
    ]


def test_entries_are_in_the_order_they_were_made(archive: Archive) -> None:
    # The first is the newest, since it is said in another time zone.
    add_entry(archive, "a", created="2026-01-01T00:30:00-02:00")
    add_entry(archive, "b", created="2026-01-01T01:00:00+00:00")
    add_entry(archive, "c", created="2025-12-31T00:00:00+00:00", vm="other")
    assert [entry.name for entry in archive.entries()] == ["c", "b", "a"]
    newest = archive.latest_of("web1")
    assert newest is not None
    assert newest.name == "a"
    assert archive.latest_of("web1", tier="cold") is None
    assert archive.latest_of("nobody") is None


def test_damaged_entry_is_not_the_latest(archive: Archive) -> None:
    add_entry(archive, "a", created="2026-01-01T00:00:00+00:00")
    add_entry(archive, "b", created="2026-01-02T00:00:00+00:00")
    put_damage(archive, "b", Damage(3, "chunk 3 differs", "2026-01-03T00:00:00+00:00"))
    assert archive.find("b").condition == "damaged"
    newest = archive.latest_of("web1")
    assert newest is not None
    assert newest.name == "a"


def test_removed_entry_leaves_nothing(archive: Archive) -> None:
    add_entry(archive, "one")
    two = add_entry(archive, "two")
    archive.remove("one")
    assert archive.entries() == [two]
    assert not list(archive.path.glob("one*"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-rf", "a\nb", "a\0b",
             "x" * 201, "é" * 101, "vm,offset=4", "a\x1b[2J", "\udc80"]
)  # fmt: skip
def test_unusable_name_is_refused(archive: Archive, name: str) -> None:
    with pytest.raises(StateError, match="no name for an entry"):
        archive.place(name, "hot")


@pytest.mark.parametrize(
    "name", ["a", "x" * 200, "é" * 100, "vm 1", "a.mig", "web1-2026-01-01T00:00"]
)
def test_usable_name_is_taken(archive: Archive, name: str) -> None:
    check_name(name)
    assert add_entry(archive, name).name == name


def test_name_is_taken_once_for_both_tiers(archive: Archive) -> None:
    add_entry(archive, "one")
    for tier in ("hot", "cold"):
        with pytest.raises(StateError, match="already"):
            archive.place("one", tier)


def test_second_writer_is_refused_and_readers_are_not(archive: Archive) -> None:
    add_entry(archive, "one")
    with pytest.raises(StorageError, match=rf"another process \(process {os.getpid()}\)"):
        Archive.open(archive.path, write=True)
    with pytest.raises(StorageError, match="another process"):
        reindex(archive.path)
    # In the middle of a write, too.
    with archive.catalogue._writing() as connection:
        connection.execute("UPDATE entries SET removing = 1")
        with Archive.open(archive.path, write=False) as reader:
            assert [entry.name for entry in reader.entries()] == ["one"]


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from uringmig.archive.directory import Archive\n"
        "archive = Archive.open(sys.argv[1], write=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False)
    Archive.open(tmp_path / "a", write=True).close()


def test_what_is_no_archive_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "vm.mig.partial").write_text("of a save elsewhere")
    for write in (True, False):
        with pytest.raises(StateError, match="no archive"):
            Archive.open(tmp_path / "mine", write=write)
    with pytest.raises(StateError, match="no archive"):
        reindex(tmp_path / "mine")
    assert left_in(tmp_path / "mine") == ["vm.mig.partial"]
    for path in (tmp_path / "nothing", tmp_path / "mine" / "vm.mig.partial"):
        with pytest.raises(StateError, match="no such folder"):
            Archive.open(path, write=False)
    with pytest.raises(StorageError, match="ENOENT"):
        Archive.open(tmp_path / "no" / "parent", write=True)


def test_fresh_file_system_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "lost+found").mkdir(parents=True)
    Archive.open(tmp_path / "a", write=True).close()


def test_catalogue_from_manifests_alone_equals_the_original(archive: Archive) -> None:
    for number in range(5):
        add_entry(archive, f"e{number}", seed=number, vm=f"vm{number % 2}",
                  created=f"2026-01-0{number + 1}T00:00:00+00:00")  # fmt: skip
    archive.remove("e3")
    original = archive.entries()
    archive.close()
    (archive.path / "catalogue.sqlite").unlink()
    with Archive.open(archive.path, write=False) as reader:
        assert reader.entries() == original, "read from the manifests"
    report = reindex(archive.path)
    assert (report.entries, report.problems) == (4, ())
    with Archive.open(archive.path, write=False) as reader:
        assert reader.catalogue.exists
        assert reader.entries() == original
    (archive.path / "catalogue.sqlite").unlink()
    with Archive.open(archive.path, write=True) as writer:
        assert writer.entries() == original


def test_reindex_keeps_what_verification_knows_of_the_same_file(archive: Archive) -> None:
    for name in ("good", "bad", "new"):
        add_entry(archive, name)
    at = "2026-01-03T00:00:00+00:00"
    archive.note_checked(archive.find("good"), cursor=0, verified_at=at)
    bad = [Damage(1, "chunk 1", at)]
    archive.note_checked(archive.find("bad"), cursor=2, verified_at=None, damaged=bad)
    original = archive.entries()
    archive.close()
    assert reindex(archive.path).kept_verification == 2
    with Archive.open(archive.path, write=False) as reader:
        assert reader.entries() == original
        assert reader.damage("bad") == bad
    # Another file with the same bytes is the same entry; other bytes are another one.
    sidecar = archive.path / "good.mig.manifest.json"
    shutil.copy(sidecar, archive.path / "copy")
    (archive.path / "copy").rename(sidecar)
    assert reindex(archive.path).kept_verification == 2
    sidecar.write_bytes(sidecar.read_bytes() + b" ")
    reindex(archive.path)
    with Archive.open(archive.path, write=False) as reader:
        assert reader.find("good").condition == "damaged"


def test_reindex_believes_the_manifests_and_changes_a_whole_catalogue_in_place(
    archive: Archive,
) -> None:
    """What rotted in a value is put right; a reader that has it open looks at the same file."""
    entry = add_entry(archive, "one")
    archive.close()
    catalogue = archive.path / "catalogue.sqlite"
    with closing(sqlite3.connect(catalogue)) as connection, connection:
        connection.execute(
            "UPDATE entries SET vm = 'rotted', "
            "record = json_set(record, '$.vm', 'rotted', '$.memory_bytes', 7)"
        )
    inode = catalogue.stat().st_ino
    with closing(sqlite3.connect(catalogue, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT vm FROM entries").fetchall() == [("rotted",)]
        reader.execute("COMMIT")
        assert reindex(archive.path).entries == 1
        assert reader.execute("SELECT vm FROM entries").fetchall() == [("web1",)]
    assert catalogue.stat().st_ino == inode
    with Archive.open(archive.path, write=False) as again:
        assert again.entries() == [entry]


# What a killed writer leaves.


def test_image_that_is_not_in_the_catalogue_yet_is_added(archive: Archive) -> None:
    image = archive.place("one", "hot").image
    publish_hot_image(image, make_guest(ram_bytes=1 << 19))
    archive.close()
    with Archive.open(archive.path, write=True) as again:
        assert again.healed.added == ["one"]
        assert again.entries() == [read_entry(image)]


def test_entry_whose_files_are_gone_is_missing_whatever_is_lost_with_them(archive: Archive) -> None:
    """No known entry leaves an archive by itself, not with its catalogue either."""
    for name in ("a", "b", "c"):
        add_entry(archive, name)
    (archive.path / "a.mig").unlink()
    (archive.path / "b.mig").unlink()
    (archive.path / "b.mig.manifest.json").unlink()
    expected = {"a": "missing", "b": "missing", "c": "unchecked"}
    assert {entry.name: entry.condition for entry in archive.entries()} == expected
    archive.close()
    Archive.open(archive.path, write=True).close()
    (archive.path / "catalogue.sqlite").unlink()
    for write in (False, True, False):
        with Archive.open(archive.path, write=write) as again:
            assert {entry.name: entry.condition for entry in again.entries()} == expected
    reindex(archive.path)
    with Archive.open(archive.path, write=True) as again:
        with pytest.raises(StateError, match="--forget b"):
            again.place("b", "hot")
        again.remove("a", "b")
        assert [entry.name for entry in again.entries()] == ["c"]
    assert left_in(archive.path) == [
        ".lock", "c.mig", "c.mig.manifest.json", "catalogue.sqlite"
    ]  # fmt: skip


def test_publication_that_lacks_only_its_last_rename_is_finished(archive: Archive) -> None:
    entry = add_entry(archive, "one")
    archive.close()
    sidecar = Path(entry.manifest)
    sidecar.rename(f"{sidecar}.partial")
    with Archive.open(archive.path, write=True) as again:
        assert again.healed.published == ["one"]
        assert [found.name for found in again.entries()] == ["one"]
        assert again.notes == []


def test_image_with_anothers_manifest_is_not_published(archive: Archive) -> None:
    entry = add_entry(archive, "one")
    archive.close()
    sidecar = Path(entry.manifest)
    sidecar.rename(f"{sidecar}.partial")
    os.truncate(entry.image, 100 * 4096)
    with Archive.open(archive.path, write=True) as again:
        assert [entry.condition for entry in again.entries()] == ["missing"]
        assert "length is not its manifest's" in again.notes[0]
    assert (archive.path / "one.mig").exists(), "nothing that might be somebody's is removed"


def test_partial_files_go_unless_they_can_go_on_or_are_being_written(archive: Archive) -> None:
    archive.close()
    names = ["dead.mig.partial", "dead.mig.manifest.json.partial", "resumable.cold.partial",
             "resumable.cold.journal", "done.cold.journal", "written.mig.partial",
             "notes.txt", "notes.partial"]  # fmt: skip
    for name in names:
        (archive.path / name).write_text(name)
    with (archive.path / "written.mig.partial").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Archive.open(archive.path, write=True) as again:
            assert sorted(again.healed.cleared) == [
                "dead.mig.manifest.json.partial", "dead.mig.partial", "done.cold.journal"
            ]  # fmt: skip
            [place] = again.unfinished()
            assert place.image == again.path / "resumable.cold"
            again.discard(place)
            assert again.unfinished() == []
    assert left_in(archive.path) == [
        ".lock", "catalogue.sqlite", "notes.partial", "notes.txt", "written.mig.partial"
    ]  # fmt: skip


#: Does ACTION in copies of TEMPLATE, in a process of its own each, which dies before its n-th call;
#: the last one lives. Copies are named by n. One interpreter for all: starting it takes longest.
DEADLY = """
import os, shutil, signal, sqlite3, sys
tests, template, action = sys.argv[1:4]
sys.path.insert(0, tests)
from archiveentries import add_entry
from uringmig.archive.directory import Archive, reindex
connect = sqlite3.connect
def act(folder, step):
    made = []
    def die(name):
        made.append(name)
        if len(made) == step:
            os.kill(os.getpid(), signal.SIGKILL)
    def deadly(name, call):
        def wrapped(*args, **named):
            die(name)
            return call(*args, **named)
        return wrapped
    if action != "reindex":
        archive = Archive.open(folder, write=True)
    class Connection(sqlite3.Connection):
        def execute(self, sql, *args):
            die("sql " + sql.split()[0])
            return super().execute(sql, *args)
    sqlite3.connect = lambda *args, **named: connect(*args, factory=Connection, **named)
    for name in ("unlink", "rename", "fsync", "fdatasync"):
        setattr(os, name, deadly(name, getattr(os, name)))
    if action == "add":
        add_entry(archive, "new", seed=1, ram_bytes=1 << 16)
    elif action == "reindex":
        reindex(folder)
    else:
        archive.remove("old")
for step in range(1, 200):
    folder = f"{template}-{step}"
    shutil.copytree(template, folder, copy_function=shutil.copy2)
    child = os.fork()
    if not child:
        act(folder, step)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    if status == 0:
        break
print(step)
"""


def killed_at_every_step(template: Path, action: str) -> list[Path]:
    """Folders left by writers that died, in the order of their steps; the last one did not."""
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", DEADLY, tests, str(template), action]
    # Whoever dies leaves its temporary folder.
    environment = {**os.environ, "TMPDIR": str(template.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 10
    return [Path(f"{template}-{step}") for step in range(1, steps + 1)]


@pytest.mark.parametrize("action", ["add", "remove"])
def test_writer_killed_at_every_step(tmp_path: Path, action: str) -> None:
    """Before any call: the entry is whole or not there, and the next writer leaves nothing."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        add_entry(archive, "old", vm="old", ram_bytes=1 << 16)
    outcomes = []
    for folder in killed_at_every_step(archive.path, action):
        before = reader_sees(folder)
        with Archive.open(folder, write=True) as healed:
            names = [entry.name for entry in healed.entries()]
            assert healed.notes == []
            for entry in healed.entries():
                assert read_entry(Path(entry.image)) == entry
        files = {f"{name}.mig{suffix}" for name in names for suffix in ("", ".manifest.json")}
        assert set(left_in(folder)) == files | {".lock", "catalogue.sqlite"}
        assert set(before) <= set(names) | {"old"}
        outcomes.append(sorted(names))
    assert outcomes[0] == ["old"]
    assert outcomes[-1] == (["new", "old"] if action == "add" else [])
    assert outcomes == sorted(outcomes, key=lambda names: names != ["old"]), "there and back again"


@pytest.mark.parametrize("damaged", [False, True])
def test_reindex_killed_at_every_step(tmp_path: Path, damaged: bool) -> None:
    """A damaged catalogue stays so or is whole again; a whole one is never worse for it."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        entries = [add_entry(archive, name, ram_bytes=1 << 16) for name in ("a", "b")]
    if damaged:
        (archive.path / "catalogue.sqlite").write_bytes(b"rot" * 9999)
    files = {Path(path).name for one in entries for path in (one.image, one.manifest)}
    outcomes = []
    for folder in killed_at_every_step(archive.path, "reindex"):
        try:
            names = reader_sees(folder)
        except FormatError:
            assert damaged
            names = []
        else:
            assert names == ["a", "b"]
        outcomes.append(names)
        assert reindex(folder).entries == 2
        aside = {name for name in left_in(folder) if name.startswith("catalogue.sqlite.damaged-")}
        assert len(aside) == damaged
        assert set(left_in(folder)) - aside == files | {".lock", "catalogue.sqlite"}
    assert outcomes == sorted(outcomes)
    assert outcomes[-1] == ["a", "b"]


def test_readers_see_whole_entries_while_a_writer_comes_and_goes(tmp_path: Path) -> None:
    """Every entry a reader is given has its manifest and image, or is gone by the next look."""
    folder = tmp_path / "a"
    with Archive.open(folder, write=True) as archive:
        add_entry(archive, "stays")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from archiveentries import add_entry\n"
        "from uringmig.archive.directory import Archive\n"
        "end = time.monotonic() + 2\n"
        "while time.monotonic() < end:\n"
        "    with Archive.open(sys.argv[2], write=True) as archive:\n"
        "        add_entry(archive, 'comes', ram_bytes=1 << 16)\n"
        "        archive.remove('comes')\n"
    )
    tests = str(Path(__file__).parents[1])
    writer = subprocess.Popen([sys.executable, "-c", code, tests, str(folder)])
    looks = 0
    while writer.poll() is None:
        with Archive.open(folder, write=False) as reader:
            names = [entry.name for entry in reader.entries()]
            assert names in (["stays"], ["stays", "comes"], ["comes", "stays"])
            looks += 1
    assert writer.returncode == 0
    assert looks > 20
    assert [entry.name for entry in Archive.open(folder, write=False).entries()] == ["stays"]


def reader_sees(folder: Path) -> list[str]:
    """What a reader finds where a writer has just been killed; all of it is whole."""
    with Archive.open(folder, write=False) as reader:
        for entry in reader.entries():
            read_entry(Path(entry.image))
        return [entry.name for entry in reader.entries()]


# Hostile manifests.


def change(path: Path, **values: Any) -> None:
    said = json.loads(path.read_bytes())
    for name, value in values.items():
        (said["archive"] if name in said["archive"] else said)[name] = value
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    "values",
    [
        {"name": "../../etc/passwd"}, {"name": "two"}, {"name": 7}, {"tier": "warm"},
        {"tier": "cold"}, {"created": "yesterday"}, {"created": "2026-01-01T00:00:00"},
        {"file_size": 1}, {"file_size": -1}, {"memory_bytes": 1 << 63}, {"memory_bytes": -1},
        {"content_digest": "x"}, {"vm": "v" * 300}, {"archive": None}, {"source_path": None},
    ],
)  # fmt: skip
def test_manifest_of_something_else_is_a_problem_of_its_own(
    archive: Archive, values: dict[str, Any]
) -> None:
    good = add_entry(archive, "good")
    bad = add_entry(archive, "one")
    archive.close()
    shutil.copytree(archive.path, archive.path.parent / "known")
    # Where the catalogue knows the entry, it is damaged; where nothing does, it is none.
    change(archive.path.parent / "known" / Path(bad.manifest).name, **values)
    with Archive.open(archive.path.parent / "known", write=False) as known:
        assert known.find("one").condition == "damaged"
        assert known.find("good").condition == "unchecked"
    (archive.path / "catalogue.sqlite").unlink()
    change(Path(bad.manifest), **values)
    report = reindex(archive.path)
    with Archive.open(archive.path, write=True) as again:
        assert again.find("good") == good
        if "file_size" in values and values["file_size"] >= 0:
            assert again.find("one").condition == "damaged", "a manifest, but not this image's"
        else:
            assert again.entries() == [good]
            assert again.notes == list(report.problems)
            assert len(report.problems) == 1
            assert "one.mig" in report.problems[0]
    assert Path(bad.image).exists()


def test_manifest_that_is_no_plain_file_is_a_problem(archive: Archive, tmp_path: Path) -> None:
    entries = [add_entry(archive, name) for name in ("fifo", "link", "huge", "text", "folder")]
    archive.close()
    fifo, link, huge, text, folder = (Path(entry.manifest) for entry in entries)
    for path in (fifo, link, folder):
        path.rename(tmp_path / path.name)
    os.mkfifo(fifo)
    link.symlink_to(tmp_path / link.name)
    folder.mkdir()
    os.truncate(huge, 1 << 40)
    text.write_bytes(b"[" * 100_000)
    with Archive.open(archive.path, write=False) as reader:
        assert [entry.condition for entry in reader.entries()] == ["damaged"] * 5
    (archive.path / "catalogue.sqlite").unlink()
    report = reindex(archive.path)
    assert report.entries == 0
    assert len(report.problems) == 5


def test_image_of_another_length_is_told(archive: Archive) -> None:
    entry = add_entry(archive, "one")
    os.truncate(entry.image, 4096)
    with pytest.raises(MismatchError, match="length is not its manifest's"):
        read_entry(Path(entry.image))
    archive.close()
    with Archive.open(archive.path, write=True) as again:
        assert "another length" in again.find("one").trouble


def test_folder_that_cannot_be_written_is_read_all_the_same(archive: Archive) -> None:
    entry = add_entry(archive, "one")
    archive.close()
    code = (
        "import os, sys; from uringmig.archive.directory import Archive\n"
        "os.setuid(65534)\n"
        "print([e.name for e in Archive.open(sys.argv[1], write=False).entries()])"
    )
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    let_everybody_search(archive.path)
    for path in archive.path.iterdir():
        path.chmod(0o644)
    command = [sys.executable, "-c", code, str(archive.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"['{entry.name}']\n", done.stderr
    with contextlib.suppress(FileNotFoundError):
        (archive.path / "catalogue.sqlite-shm").unlink()
