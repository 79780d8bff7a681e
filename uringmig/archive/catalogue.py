"""The catalogue of an archive: what its manifests say, and what verification knows, in SQLite.

Nothing in it is true by itself: entries can be read from the manifests again (`Archive.reindex`),
and only what verification has found is lost with it. Each operation is a connection and a
transaction of its own, so nothing is held open, and readers and the writer never wait for long.

A file from outside is not trusted: its schema must be exactly ours, and every value has its type
checked.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from uringmig.archive.entry import Entry, image_path, manifest_path
from uringmig.errors import FormatError, StateError, StorageError

NAME: Final = "catalogue.sqlite"
#: "umig"; with it file(1) tells the file from other SQLite databases.
_APPLICATION_ID: Final = 0x756D6967
_VERSION: Final = 1
#: Whoever writes does so for milliseconds; this long only a stopped process holds it.
_BUSY_SECONDS: Final = 10.0
#: Files beside it while it is used, and after a crash.
_LOGS: Final = ("-wal", "-shm")
#: What the kernel or the disk says through SQLite; all else is about the file's content.
_REFUSED: Final = (
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip
_CURE: Final = "`uringmig archive reindex` makes a new one from the manifests"

#: The columns of entries that are fields of `Entry`, in the table's order.
_FIELDS: Final = (
    "name", "vm", "tier", "created", "host", "machine", "source_kind", "source_path",
    "source_fingerprint", "content_digest", "memory_bytes", "stored_bytes", "file_bytes",
    "verified_at", "verify_cursor",
)  # fmt: skip
_SCHEMA: Final = {
    "entries": """CREATE TABLE entries (
    name TEXT PRIMARY KEY, vm TEXT NOT NULL, tier TEXT NOT NULL, created TEXT NOT NULL,
    host TEXT NOT NULL, machine TEXT NOT NULL, source_kind TEXT NOT NULL,
    source_path TEXT NOT NULL, source_fingerprint TEXT NOT NULL, content_digest TEXT NOT NULL,
    memory_bytes INTEGER NOT NULL, stored_bytes INTEGER NOT NULL, file_bytes INTEGER NOT NULL,
    verified_at TEXT, verify_cursor INTEGER NOT NULL,
    manifest_stamp TEXT NOT NULL, removing INTEGER NOT NULL
) STRICT""",
    "damage": """CREATE TABLE damage (
    name TEXT NOT NULL REFERENCES entries ON DELETE CASCADE, chunk INTEGER NOT NULL,
    text TEXT NOT NULL, found_at TEXT NOT NULL, PRIMARY KEY (name, chunk)
) STRICT""",
}
_COUNT_DAMAGE: Final = "(SELECT count(*) FROM damage WHERE damage.name = entries.name)"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the entry, what its manifest's file was, and whether it is being removed."""

    entry: Entry
    manifest_stamp: str
    removing: bool

    def with_checks_of(self, other: Row) -> Row:
        """This row, with what verification knows from another one of the same files."""
        known = other.entry
        entry = replace(
            self.entry, verified_at=known.verified_at, verify_cursor=known.verify_cursor
        )
        return replace(self, entry=entry)


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in an entry that is not what its manifest says.

    Attributes:
        chunk: number of the chunk over all blocks, or -1 for what is not in a block.
        text: block, offset, expected and found, in one line.
        found_at: ISO 8601.
    """

    chunk: int
    text: str
    found_at: str


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
        return self.path.exists()

    def create(self) -> None:
        """Make an empty one where there is none."""
        with self._naming(), closing(self._connect("rwc")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection):
                for statement in _SCHEMA.values():
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")

    def check(self) -> None:
        """Read all of it and compare its parts with each other."""
        with self._reading() as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise FormatError(f"{self.path}: the catalogue is damaged: {found}; {_CURE}")

    def rows(self) -> list[Row]:
        """All rows, oldest entry first."""
        with self._reading() as connection:
            found = connection.execute(
                f"SELECT {', '.join(_FIELDS)}, {_COUNT_DAMAGE}, manifest_stamp, removing "
                "FROM entries"
            ).fetchall()
        rows = [self._decode(values) for values in found]
        return sorted(rows, key=lambda row: (row.entry.created_time, row.entry.name))

    def damage(self, name: str) -> list[Damage]:
        """Places of an entry known to be damaged."""
        with self._reading() as connection:
            found = connection.execute(
                "SELECT chunk, text, found_at FROM damage WHERE name = ? ORDER BY chunk", (name,)
            ).fetchall()
        return [self._convert(dict(zip(("chunk", "text", "found_at"), values, strict=True)))
                for values in found]  # fmt: skip

    def put(self, rows: Iterable[Row]) -> None:
        """Add entries, or replace those of the same names, all or none."""
        with self._writing() as connection:
            for row in rows:
                connection.execute("DELETE FROM entries WHERE name = ?", (row.entry.name,))
                _insert(connection, row)

    def put_all(self, rows: Iterable[Row], damage: Mapping[str, Iterable[Damage]]) -> None:
        """Let there be these entries and no others, with these places known to be damaged."""
        with self._writing() as connection:
            connection.execute("DELETE FROM entries")
            for row in rows:
                _insert(connection, row)
            for name, damaged in damage.items():
                _insert_damage(connection, name, damaged)

    def mark_removing(self, name: str) -> None:
        """Hide an entry for good; its files go next."""
        with self._writing() as connection:
            connection.execute("UPDATE entries SET removing = 1 WHERE name = ?", (name,))

    def drop(self, names: Iterable[str]) -> None:
        """Forget entries."""
        with self._writing() as connection:
            connection.executemany("DELETE FROM entries WHERE name = ?", [(n,) for n in names])

    def note_checked(
        self,
        name: str,
        *,
        cursor: int,
        verified_at: str | None,
        good: Iterable[int],
        damaged: Iterable[Damage],
    ) -> None:
        """Keep what a verification found; an entry that is gone meanwhile is left out.

        Args:
            name: of the entry.
            cursor: chunks of the pass that are done.
            verified_at: the pass over the entry has ended, at this time; it counts if no damage is
                known then.
            good: chunks whose earlier damage is no longer there.
            damaged: places that are damaged now.
        """
        with self._writing() as connection:
            known = connection.execute(
                "UPDATE entries SET verify_cursor = ? WHERE name = ?", (cursor, name)
            )
            if known.rowcount:
                connection.executemany(
                    "DELETE FROM damage WHERE name = ? AND chunk = ?", [(name, n) for n in good]
                )
                _insert_damage(connection, name, damaged)
                connection.execute(
                    "UPDATE entries SET verified_at = coalesce(?, verified_at) WHERE name = ? "
                    f"AND {_COUNT_DAMAGE} = 0",
                    (verified_at, name),
                )

    def replace(self, other: Catalogue) -> None:
        """Take the place of another one, which nobody can use, whatever it is."""
        try:
            # The log belongs to the old file: beside the new one it would be played into it.
            for suffix in _LOGS:
                Path(f"{other.path}{suffix}").unlink(missing_ok=True)
            self.path.rename(other.path)
        except OSError as error:
            raise StorageError("cannot replace", errno=error.errno, path=other.path) from None

    def remove(self) -> None:
        """Remove the file and its log."""
        for suffix in ("", *_LOGS):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _decode(self, values: tuple[object, ...]) -> Row:
        """Check one row as if a stranger had written it."""
        *fields, damaged, stamp, removing = values
        named = dict(zip(_FIELDS, fields, strict=True))
        try:
            image = image_path(self._folder, str(named["name"]), named["tier"])  # type: ignore[arg-type]
            entry = msgspec.convert(
                {
                    **named,
                    "damaged_chunks": damaged,
                    "image": str(image),
                    "manifest": str(manifest_path(image)),
                },
                Entry,
            )
            if entry.created_time.tzinfo is None:
                raise ValueError("created has no time zone")
        except (msgspec.ValidationError, ValueError, StateError) as error:
            raise FormatError(
                f"{self.path}: entry {named['name']!r} of the catalogue: {error}; {_CURE}"
            ) from None
        return Row(entry, str(stamp), bool(removing))

    def _convert(self, values: dict[str, object]) -> Damage:
        try:
            return msgspec.convert(values, Damage)
        except msgspec.ValidationError as error:
            raise FormatError(f"{self.path}: damage in the catalogue: {error}; {_CURE}") from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that cannot change anything, in one transaction, its schema checked."""
        with (
            self._naming(),
            closing(self._connect("rw")) as connection,
            _transaction(connection, "DEFERRED"),
        ):
            # Not opened read-only: the last one to close it could then not take its log away.
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
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            # What a damaged or a stranger's file could make us run or skip is off.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Refuse another program's database, another version, and tables that are not ours."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for what, expected, found in (
            ("is not a catalogue of uringmig: application id", _APPLICATION_ID, application),
            ("is a catalogue of another version", _VERSION, version),
        ):
            if found != expected:
                raise FormatError(f"{self.path}: {what}", expected=expected, found=found)
        tables = dict(
            connection.execute(
                "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
            ).fetchall()
        )
        if tables != _SCHEMA:
            raise FormatError(f"{self.path}: the catalogue has tables that are not ours; {_CURE}")

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn SQLite's errors into ours, by who is at fault."""
        try:
            yield
        except sqlite3.Error as error:
            self._fail(error)
        except UnicodeDecodeError:  # of a message that quotes what is damaged
            raise FormatError(f"{self.path}: the catalogue is damaged; {_CURE}") from None

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
            raise StorageError(f"cannot use the catalogue: {error}", path=self.path) from None
        raise FormatError(f"{self.path}: the catalogue is damaged: {error}; {_CURE}") from None


def manifest_stamp(path: Path) -> str:
    """What tells that a manifest's file is still the one that was read: inode, size and time.

    Raises:
        StorageError: there is none.
    """
    try:
        status = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - all of it is wanted
    except OSError as error:
        raise StorageError("cannot look at", errno=error.errno, path=path) from None
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _insert(connection: sqlite3.Connection, row: Row) -> None:
    """Add one entry."""
    values = [getattr(row.entry, field) for field in _FIELDS]
    marks = ", ".join("?" * (len(_FIELDS) + 2))
    connection.execute(
        f"INSERT INTO entries VALUES ({marks})", (*values, row.manifest_stamp, int(row.removing))
    )


def _insert_damage(connection: sqlite3.Connection, name: str, damaged: Iterable[Damage]) -> None:
    """Add places of an entry that are damaged."""
    connection.executemany(
        "INSERT OR REPLACE INTO damage VALUES (?, ?, ?, ?)",
        [(name, item.chunk, item.text, item.found_at) for item in damaged],
    )


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
