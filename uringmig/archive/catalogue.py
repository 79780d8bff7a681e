"""The catalogue of an archive: what its manifests say, and how far verification is, in SQLite.

It is expendable: entries can be read from the manifests again, and what is known against them lies
beside their images (`archive.damagenotes`); only when an entry was last found good is lost with it.
Each operation is a connection and a transaction of its own, so nothing is held open, and readers
and the writer never wait for long.

It has a rollback journal, not a write-ahead log: several hosts may share the folder, and a reader
needs to write nothing, so a full or read-only disk can be read.

A file from outside is not trusted: its schema must be exactly ours, and every value has its type
checked.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from uringmig.archive.entry import Entry, entry_of
from uringmig.archive.record import record_of
from uringmig.errors import FormatError, StorageError

NAME: Final = "catalogue.sqlite"
#: "umig"; with it file(1) tells the file from other SQLite databases.
_APPLICATION_ID: Final = 0x756D6967
_VERSION: Final = 3
_MODE: Final = 0o600
#: Whoever writes does so for milliseconds; this long only a stopped process holds it.
_BUSY_SECONDS: Final = 10.0
#: Files beside it while it is written, after a crash, or left by an older version.
_JOURNAL: Final = "-journal"
_WAL: Final = "-wal"
LOGS: Final = (_JOURNAL, _WAL, "-shm")
#: What the kernel or the disk says through SQLite; all else is about the file's content.
_REFUSED: Final = (
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_PROTOCOL,
)  # fmt: skip
#: What SQLite has open at most: the file, its journal, their folder.
_DESCRIPTORS: Final = 3
CURE: Final = "`uringmig archive reindex` makes a new one from the manifests"

_SCHEMA: Final = {
    "entries": """CREATE TABLE entries (
    name TEXT PRIMARY KEY, vm TEXT NOT NULL, record TEXT NOT NULL,
    verified_at TEXT, verify_cursor INTEGER NOT NULL,
    manifest_stamp TEXT NOT NULL, removing INTEGER NOT NULL
) STRICT""",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        entry: as its manifest describes it.
        manifest_stamp: what its manifest's file was, see `looking.manifest_stamp`; may be empty.
        removing: its removal has begun.
    """

    entry: Entry
    manifest_stamp: str
    removing: bool = False


@dataclass(slots=True)
class Change:
    """A row that is being changed; None is: there is none, and none is made."""

    row: Row | None


