"""``uringmig archive list``: one line for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.cli import parameters
from uringmig.cli.output import Output
from uringmig.cli.session import session_of
from uringmig.units import format_size

_TITLES = ("NAME", "VM", "TIER", "CREATED", "MEMORY", "FILE", "STATE")
_GAP = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveList:
    """What is in an archive; sizes in bytes."""

    path: str
    entries: tuple[Entry, ...]
    unfinished: tuple[Path, ...]
    file_bytes: int


def list_entries(
    context: typer.Context,
    archive: parameters.ArchiveFolder,
    vm: parameters.OnlyVm = None,
    names_only: Annotated[bool, typer.Option("--names", help="Only names, one a line.")] = False,
    json: parameters.Json = False,
    quiet: parameters.Quiet = False,
    verbose: parameters.Verbose = False,
) -> None:
    """List the entries of an archive, oldest first."""
    output = session_of(context, json=json, quiet=quiet, verbose=verbose).output
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
    raise typer.Exit(output.exit_code)


def tell_state(output: Output, archive: Archive) -> None:
    """Say what is wrong with an archive, and why its catalogue is not used."""
    if archive.catalogue_note:
        output.note(archive.catalogue_note)
    output.warn_all(archive.notes)


def _lines(listed: ArchiveList) -> list[str]:
    """A table, and what cannot be seen in it."""
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


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
