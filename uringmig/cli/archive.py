"""``uringmig archive``: the commands on an archive, each in a module of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uringmig.cli.command import LazyGroup
from uringmig.cli.output import Output

if TYPE_CHECKING:
    from uringmig.archive.directory import Archive

_HERE: Final = "uringmig.cli.archive"

app: Final = LazyGroup(
    "archive",
    help="Keep many images in one directory: fill it, list, check, restore and prune them.",
    places={
        "list": f"{_HERE}_list:list_entries",
        "run": f"{_HERE}_run:run",
        "show": f"{_HERE}_show:show",
        "verify": f"{_HERE}_verify:verify",
        "restore": f"{_HERE}_restore:restore",
        "prune": f"{_HERE}_prune:prune",
        "reindex": f"{_HERE}_reindex:reindex",
    },
)


def tell_state(output: Output, archive: Archive) -> None:
    """Say what is wrong with an archive, and why its catalogue is not used."""
    if archive.catalogue_note:
        output.note(archive.catalogue_note)
    output.warn_all(archive.notes)
