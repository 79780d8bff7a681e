"""``uringmig archive restore``: an entry to a file, or into a QEMU that waits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from uringmig.archive.directory import Archive
from uringmig.archive.restoring import RestoreResult, restore_file, restore_into
from uringmig.cli import parameters
from uringmig.cli.archive import tell_state
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.errors import StateError, naming
from uringmig.image.guestfacts import disk_lines
from uringmig.options import ReadOptions, WriteOptions
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.streamload import StreamLoad
from uringmig.units import format_size


@command(
    parameters.archive_folder(),
    parameters.entry_name(),
    parameters.out_file(required=False),
    parameters.qmp_socket(required=False),
    click.Option(
        ["--as", "output_format"], type=click.Choice(["hot", "plain"]), default="hot",
        help="A mapped-ram image, or a plain stream that any QEMU loads.",
    ),
    parameters.then_after_load(),
    *parameters.transfer(),
)  # fmt: skip
@parameters.takes_options(ReadOptions)
def restore(
    session: Session,
    *,
    archive: Path,
    name: str,
    out: Path | None,
    qmp: Path | None,
    output_format: Literal["hot", "plain"],
    then: str,
    options: ReadOptions,
) -> int:
    """Restore an entry to a file or a waiting QEMU, compared with its manifest on the way."""
    if (out is None) == (qmp is None):
        raise StateError("say where to: a file, or --qmp with the socket of a waiting QEMU")
    with Archive.open(archive, write=False) as opened, naming(opened.find(name).image):
        if qmp is not None:
            done: RestoreResult | StreamLoad = _into(opened, name, qmp, then, options, session)
        else:
            assert out is not None
            done = restore_file(
                opened,
                name,
                out,
                output=output_format,
                read=options,
                write=options.like(WriteOptions),
                progress=session.progress,
            )
        tell_state(session.output, opened)
    for note in done.notes:
        session.output.note(note)
    session.output.result("archive restore", done, _lines(name, done))
    return session.output.exit_code


def _into(
    archive: Archive, name: str, qmp: Path, then: str, read: ReadOptions, session: Session
) -> StreamLoad:
    """Load into a QEMU, and let the guest run if asked to."""
    with Monitor(qmp) as monitor:
        done = restore_into(archive, name, monitor, read=read, progress=session.progress)
        if then == "cont" and done.run_state != "running":
            monitor.execute("cont")
            done = replace(done, run_state=monitor.run_state())
    session.output.warn_all(done.unseen)
    return done


def _lines(name: str, done: RestoreResult | StreamLoad) -> list[str]:
    """What a person wants to know of a restore."""
    rate = done.memory_bytes / done.seconds / 1e6 if done.seconds else 0.0
    memory = format_size(done.memory_bytes)
    how = f"{memory} of memory compared in {done.seconds:.2f} s ({rate:.0f} MB/s)"
    if isinstance(done, StreamLoad):
        return [
            f"loaded {name}: {how}, {format_size(done.stream_bytes)} sent, machine {done.machine}",
            f"the guest is {done.run_state}",
            *disk_lines(done.disks),
        ]
    kind = "mapped-ram image" if done.output == "hot" else "plain stream"
    return [f"restored {name} to {done.path}: {how}, {kind} of {format_size(done.file_bytes)}"]
