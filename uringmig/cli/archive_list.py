"""``uringmig archive list``: one line for each entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.cli import parameters
from uringmig.cli.archive import tell_state
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.cli.table import table_lines
from uringmig.units import format_size

_TITLES = ("NAME", "VM", "TIER", "CREATED", "MEMORY", "FILE", "STATE")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveList:
    """What is in an archive; sizes in bytes."""

    path: str
    entries: tuple[Entry, ...]
    unfinished: tuple[Path, ...]
    file_bytes: int


@command(
    parameters.archive_folder(),
    parameters.only_vm(),
    click.Option(["--names", "names_only"], is_flag=True, help="Only names, one a line."),
    name="list",
)
def list_entries(session: Session, *, archive: Path, vm: str | None, names_only: bool) -> int:
    """List the entries of an archive, oldest first."""
    output = session.output
    with Archive.open(archive, write=False) as opened:
        entries = [entry for entry in opened.entries() if vm in (None, entry.vm)]
        listed = ArchiveList(
            path=str(opened.path),
            entries=tuple(entries),
            unfinished=tuple(place.image for place in opened.unfinished()),
            file_bytes=sum(entry.file_bytes for entry in entries),
        )
        tell_state(output, opened)
    output.warn_all(f"{entry.name}: {entry.trouble}" for entry in entries if entry.trouble)
    names = [entry.name for entry in entries]
    output.result("archive list", listed, names if names_only else _lines(listed))
    return output.exit_code


def _lines(listed: ArchiveList) -> list[str]:
    """A table, and below it what it does not show."""
    if not listed.entries:
        lines = [f"{listed.path}: no entries"]
    else:
        rows = [
            (
                entry.name, entry.vm, entry.tier, entry.created, format_size(entry.memory_bytes),
                format_size(entry.file_bytes), entry.condition,
            )
            for entry in listed.entries
        ]  # fmt: skip
        lines = [
            *table_lines([_TITLES, *rows]),
            f"{len(rows)} entries, {format_size(listed.file_bytes)} in files",
        ]
    return lines + [f"unfinished, can go on: {image}" for image in listed.unfinished]
