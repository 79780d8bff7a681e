"""``uringmig convert``: an image as another kind of file."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.export.conversion import ConvertResult, TargetFormat, convert_image
from uringmig.options import ReadOptions, WriteOptions
from uringmig.units import format_size


@command(
    click.Argument(
        ["source"], metavar="IN",
        help="A mapped-ram image, plain stream, libvirt image, cold image, or ARCHIVE#NAME.",
    ),
    parameters.out_file(),
    click.Option(
        ["--to"], type=click.Choice(get_args(TargetFormat)), show_default="by OUT's suffix",
        help="mapped-ram and stream are loaded by QEMU; raw, elf and lime have memory by its "
        "physical address.",
    ),
    parameters.offset(default=None),
    *parameters.transfer(),
)  # fmt: skip
@parameters.takes_options(ReadOptions)
def convert(
    session: Session,
    *,
    source: str,
    out: Path,
    to: TargetFormat | None,
    offset: int | None,
    options: ReadOptions,
) -> int:
    """Convert an image for QEMU, or for tools that look into a guest's memory."""
    done = convert_image(
        source,
        out,
        to=to,
        offset=offset,
        read=options,
        write=options.like(WriteOptions),
        progress=session.progress,
    )
    for note in done.notes:
        session.output.note(note)
    session.output.result("convert", done, _lines(done))
    return session.output.exit_code


def _lines(done: ConvertResult) -> list[str]:
    """What a person wants to know."""
    rate = done.memory_bytes / done.seconds / 1e6 if done.seconds else 0.0
    lines = [
        f"converted {done.source_path} ({done.source_kind}) to {done.path} ({done.to}): "
        f"{format_size(done.memory_bytes)} of memory in {done.seconds:.2f} s ({rate:.0f} MB/s), "
        f"{format_size(done.file_bytes)} with {format_size(done.allocated_bytes)} allocated"
    ]
    if done.segments:
        of = "the machine type" if done.derived_map else "the manifest"
        lines.append(f"{done.segments} segments by the map of {of}")
    if done.to == "elf":
        info = "the guest's VMCOREINFO" if done.vmcoreinfo else "no VMCOREINFO"
        lines.append(f"registers of {done.processors} processors, {info}")
    return lines
