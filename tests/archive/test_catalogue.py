"""A catalogue that is damaged, strange or hostile: said in one line, and made anew on request."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from archiveentries import add_entry, put_damage

from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive, reindex
from uringmig.errors import StorageError

AT = "2026-01-03T00:00:00+00:00"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed archive with entries and a known damage."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        for number in range(3):
            add_entry(archive, f"e{number}", ram_bytes=256 << 10)
        put_damage(archive, "e1", Damage(0, "chunk 0 differs", AT))
    return tmp_path / "a"


def recovered(folder: Path) -> str:
    """What a reader says of a catalogue; it and the writers find every entry all the same."""
    with Archive.open(folder, write=False) as archive:
        assert [entry.name for entry in archive.entries()] == ["e0", "e1", "e2"]
        assert archive.find("e1").condition == "damaged", "known without any catalogue"
        told = archive.catalogue_note
    shutil.copytree(folder, folder.parent / "other")
    assert reindex(folder.parent / "other").entries == 3
    for path, notes in ((folder, 1), (folder, 0), (folder.parent / "other", 0)):
        with Archive.open(path, write=True) as archive:
            assert len(archive.notes) == notes, "told once"
            for note in archive.notes:
                assert "reindex" in note
            archive.catalogue.check()
            assert [entry.name for entry in archive.entries()] == ["e0", "e1", "e2"]
            assert archive.find("e1").condition == "damaged"
    assert list(folder.glob("catalogue.sqlite.damaged-*")), "set aside, not removed"
    return told


@pytest.mark.parametrize(
    "data", [b"", b"no database at all" * 500, bytes(8192), b"SQLite format 3\0"]
)
def test_file_that_is_no_database_is_told(folder: Path, data: bytes) -> None:
    (folder / "catalogue.sqlite").write_bytes(data)
    assert "reindex" in recovered(folder)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated_catalogue_is_told(folder: Path, keep: float) -> None:
    path = folder / "catalogue.sqlite"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    # A reader may not come by what is cut off; a writer looks at everything first.
    recovered(folder)


def test_random_damage_is_told_or_harmless(folder: Path) -> None:
    """Whatever bytes are overwritten: every entry is found, and never a hang."""
    path = folder / "catalogue.sqlite"
    whole = path.read_bytes()
    source = random.Random(1)
    seen = 0
    for number in range(80):
        data = bytearray(whole)
        if number % 2:
            data[source.randrange(100)] ^= 1 << source.randrange(8)  # of SQLite's header
        else:
            for _ in range(source.randint(1, 40)):
                data[source.randrange(len(data))] = source.randrange(256)
        path.write_bytes(data)
        with Archive.open(folder, write=source.random() < 0.5) as archive:
            conditions = {entry.name: entry.condition for entry in archive.entries()}
            seen += bool(archive.catalogue_note or archive.notes)
        assert set(conditions) >= {"e0", "e1", "e2"}
        assert conditions["e1"] == "damaged"
        assert conditions["e0"] in ("unchecked", "damaged")
        for aside in folder.glob("catalogue.sqlite.damaged-*"):
            aside.unlink()
    assert seen > 5


def execute(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def record_with(field: str, value: str) -> str:
    """A statement that puts an SQL value into the record of e0."""
    return f"UPDATE entries SET record = json_set(record, '$.{field}', {value}) WHERE name = 'e0'"


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE entries"],
        ["DROP TABLE entries", "CREATE VIEW entries AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL "
         "SELECT x + 1 FROM n) SELECT x FROM n"],
        ["CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END"],
        ["CREATE TABLE more (x)"],
        ["ALTER TABLE entries ADD COLUMN more TEXT"],
        ["PRAGMA user_version = 4"],
        ["PRAGMA application_id = 7"],
        ["UPDATE entries SET name = '../../etc/passwd' WHERE name = 'e0'"],
        ["UPDATE entries SET vm = 'another' WHERE name = 'e0'"],
        ["UPDATE entries SET record = 'no record' WHERE name = 'e0'"],
        ["UPDATE entries SET record = '" + "[" * 100_000 + "' WHERE name = 'e0'"],
        ["UPDATE entries SET record = json_remove(record, '$.host') WHERE name = 'e0'"],
        [record_with("name", "'../../etc/passwd'"), "UPDATE entries SET name = "
         "'../../etc/passwd' WHERE name = 'e0'"],
        [record_with("tier", "'warm'")],
        [record_with("created", "'soon'")],
        [record_with("created", "'2026-01-01'")],
        [record_with("memory_bytes", "-1")],
        [record_with("content_digest", "'x'")],
        ["UPDATE entries SET verify_cursor = -1 WHERE name = 'e0'"],
        ["PRAGMA writable_schema = ON", "UPDATE sqlite_schema SET sql = "
         "replace(sql, 'verify_cursor INTEGER', 'verify_cursor ANY') WHERE name = 'entries'"],
    ],
)  # fmt: skip
def test_hostile_contents_are_told(folder: Path, statements: list[str]) -> None:
    execute(folder, *statements)
    assert "reindex" in recovered(folder)


def test_path_of_an_entry_is_never_the_catalogues_word(folder: Path, tmp_path: Path) -> None:
    """A name that leads out of the archive is refused before anything is removed by it."""
    (tmp_path / "victim.mig").write_text("mine")
    execute(folder, "UPDATE entries SET name = '../victim', removing = 1 WHERE name = 'e0'",
            "UPDATE entries SET removing = 1 WHERE name = 'e2'")  # fmt: skip
    assert "../victim" in recovered(folder)
    assert (tmp_path / "victim.mig").read_text() == "mine"
    assert (folder / "e2.mig").exists(), "nothing is removed by the word of a damaged catalogue"


def test_catalogue_held_for_too_long_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uringmig.archive.catalogue._BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(folder / "catalogue.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with Archive.open(folder, write=False) as archive:
            assert len(archive.entries()) == 3, "readers go on"
            with pytest.raises(StorageError, match="held by another process"):
                archive.catalogue.drop(["e0"])
            put_damage(archive, "e0", Damage(1, "x", AT))
            assert "held by another process" in archive.unkept
            assert archive.find("e0").condition == "damaged", "its note is there all the same"
        other.execute("ROLLBACK")


def test_log_of_another_file_is_never_played_into_a_catalogue(folder: Path) -> None:
    """A log beside a catalogue is set aside with it, and what it would have changed is not."""
    path = folder / "catalogue.sqlite"
    copy = folder.parent / "copy.sqlite"
    shutil.copy(path, copy)
    with closing(sqlite3.connect(copy, isolation_level=None)) as stranger:
        stranger.execute("PRAGMA journal_mode = WAL")
        stranger.execute("UPDATE entries SET vm = 'strange'")
        for log in (Path(f"{copy}-wal").read_bytes(), b"noise" * 99):
            assert log
            Path(f"{path}-wal").write_bytes(log)
            with Archive.open(folder, write=False) as archive:
                archive.entries()
                assert "reindex" in archive.catalogue_note
            with Archive.open(folder, write=True) as archive:
                assert {entry.vm for entry in archive.entries()} == {"web1"}
                assert archive.notes
            assert not Path(f"{path}-wal").exists()


#: The columns that versions 1 and 2 had in place of the record.
OLD_COLUMNS = (
    "tier", "created", "host", "machine", "source_kind", "source_path", "source_fingerprint",
    "content_digest", "memory_bytes", "stored_bytes", "file_bytes", "manifest_digest",
)  # fmt: skip


def as_version_2(folder: Path) -> None:
    """Make the catalogue what version 2 wrote."""
    fields = ", ".join(f"record ->> '$.{name}' AS {name}" for name in OLD_COLUMNS)
    execute(
        folder,
        f"CREATE TABLE old AS SELECT name, vm, {fields}, verified_at, verify_cursor, "
        "manifest_stamp, removing FROM entries",
        "DROP TABLE entries",
        "ALTER TABLE old RENAME TO entries",
        "PRAGMA user_version = 2",
    )


def test_catalogue_of_version_2_gives_what_was_good(folder: Path) -> None:
    """It had a column for each field: what was verified is kept, and a writer makes a new one."""
    good = "UPDATE entries SET verified_at = '2026-02-02T00:00:00+00:00' WHERE name = 'e2'"
    execute(folder, good)
    as_version_2(folder)
    expected = {"e0": "unchecked", "e1": "damaged", "e2": "good"}
    for write, told in ((False, True), (True, True), (False, False), (True, False)):
        with Archive.open(folder, write=write) as archive:
            assert {entry.name: entry.condition for entry in archive.entries()} == expected
            assert bool(archive.catalogue_note or archive.notes) == told


def test_catalogue_of_version_1_gives_what_it_knows(folder: Path) -> None:
    """It kept damage in a table of its own: none of it is forgotten, nor what was good."""
    as_version_2(folder)
    path = folder / "catalogue.sqlite"
    execute(
        folder,
        "UPDATE entries SET verified_at = '2026-02-02T00:00:00+00:00' WHERE name = 'e2'",
        "ALTER TABLE entries DROP COLUMN manifest_digest",
        "CREATE TABLE damage (name TEXT NOT NULL REFERENCES entries ON DELETE CASCADE, "
        "chunk INTEGER NOT NULL, text TEXT NOT NULL, found_at TEXT NOT NULL, "
        "PRIMARY KEY (name, chunk)) STRICT",
        f"INSERT INTO damage VALUES ('e0', 2, 'chunk 2 differs', '{AT}')",
        "INSERT INTO entries SELECT 'lost', vm, tier, created, host, machine, source_kind, "
        "source_path, source_fingerprint, content_digest, memory_bytes, stored_bytes, file_bytes, "
        "verified_at, verify_cursor, manifest_stamp, 0 FROM entries WHERE name = 'e2'",
        "PRAGMA user_version = 1",
        "PRAGMA journal_mode = WAL",
    )
    expected = {"e0": "damaged", "e1": "damaged", "e2": "good", "lost": "missing"}
    for write in (False, True, False):
        with Archive.open(folder, write=write) as archive:
            assert {entry.name: entry.condition for entry in archive.entries()} == expected
            assert archive.damage("e0") == [Damage(2, "chunk 2 differs", AT)]
    path.unlink()
    with Archive.open(folder, write=False) as archive:
        assert {entry.name: entry.condition for entry in archive.entries()} == expected | {
            "e2": "unchecked"
        }


def test_catalogue_is_synced_before_its_log_goes(folder: Path, tmp_path: Path) -> None:
    """A crash must not leave half a catalogue that looks whole: it hides what is being removed."""
    code = (
        "import sys; from pathlib import Path; from uringmig.archive.catalogue import Catalogue\n"
        "Catalogue(Path(sys.argv[1])).mark(['e0'], removing=True)"
    )
    calls = tmp_path / "calls"
    subprocess.run(
        ["strace", "-f", "-y", "-o", str(calls), "-e", "trace=pwrite64,fdatasync,fsync,unlink",
         sys.executable, "-c", code, str(folder)],
        check=True,
    )  # fmt: skip
    path = re.escape(str(folder / "catalogue.sqlite"))
    kinds = {
        "J": rf"pwrite64\(\d+<{path}-journal>", "j": rf"f(data)?sync\(\d+<{path}-journal>",
        "C": rf"pwrite64\(\d+<{path}>", "c": rf"f(data)?sync\(\d+<{path}>",
        "u": rf'unlink\("{path}-journal"',
    }  # fmt: skip
    order = ""
    for line in calls.read_text().splitlines():
        order += "".join(kind for kind, pattern in kinds.items() if re.search(pattern, line))
    assert re.fullmatch(r"(J+j+)+C+c+u", order), order
