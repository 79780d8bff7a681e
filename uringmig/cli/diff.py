"""``uringmig diff``: how two images differ, by block and range, and by section of device state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.cli.table import table_lines
from uringmig.export.difference import BlockDiff, DiffReport, diff_images
from uringmig.options import ReadOptions
from uringmig.units import format_size

#: As diff(1) has it.
_DIFFERENT: Final = 1
#: Ranges of a block that are shown to people; `--json` has all that are kept.
_SHOWN: Final = 20


@command(
    click.Argument(["a"], help="An image of any kind, or ARCHIVE#NAME."),
    click.Argument(["b"], help="The image it is compared with, of the same kind or another."),
    click.Option(
        ["--plot"], type=parameters.new_file, metavar="FILE",
        help="Draw where they differ: .png, .svg or .pdf (needs the extra report).",
    ),
    *parameters.transfer(),
)  # fmt: skip
@parameters.takes_options(ReadOptions)
def diff(session: Session, *, a: str, b: str, plot: Path | None, options: ReadOptions) -> int:
    """Compare two images' memory and devices; exit code 0 if they are equal, 1 if they differ."""
    output = session.output
    if plot is not None:
        from uringmig.export import heatmap

        heatmap.check_plot(plot)
    report = diff_images(a, b, options=options, progress=session.progress)
    if plot is not None:
        heatmap.plot_diff(report, plot)
    for note in report.notes:
        output.note(note)
    exit_code = output.exit_code if report.equal else _DIFFERENT
    output.result("diff", report, _lines(report), exit_code=exit_code)
    return exit_code


def _lines(report: DiffReport) -> list[str]:
    """What a person wants to know."""
    looked = f"{format_size(report.read_bytes)} compared, {format_size(report.digest_bytes)} by"
    looked += f" digest, in {report.seconds:.2f} s"
    if report.equal:
        return [f"{report.a} and {report.b} hold the same: {looked}"]
    lines = [f"{report.a} and {report.b} differ: {looked}"]
    if report.machine_a != report.machine_b:
        lines.append(f"machine {report.machine_a} and {report.machine_b}")
    heading = ["ramblock", "size in A", "size in B", "differing", "only in A", "only in B"]
    rows = [_row(block) for block in report.blocks if not block.equal]
    lines += table_lines([heading, *rows], numbers=True) if rows else ["the memory is the same"]
    for block in report.blocks:
        lines += _range_lines(block)
    names = {"differs": "differs", "only-a": "only in A", "only-b": "only in B"}
    sections = [[one.idstr, str(one.instance_id), names[one.kind]] for one in report.sections]
    if sections:
        lines += ["", *table_lines([["section", "instance", ""], *sections])]
    return lines


def _row(block: BlockDiff) -> Sequence[str]:
    """One block that differs."""
    sizes = [
        "-" if size is None else format_size(size) for size in (block.length_a, block.length_b)
    ]
    parts = (block.differing_bytes, block.only_a_bytes, block.only_b_bytes)
    return [block.idstr, *sizes, *(format_size(part) for part in parts)]


def _range_lines(block: BlockDiff) -> list[str]:
    """The first ranges of a block that differ."""
    if not block.ranges:
        return []
    rows = [[f"{one.start:#x}", format_size(one.length), one.kind] for one in block.ranges[:_SHOWN]]
    lines = ["", *table_lines([[block.idstr, "length", ""], *rows])]
    more = len(block.ranges) - len(rows) + block.ranges_left_out
    return [*lines, f"and {more} more ranges (--json)"] if more else lines
