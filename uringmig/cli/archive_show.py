"""``uringmig archive show``: all that is known of one entry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.cli import parameters
from uringmig.cli.archive import tell_state
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.cli.table import table_lines
from uringmig.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryShown:
    """One entry, and where it is damaged."""

    entry: Entry
    damage: tuple[Damage, ...]


@command(
    parameters.archive_folder(),
    parameters.entry_name(),
)
def show(session: Session, *, archive: Path, name: str) -> int:
    """Show all that is known of one entry of an archive."""
    output = session.output
    with Archive.open(archive, write=False) as opened:
        entry = opened.find(name)
        damage = opened.damage(name)
        tell_state(output, opened)
    shown = EntryShown(entry=entry, damage=tuple(damage))
    output.result("archive show", shown, _lines(shown))
    return output.exit_code


def _lines(shown: EntryShown) -> list[str]:
    """Names and values below each other, then the damage."""
    entry = shown.entry
    state: str = entry.condition
    if entry.verified_at is not None:
        state += f", last found whole at {entry.verified_at}"
    if entry.verify_cursor:
        state += f", {entry.verify_cursor} chunks looked at since"
    rows = [
        ("name", entry.name),
        ("vm", entry.vm),
        ("machine", entry.machine),
        ("tier", entry.tier),
        ("created", f"{entry.created} on {entry.host}"),
        ("source", f"{entry.source_kind} {entry.source_path}"),
        ("image", entry.image),
        ("manifest", entry.manifest),
        (
            "memory",
            f"{format_size(entry.memory_bytes)}, {format_size(entry.stored_bytes)} of it in pages "
            f"that are set; {format_size(entry.file_bytes)} in the file",
        ),
        ("digest", entry.content_digest),
        ("state", state),
    ]
    return table_lines(rows) + [f"damaged: {item.text}" for item in shown.damage]
