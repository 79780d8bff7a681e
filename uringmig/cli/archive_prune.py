"""``uringmig archive prune``: what no rule keeps goes; without ``--delete`` it is only told."""

from __future__ import annotations

from typing import Annotated

import typer

from uringmig.archive.directory import Archive
from uringmig.archive.pruning import PruneReport
from uringmig.archive.pruning import prune as prune_archive
from uringmig.cli import parameters
from uringmig.cli.archive_list import table_lines, tell_state
from uringmig.cli.session import session_of
from uringmig.units import format_size


def prune(
    context: typer.Context,
    archive: parameters.ArchiveFolder,
    keep_last: Annotated[
        int, typer.Option("--keep-last", metavar="N", help="Keep the N newest of each VM.")
    ] = 0,
    keep_daily: Annotated[
        int, typer.Option("--keep-daily", metavar="N", help="The newest of each of N days (UTC).")
    ] = 0,
    keep_weekly: Annotated[
        int, typer.Option("--keep-weekly", metavar="N", help="The newest of each of N weeks.")
    ] = 0,
    keep_monthly: Annotated[
        int, typer.Option("--keep-monthly", metavar="N", help="The newest of each of N months.")
    ] = 0,
    forget: Annotated[
        list[str] | None,
        typer.Option("--forget", metavar="NAME", help="Drop this damaged or missing entry."),
    ] = None,
    vm: parameters.OnlyVm = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Really remove; otherwise it is only said what would.")
    ] = False,
    json: parameters.Json = False,
    quiet: parameters.Quiet = False,
    verbose: parameters.Verbose = False,
) -> None:
    """Remove entries that no rule keeps, never the only good one of a VM; dry without --delete."""
    output = session_of(context, json=json, quiet=quiet, verbose=verbose).output
    with Archive.open(archive, write=delete) as opened:
        report = prune_archive(
            opened,
            keep_last=keep_last,
            keep_daily=keep_daily,
            keep_weekly=keep_weekly,
            keep_monthly=keep_monthly,
            vm=vm,
            forget=forget or (),
            delete=delete,
        )
        tell_state(output, opened)
    for decision in report.decisions:
        if decision.keep and decision.entry.trouble:
            output.warn(f"{decision.entry.name}: {decision.entry.trouble}")
    output.result("archive prune", report, _lines(report))
    raise typer.Exit(output.exit_code)


def _lines(report: PruneReport) -> list[str]:
    """Each entry and what becomes of it, then the sum."""
    going = sum(not decision.keep for decision in report.decisions)
    verb = "removed" if report.removed else "to remove"
    rows = [
        (
            "keep" if decision.keep else verb,
            decision.entry.name,
            decision.entry.vm,
            decision.entry.created,
            ", ".join(decision.reasons),
        )
        for decision in report.decisions
    ]
    done = f"{going} of {len(rows)} entries {verb}, {format_size(report.file_bytes)} in files"
    if going and not report.removed:
        done += "; nothing was removed, --delete does it"
    return [*table_lines(rows), done]
