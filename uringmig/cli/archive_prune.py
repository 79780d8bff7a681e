"""``uringmig archive prune``: what no rule keeps goes; without ``--delete`` it is only told."""

from __future__ import annotations

from pathlib import Path

import click

from uringmig.archive.directory import Archive
from uringmig.archive.pruning import PruneReport
from uringmig.archive.pruning import prune as prune_archive
from uringmig.cli import parameters
from uringmig.cli.archive import tell_state
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.cli.table import table_lines
from uringmig.units import format_size


def _keep(what: str, text: str) -> click.Option:
    """How many are kept by one rule."""
    return click.Option([f"--keep-{what}"], type=int, default=0, metavar="N", help=text)


@command(
    parameters.archive_folder(),
    _keep("last", "Keep the N newest of each VM."),
    _keep("daily", "The newest of each of N days (UTC)."),
    _keep("weekly", "The newest of each of N weeks."),
    _keep("monthly", "The newest of each of N months."),
    click.Option(
        ["--forget"], multiple=True, metavar="NAME", help="Drop this damaged or missing entry."
    ),
    parameters.only_vm(),
    click.Option(
        ["--delete"], is_flag=True, help="Really remove; otherwise it is only said what would."
    ),
)
def prune(
    session: Session,
    *,
    archive: Path,
    keep_last: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    forget: tuple[str, ...],
    vm: str | None,
    delete: bool,
) -> int:
    """Remove entries that no rule keeps, never the only good one of a VM; dry without --delete."""
    output = session.output
    with Archive.open(archive, write=delete) as opened:
        report = prune_archive(
            opened,
            keep_last=keep_last,
            keep_daily=keep_daily,
            keep_weekly=keep_weekly,
            keep_monthly=keep_monthly,
            vm=vm,
            forget=forget,
            delete=delete,
        )
        tell_state(output, opened)
    for decision in report.decisions:
        if decision.keep and decision.entry.trouble:
            output.warn(f"{decision.entry.name}: {decision.entry.trouble}")
    output.result("archive prune", report, _lines(report))
    return output.exit_code


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
