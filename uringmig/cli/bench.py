"""``uringmig bench``: what a directory can do, in half a minute, and a profile for later saves."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from uringmig.bench.directory import BenchReport, Setting, bench_directory
from uringmig.bench.profile import Measured, ProfileEntry, check_writable, default_file, store_entry
from uringmig.bench.race import Rate
from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.output import Output
from uringmig.cli.session import Session
from uringmig.errors import StateError, StorageError, UringmigError
from uringmig.options import PAGE_SIZE, DirectMode, EngineName
from uringmig.units import MiB, format_size

_NOT_KEPT: Final = "the profile is not kept"


@command(
    click.Argument(
        ["folder"], type=parameters.PATH, metavar="DIR", help="The directory to measure."
    ),
    click.Option(
        ["--size"], type=parameters.size, default=512 * MiB, metavar="SIZE",
        show_default=format_size(512 * MiB),
        help="Largest file written; it has no name and is gone at once.",
    ),
    click.Option(["--seconds"], type=float, default=25.0, help="About how long it may take."),
    click.Option(
        ["--out"], type=parameters.new_file, metavar="FILE",
        show_default="uringmig/profiles.json in $XDG_CONFIG_HOME or ~/.config",
        help="The profile file, to which this place is added.",
    ),
    parameters.engine(),
    parameters.direct(),
    verbose=False,
)  # fmt: skip
def bench(
    session: Session,
    *,
    folder: Path,
    size: int,
    seconds: float,
    out: Path | None,
    engine: EngineName,
    direct: DirectMode,
) -> int:
    """Measure a directory: ceiling, best channels x depth x block size, direct or not."""
    output = session.output
    file = _profile_file(output, out)
    with output.waiting(f"measuring {folder} for {seconds:.0f} s"):
        report = bench_directory(folder, size=size, seconds=seconds, engine=engine, direct=direct)
    for note in report.notes:
        output.note(note)
    lines = _lines(report)
    if file is not None:
        try:
            store_entry(_entry(report), file)
            lines.append(f"profile      {file}")
        except UringmigError as error:
            output.warn(f"{_NOT_KEPT}: {error}")
    output.result("bench", report, lines)
    return output.exit_code


def _profile_file(output: Output, out: Path | None) -> Path | None:
    """The profile file, tried before anything is measured; None where nothing can be kept.

    Raises:
        UringmigError: the file that was named cannot be written, or is no profile file.
    """
    if out is not None:
        check_writable(out)
        return out
    try:
        file = default_file()
        check_writable(file)
    except (StateError, StorageError) as error:
        output.warn(f"{_NOT_KEPT}: {error}; name a file with --out")
        return None
    return file


def _entry(report: BenchReport) -> ProfileEntry:
    """What of a report goes into the profile."""
    return ProfileEntry(
        place=report.place,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=report.settings,
        measured=Measured(
            ceiling=report.ceiling.median,
            rate=report.chosen.rate.median,
            spread=report.chosen.rate.spread,
            request_seconds=report.request_seconds,
        ),
    )


def _lines(report: BenchReport) -> list[str]:
    """The answer for people."""
    share = report.chosen.rate.median / report.ceiling.median
    direct = f"{'on' if report.direct else 'off'}"
    if report.buffered is not None:
        direct += f"; through the page cache {_rate(report.buffered)}"
    ways = f"sized first {_rate(report.sized)}, extending {_rate(report.extending)}"
    if report.fallocated is not None:
        ways += f", fallocated {_rate(report.fallocated)}"
    page_seconds = PAGE_SIZE / report.sized.median
    request_seconds = report.request_seconds
    return [
        f"{report.folder}: {report.place.filesystem} on {report.place.source}, engine "
        f"{report.engine}, files of {format_size(report.file_bytes)}, "
        f"{report.seconds:.0f} s, seed {report.seed}",
        f"ceiling      {_rate(report.ceiling)}",
        f"best         {_setting(report.best)}",
        f"default      {_setting(report.default)}",
        f"chosen       {_setting(report.chosen)}, {share:.0%} of the ceiling; "
        f"{report.tried} tried, noise {report.noise:.0%}",
        f"O_DIRECT     {direct}",
        f"file         {ways}",
        f"gaps         of up to {report.bridge_pages} pages are worth writing through: a request "
        f"costs {request_seconds * 1e6:.1f} us, the bytes of a page {page_seconds * 1e6:.1f} us",
    ]


def _setting(setting: Setting) -> str:
    """A setting and its rate."""
    return (
        f"{setting.channels} channels x {setting.depth} x {format_size(setting.block_size)}: "
        f"{_rate(setting.rate)}"
    )


def _rate(rate: Rate) -> str:
    """A rate, its spread and the rounds behind it."""
    return f"{rate.median / 1e6:.0f} MB/s (spread {rate.spread:.0%} of {rate.rounds})"
