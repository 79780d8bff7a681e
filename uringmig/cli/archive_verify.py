"""``uringmig archive verify``: entries against their manifests; damage by its place."""

from __future__ import annotations

from pathlib import Path

import click

from uringmig.archive.checking import ArchiveCheck, EntryCheck, verify_archive
from uringmig.archive.directory import Archive
from uringmig.cli import parameters
from uringmig.cli.archive import tell_state
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.errors import MismatchError
from uringmig.options import ReadOptions
from uringmig.units import format_size


def _share(text: str | float) -> float:
    """A share, as ``10%`` or ``0.1``."""
    words = str(text).strip()
    try:
        return float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"not a share: {text!r} (write for example 10%)") from None


@command(
    parameters.archive_folder(),
    click.Argument(["names"], nargs=-1, metavar="[NAME]...", help="Entries; none is all."),
    click.Option(
        ["--share"], type=_share, metavar="SHARE", show_default="all",
        help="Only so much of each entry, as 10%, from where the last run stopped.",
    ),
    click.Option(
        ["--time", "seconds"], type=parameters.seconds, metavar="TIME", show_default="no limit",
        help="Stop after this long, as 10m, and go on there the next time.",
    ),
    *parameters.transfer(),
)  # fmt: skip
@parameters.takes_options(ReadOptions)
def verify(
    session: Session,
    *,
    archive: Path,
    names: tuple[str, ...],
    share: float | None,
    seconds: float | None,
    options: ReadOptions,
) -> int:
    """Compare the entries of an archive with their manifests, chunk by chunk."""
    output = session.output
    with Archive.open(archive, write=False) as opened:
        report = verify_archive(
            opened,
            names=names,
            share=share,
            seconds=seconds,
            options=options,
            progress=session.progress,
        )
        tell_state(output, opened)
    for note in dict.fromkeys(note for entry in report.entries for note in entry.notes):
        output.note(note)
    for note in report.notes:
        output.warn(note)
    wrong = report.damaged or report.known_damaged
    exit_code = MismatchError.exit_code if wrong else output.exit_code
    lines = _lines(report, verbose=output.verbose)
    output.result("archive verify", report, lines, exit_code=exit_code)
    return exit_code


def _lines(report: ArchiveCheck, *, verbose: bool) -> list[str]:
    """Every damage, each entry on request, and the sum."""
    lines = []
    for entry in report.entries:
        if verbose or entry.damage:
            lines.append(_line(entry))
        lines += [f"{entry.name}: {damage.text}" for damage in entry.damage]
    lines += [
        f"{name}: known to be damaged or missing, and not found whole now"
        for name in report.known_damaged
    ]
    rate = report.checked_bytes / report.seconds / 1e6 if report.seconds else 0.0
    lines.append(
        f"{report.path}: {_sum(report)} of {len(report.entries)} entries damaged, "
        f"{format_size(report.checked_bytes)} compared in {report.seconds:.2f} s ({rate:.0f} MB/s)"
    )
    if report.not_reached:
        lines.append(f"no time for {len(report.not_reached)} entries: the next run begins there")
    return lines


def _line(entry: EntryCheck) -> str:
    """One entry."""
    state = f"damaged in {len(entry.damage)} places" if entry.damage else "no damage found"
    rest = "" if entry.pass_ended else ", the rest another time"
    return f"{entry.name}: {state}, {entry.checked_chunks} of {entry.chunks} chunks{rest}"


def _sum(report: ArchiveCheck) -> str:
    """How many were damaged, in words."""
    found = str(report.damaged or "none")
    return found + (f" (and {len(report.known_damaged)} known)" if report.known_damaged else "")
