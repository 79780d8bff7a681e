"""The archive's specification says what the code does, where that can be compared."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

import uringmig.archive
from uringmig.archive import catalogue, damagenotes, entry, folder
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.manifest import ArchiveFields

TEXT = Path(uringmig.archive.__file__).with_name("FORMAT.md").read_text()


def test_the_tables_are_the_ones_specified() -> None:
    (block,) = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
    assert block == "".join(f"{statement}\n" for statement in catalogue._SCHEMA.values())
    assert f"`application_id` {catalogue._APPLICATION_ID:#x}" in TEXT
    assert f"`user_version` {catalogue._VERSION}," in TEXT


def specified_fields(head: str) -> list[str]:
    """The names in the first column of the table under this head."""
    table = TEXT.split(f"\n| {head} | meaning |\n")[1].split("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines()[1:]]
    return [name for cell in first for name in re.findall(r"`(\w+)`", cell)]


@pytest.mark.parametrize(
    ("head", "described"), [("field of `archive`", ArchiveFields), ("field of `guest`", GuestFacts)]
)
def test_every_field_is_specified(head: str, described: type[msgspec.Struct]) -> None:
    fields = [field.name for field in msgspec.structs.fields(described)]
    assert sorted(specified_fields(head)) == sorted(fields)


def test_names_of_files_are_the_ones_specified() -> None:
    names = [f"`NAME{suffix}`" for suffix in entry.SUFFIXES.values()]
    names += [f"image + `{damagenotes.SUFFIX}`"]
    names += [f"`{catalogue.NAME}`", f"`{folder._LOCK}`", f"image + `{entry.JOURNAL_SUFFIX}`"]
    for name in names:
        assert f"| {name} |" in TEXT
    assert f"1 to {entry.NAME_BYTES_MAX} bytes" in TEXT