class Catalogue:
    """The catalogue of one folder; it need not exist.

    Every method raises:
        FormatError: it is damaged, of another version, or not a catalogue; says how to rebuild it.
        StorageError: it cannot be read or written, or is held by somebody for too long.
    """

    def __init__(self, folder: Path, *, name: str = NAME) -> None:
        self.path = folder / name
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether there is a file at all."""
        return os.path.lexists(self.path)

    def create(self) -> None:
        """Make an empty one where there is none, its owner's only: it names guests."""
        try:
            # SQLite would go by the umask; what it puts beside it later has the same mode.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE))
        except OSError as error:
            raise StorageError("cannot create", errno=error.errno, path=self.path) from None
        with (
            self._naming(),
            closing(self._connect("rwc")) as connection,
            _transaction(connection),
        ):
            for statement in _SCHEMA.values():
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")

    def check(self) -> None:
        """Read all of it and compare its parts with each other."""
        with self._reading() as connection:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise FormatError(f"{self.path}: the catalogue is damaged: {found}; {CURE}")

    def rows(self, *, vm: str | None = None) -> list[Row]:
        """All rows, or those of one machine; oldest entry first."""
        with self._reading() as connection:
            query = "SELECT * FROM entries WHERE ?1 IS NULL OR vm = ?1"
            found = connection.execute(query, (vm,)).fetchall()
        rows = [self._decode(values) for values in found]
        return sorted(rows, key=lambda row: (row.entry.created_time, row.entry.name))

    def row(self, name: str) -> Row | None:
        """The row of an entry, or None."""
        with self._reading() as connection:
            return self._select(connection, name)

    def put(self, rows: Iterable[Row]) -> None:
        """Add entries, or replace those of the same names, all or none.

        How far verification was with an entry stays, if it is the same one and nothing is known
        against it.
        """
        with self._writing() as connection:
            for row in rows:
                former = self._select(connection, row.entry.name)
                if former and former.entry.is_same(row.entry) and row.entry.is_sound:
                    row = _with_checks_of(row, former.entry)
                _insert(connection, row)

    def put_all(self, rows: Iterable[Row]) -> None:
        """Let there be these entries and no others."""
        with self._writing() as connection:
            connection.execute("DELETE FROM entries")
            for row in rows:
                _insert(connection, row)

    def mark(self, names: Iterable[str], *, removing: bool) -> None:
        """Hide entries whose files go next, or show them again."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE entries SET removing = ? WHERE name = ?", [(removing, n) for n in names]
            )

    def drop(self, names: Iterable[str]) -> None:
        """Forget entries."""
        with self._writing() as connection:
            connection.executemany("DELETE FROM entries WHERE name = ?", [(n,) for n in names])

    @contextmanager
    def changing(self, name: str) -> Iterator[Change]:
        """Change one row while nobody else can; nothing is changed if something is raised."""
        with self._writing() as connection:
            former = self._select(connection, name)
            change = Change(former)
            yield change
            if former is not None and change.row is not None and change.row != former:
                _insert(connection, change.row)

    def clear_log(self) -> None:
        """Remove a log that a killed writer left before there was anything in it to undo."""
        if os.path.lexists(f"{self.path}{_JOURNAL}"):
            with self._naming(), closing(self._connect("rw")) as connection:
                # SQLite removes it, under its own lock, on the way from the one to the other.
                connection.execute("PRAGMA journal_mode = PERSIST")
                connection.execute("PRAGMA journal_mode = DELETE")

    def replace(self, other: Catalogue) -> None:
        """Take the place of another one, whose logs are gone."""
        try:
            self.path.rename(other.path)
        except OSError as error:
            raise StorageError("cannot replace", errno=error.errno, path=other.path) from None

    def remove(self) -> None:
        """Remove the file and its logs."""
        try:
            # A log that outlived its file would be played into the next one.
            for suffix in (*LOGS, ""):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            raise StorageError("cannot remove", errno=error.errno, path=self.path) from None

    def _select(self, connection: sqlite3.Connection, name: str) -> Row | None:
        query = "SELECT * FROM entries WHERE name = ?"
        found = connection.execute(query, (name,)).fetchone()
        return None if found is None else self._decode(found)

    def _decode(self, values: tuple[object, ...]) -> Row:
        """Check one row as if a stranger had written it."""
        name, vm, record, verified_at, verify_cursor, stamp, removing = values
        try:
            said = msgspec.json.decode(str(record))
            entry = entry_of(
                self._folder, said, verified_at=verified_at, verify_cursor=verify_cursor
            )
            if (entry.name, entry.vm) != (name, vm):
                raise ValueError(f"its record is that of {entry.name!r} of {entry.vm!r}")
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise FormatError(
                f"{self.path}: entry {name!r} of the catalogue: {error}; {CURE}"
            ) from None
        return Row(entry, str(stamp), bool(removing))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot change anything, in one transaction, its schema checked."""
        with (
            self._naming(),
            closing(self._connect("rw")) as connection,
            _transaction(connection, "DEFERRED"),
        ):
            # Not opened read-only: what a killed writer left in the journal is to be undone.
            connection.execute("PRAGMA query_only = ON")
            self._check_schema(connection)
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection with a transaction that is committed if nothing is raised."""
        with (
            self._naming(),
            closing(self._connect("rw")) as connection,
            _transaction(connection),
        ):
            self._check_schema(connection)
            yield connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        regular = os.path.isfile(self.path)
        if mode != "rwc" and self.exists and not regular:
            raise FormatError(f"{self.path}: the catalogue is not a regular file; {CURE}")
        # It would be played in by opening the file, and for good by closing it.
        if os.path.lexists(f"{self.path}{_WAL}"):
            raise FormatError(f"{self.path}: the catalogue has a log that is not ours; {CURE}")
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            # Off, so that a damaged or foreign file can make SQLite run or skip nothing.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            # A commit is the removal of the rollback journal, and only EXTRA makes that durable:
            # else a power cut could undo a mark, and keep the removal of files that it announced.
            connection.execute("PRAGMA synchronous = EXTRA")
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Refuse another program's database, another version, and tables that are not ours."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for what, expected, found in (
            ("is no catalogue of uringmig: its application id is", _APPLICATION_ID, application),
            ("is a catalogue of another version:", _VERSION, version),
        ):
            if found != expected:
                raise FormatError(f"{self.path}: {what} {found}, not {expected}; {CURE}")
        tables = dict(
            connection.execute(
                "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
            ).fetchall()
        )
        if tables != _SCHEMA:
            raise FormatError(f"{self.path}: the catalogue has tables that are not ours; {CURE}")
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "delete":
            raise FormatError(f"{self.path}: the catalogue would have a log; {CURE}")

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn SQLite's errors into ours, by who is at fault."""
        try:
            yield
        except sqlite3.Error as error:
            self._fail(error)
        except UnicodeDecodeError:  # of a message that quotes what is damaged
            raise FormatError(f"{self.path}: the catalogue is damaged; {CURE}") from None

    def _fail(self, error: sqlite3.Error) -> NoReturn:
        # Python's own errors have no code, such as text that is no UTF-8.
        primary = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StorageError(
                "the catalogue is held by another process", errno=errno.EAGAIN, path=self.path
            ) from None
        # A file that we may write, and that SQLite does not, claims to be of a newer format.
        claims = primary == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK)
        if primary in _REFUSED and not claims:
            limit = errno.ENOMEM if primary == sqlite3.SQLITE_NOMEM else self._limit()
            raise StorageError(
                f"cannot use the catalogue: {error}",
                errno=limit,
                path=self.path,
                cure=None if limit else f"once it can be, {CURE}",
            ) from None
        raise FormatError(f"{self.path}: the catalogue is damaged: {error}; {CURE}") from None

    def _limit(self) -> int | None:
        """The errno, if it is for want of descriptors that files cannot be opened.

        SQLite keeps it to itself. Opened is the folder: to close the file would drop its locks.
        """
        opened: list[int] = []
        try:
            while len(opened) < _DESCRIPTORS:
                opened.append(os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return error.errno if error.errno in (errno.EMFILE, errno.ENFILE) else None
        finally:
            for fd in opened:
                os.close(fd)
        return None


def _with_checks_of(row: Row, known: Entry) -> Row:
    """A row, with how far verification was with it."""
    entry = msgspec.structs.replace(
        row.entry, verified_at=known.verified_at, verify_cursor=known.verify_cursor
    )
    return replace(row, entry=entry)


def _insert(connection: sqlite3.Connection, row: Row) -> None:
    """Add one entry, or replace the one of its name."""
    entry = row.entry
    record = msgspec.json.encode(record_of(entry)).decode()
    connection.execute(
        "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            entry.name, entry.vm, record, entry.verified_at, entry.verify_cursor,
            row.manifest_stamp, int(row.removing),
        ),
    )  # fmt: skip


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """One transaction: committed, or rolled back if anything is raised."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
