"""A catalogue that is damaged, strange or hostile: said in one line, and made anew on request."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from archiveentries import add_entry, put_damage

from uringmig.archive.catalogue import Damage
from uringmig.archive.directory import Archive, reindex
from uringmig.archive.entry import Entry
from uringmig.errors import FormatError, StorageError, UringmigError

AT = "2026-01-03T00:00:00+00:00"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed archive with entries and a known damage."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        for number in range(3):
            add_entry(archive, f"e{number}", ram_bytes=256 << 10)
        put_damage(archive, "e1", Damage(0, "chunk 0 differs", AT))
    return tmp_path / "a"


def entries_of(folder: Path) -> list[Entry]:
    with Archive.open(folder, write=False) as archive:
        return archive.entries()


def refused(folder: Path, *, by_readers: bool = True) -> str:
    """What reader and writer say; afterwards the catalogue is made anew."""
    texts = []
    for write in (False, True) if by_readers else (True,):
        with pytest.raises(FormatError) as caught, Archive.open(folder, write=write) as archive:
            archive.entries()
        assert caught.value.exit_code == 3
        texts.append(str(caught.value))
    assert "catalogue" in texts[0]
    assert reindex(folder).entries == 3
    assert [entry.name for entry in entries_of(folder)] == ["e0", "e1", "e2"]
    Archive.open(folder, write=True).close()
    return texts[0]


@pytest.mark.parametrize(
    "data", [b"", b"no database at all" * 500, bytes(8192), b"SQLite format 3\0"]
)
def test_file_that_is_no_database_is_told(folder: Path, data: bytes) -> None:
    (folder / "catalogue.sqlite").write_bytes(data)
    text = refused(folder)
    assert "reindex" in text or "not a catalogue" in text


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated_catalogue_is_told(folder: Path, keep: float) -> None:
    path = folder / "catalogue.sqlite"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    # A reader may not come by what is cut off; a writer looks at everything first.
    assert "reindex" in refused(folder, by_readers=keep < 0.5)


def test_random_damage_is_told_or_harmless(folder: Path) -> None:
    """Whatever bytes are overwritten: an error of ours or entries, and never a hang."""
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
        try:
            with Archive.open(folder, write=source.random() < 0.5) as archive:
                names = [entry.name for entry in archive.entries()]
                archive.catalogue.damage("e1")
        except UringmigError:
            seen += 1
        else:
            assert set(names) <= {"e0", "e1", "e2"}
        assert reindex(folder).entries == 3
        assert [entry.name for entry in entries_of(folder)] == ["e0", "e1", "e2"]
    assert seen > 5


def execute(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE damage"],
        ["DROP TABLE entries", "CREATE VIEW entries AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL "
         "SELECT x + 1 FROM n) SELECT x FROM n"],
        ["CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END"],
        ["CREATE TABLE more (x)"],
        ["ALTER TABLE entries ADD COLUMN more TEXT"],
        ["PRAGMA user_version = 2"],
        ["PRAGMA application_id = 7"],
        ["UPDATE entries SET name = '../../etc/passwd' WHERE name = 'e0'"],
        ["UPDATE entries SET tier = 'warm' WHERE name = 'e0'"],
        ["UPDATE entries SET created = 'soon' WHERE name = 'e0'"],
        ["UPDATE entries SET created = '2026-01-01' WHERE name = 'e0'"],
        ["UPDATE entries SET memory_bytes = -1 WHERE name = 'e0'"],
        ["UPDATE entries SET content_digest = 'x' WHERE name = 'e0'"],
        ["PRAGMA writable_schema = ON", "UPDATE sqlite_schema SET sql = replace(sql, 'memory_bytes "
         "INTEGER', 'memory_bytes ANY') WHERE name = 'entries'"],
    ],
)  # fmt: skip
def test_hostile_contents_are_told(folder: Path, statements: list[str]) -> None:
    execute(folder, *statements)
    refused(folder)


def test_path_of_an_entry_is_never_the_catalogues_word(folder: Path, tmp_path: Path) -> None:
    """A name that leads out of the archive is refused before anything is removed by it."""
    (tmp_path / "victim.mig").write_text("mine")
    execute(folder, "UPDATE entries SET name = '../victim', removing = 1 WHERE name = 'e0'")
    with pytest.raises(FormatError, match=r"\.\./victim"):
        Archive.open(folder, write=True)
    assert (tmp_path / "victim.mig").read_text() == "mine"


def test_catalogue_held_for_too_long_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uringmig.archive.catalogue._BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(folder / "catalogue.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with Archive.open(folder, write=False) as archive:
            assert len(archive.entries()) == 3, "readers go on"
            with pytest.raises(StorageError, match="held by another process"):
                put_damage(archive, "e0", Damage(1, "x", AT))
        other.execute("ROLLBACK")


@pytest.fixture
def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    """A catalogue that may not grow any more, as on a full disk."""
    with Archive.open(folder, write=True) as archive:
        connect = archive.catalogue._connect

        def limited(mode: str) -> sqlite3.Connection:
            connection = connect(mode)
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
            return connection

        monkeypatch.setattr(archive.catalogue, "_connect", limited)
        yield archive


def test_full_disk_is_told_and_changes_nothing(full_disk: Archive) -> None:
    before = full_disk.entries()
    many = [Damage(number, "x" * 1000, AT) for number in range(1000)]
    with pytest.raises(StorageError, match="full"):
        put_damage(full_disk, "e0", *many)
    assert full_disk.entries() == before


def test_log_of_a_killed_writer_is_played_in_and_never_into_a_new_catalogue(folder: Path) -> None:
    path = folder / "catalogue.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("SELECT * FROM entries").fetchall()  # keeps the log from going away
        with Archive.open(folder, write=False) as archive:
            put_damage(archive, "e0", Damage(7, "seen late", AT))
        log = Path(f"{path}-wal").read_bytes()
        state = path.read_bytes()
    assert log
    path.write_bytes(state)
    Path(f"{path}-wal").write_bytes(log)
    with Archive.open(folder, write=False) as archive:
        assert archive.catalogue.damage("e0") == [Damage(7, "seen late", AT)]
    # A log beside a damaged file goes with it.
    path.write_bytes(b"damaged" * 1000)
    Path(f"{path}-wal").write_bytes(log)
    assert reindex(folder).entries == 3
    assert [entry.damaged_chunks for entry in entries_of(folder)] == [0, 0, 0]
