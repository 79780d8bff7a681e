"""``uringmig archive``: the commands on an archive, each in a module of its own."""

from __future__ import annotations

from typing import Final

import typer

from uringmig.cli.archive_list import list_entries
from uringmig.cli.archive_prune import prune
from uringmig.cli.archive_reindex import reindex
from uringmig.cli.archive_restore import restore
from uringmig.cli.archive_run import run
from uringmig.cli.archive_show import show
from uringmig.cli.archive_verify import verify

app: Final = typer.Typer(
    name="archive",
    help="Keep many images in one directory: fill it, list, check, restore and prune them.",
    no_args_is_help=True,
)
app.command(name="list")(list_entries)
for _command in (run, show, verify, restore, prune, reindex):
    app.command()(_command)
