"""The archive's specification says what the code does, where that can be compared."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

import uringmig.archive
from uringmig.archive import catalogue, damagenotes, entry, folder
from uringmig.image.manifest import ArchiveFields

TEXT = Path(uringmig.archive.__file__).with_name("FORMAT.md").read_text()


def test_the_tables_are_the_ones_specified() -> None:
    (block,) = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
    assert block == "".join(f"{statement}\n" for statement in catalogue._SCHEMA.values())
    assert f"`application_id` {catalogue._APPLICATION_ID:#x}" in TEXT
    assert f"`user_version` {catalogue._VERSION}," in TEXT


def test_every_field_of_an_entry_is_specified() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert rows == [field.name for field in msgspec.structs.fields(ArchiveFields)]


def test_names_of_files_are_the_ones_specified() -> None:
    names = [f"`NAME{suffix}`" for suffix in entry.SUFFIXES.values()]
    names += [f"image + `{damagenotes.SUFFIX}`"]
    names += [f"`{catalogue.NAME}`", f"`{folder._LOCK}`", f"image + `{entry.JOURNAL_SUFFIX}`"]
    for name in names:
        assert f"| {name} |" in TEXT
    assert f"1 to {entry.NAME_BYTES_MAX} bytes" in TEXT
