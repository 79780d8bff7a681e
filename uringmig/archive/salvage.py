"""A catalogue that cannot be used: what can still be read of it, and where it goes.

Its rows only add to what the manifests say: when an entry was last found good, what was known to be
damaged (older versions kept that here), and entries of which nothing else is left. What does not
read as such a thing is left out, and nothing is ever removed by the word of such a file.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from uringmig.archive.catalogue import LOGS, Catalogue, Row
from uringmig.archive.damagenotes import Damage
from uringmig.archive.entry import entry_of
from uringmig.archive.folder import sync_folder
from uringmig.errors import BytesError, StorageError

#: More rows than any archive has; against a file that makes them up.
_ROWS_MAX: Final = 10_000_000
#: Bytes 18 and 19 of a database that has a write-ahead log, which are its versions to write, read.
_WAL_VERSIONS: Final = b"\x02\x02"


@dataclass(slots=True)
class Known:
    """What is known of an archive's entries besides what lies in its folder.

    Attributes:
        rows: by the entry's name.
        damage: what an older version's catalogue held against entries, by their names.
        whole: every row is what was written; else a row counts only beside files of its entry.
        trouble: why the catalogue cannot be used, in one line; empty: it can, or there is none.
        damaged: since it is none; else this disk or a lock is why.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    damage: dict[str, tuple[Damage, ...]] = field(default_factory=dict)
    whole: bool = True
    trouble: str = ""
    damaged: bool = False

    def ordered(self) -> list[Row]:
        """The rows, oldest entry first."""
        rows = self.rows.values()
        return sorted(rows, key=lambda row: (row.entry.created_time, row.entry.name))


def known_of(catalogue: Catalogue, *, check: bool = False, vm: str | None = None) -> Known:
    """Read a catalogue; what of it can be read, if it is not one.

    Args:
        catalogue: need not exist.
        check: read all of it and compare its parts with each other.
        vm: only rows of this machine are wanted.
    """
    if not catalogue.exists:
        return Known()
    try:
        if check:
            catalogue.check()
        return Known({row.entry.name: row for row in catalogue.rows(vm=vm)})
    except (BytesError, StorageError) as error:
        known = Known(whole=False)
        # An older version's log is part of it. Where SQLite cannot write, or beside a log that is
        # not its own, only what is in the file itself is read.
        for way in ("mode=rw", "immutable=1") if _has_own_log(catalogue.path) else ("immutable=1",):
            known = _read(catalogue.path, way)
            if known.rows or known.damage:
                break
        known.trouble = str(error)
        known.damaged = isinstance(error, BytesError)
        return known


def set_aside(catalogue: Catalogue) -> Path:
    """Give a catalogue that cannot be used, and its logs, other names.

    Returns:
        Where it is now.

    Raises:
        StorageError: that failed.
    """
    path = catalogue.path
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = Path(f"{path}.damaged-{time}")
    try:
        # Logs first: one that outlived its file would be played into the next one.
        for suffix in (*LOGS, ""):
            with suppress(FileNotFoundError):
                Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    except OSError as error:
        raise StorageError("cannot set aside", errno=error.errno, path=path) from None
    sync_folder(path.parent)
    return aside


def _has_own_log(path: Path) -> bool:
    """Whether a log beside a database is its own."""
    with suppress(OSError):
        if os.path.isfile(path):
            with path.open("rb") as file:
                return file.read(20)[18:] == _WAL_VERSIONS
    return False


def _read(path: Path, way: str) -> Known:
    """Read whatever is a row of ours."""
    known = Known(whole=False)
    with suppress(sqlite3.Error, UnicodeDecodeError):
        uri = f"{path.absolute().as_uri()}?{way}"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA query_only = ON")
            for values in _table(connection, "damage"):
                with suppress(msgspec.ValidationError, KeyError):
                    name = str(values["name"])
                    damage = msgspec.convert(
                        {key: values[key] for key in ("chunk", "text", "found_at")}, Damage
                    )
                    known.damage[name] = (*known.damage.get(name, ()), damage)
            for values in _table(connection, "entries"):
                with suppress(msgspec.DecodeError, ValueError, KeyError, RecursionError):
                    # Up to version 2 the record was a column for each of its fields.
                    record = values.get("record")
                    entry = entry_of(
                        path.parent,
                        values if record is None else msgspec.json.decode(str(record)),
                        verified_at=values.get("verified_at"),
                        verify_cursor=values.get("verify_cursor", 0),
                    )
                    if entry.name == values["name"] and not values.get("removing"):
                        known.rows[entry.name] = Row(entry, "")
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            known.whole = found == "ok"
    return known


def _table(connection: sqlite3.Connection, name: str) -> Iterator[dict[str, Any]]:
    """Rows of a table; nothing of a view, which might never end."""
    query = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?"
    if connection.execute(query, (name,)).fetchone():
        for row in connection.execute(f"SELECT * FROM {name} LIMIT {_ROWS_MAX}"):
            yield dict(row)
