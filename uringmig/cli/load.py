"""``uringmig load``: an image into a QEMU that waits with ``-incoming defer``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.errors import naming
from uringmig.image.guestfacts import disk_lines
from uringmig.options import DirectMode
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.restore import LoadResult, load_into
from uringmig.units import format_size


@command(
    parameters.image_file(),
    parameters.qmp_socket(),
    parameters.offset(),
    click.Option(
        ["--channels"], type=int, default=parameters.READ.channels,
        help="Multifd channels of QEMU; 0 loads without multifd.",
    ),
    parameters.direct(),
    parameters.then_after_load(),
)  # fmt: skip
def load(
    session: Session,
    *,
    file: Path,
    qmp: Path,
    offset: int,
    channels: int,
    direct: DirectMode,
    then: str,
) -> int:
    """Restore an image into a QEMU that waits (-incoming defer)."""
    output = session.output
    # Only its check of the number is wanted: QEMU does the reading.
    replace(parameters.READ, channels=channels or parameters.READ.channels)
    with Monitor(qmp) as monitor:
        with naming(file), output.waiting(f"QEMU loads {file}"):
            done = load_into(monitor, file, offset=offset, channels=channels, direct=direct)
        if then == "cont" and done.run_state != "running":
            monitor.execute("cont")
            done = replace(done, run_state=monitor.run_state())
    # Going through the page cache is what ``preferred`` allows; every other note is a warning.
    fell_back = channels > 0 and direct == "preferred" and not done.direct
    for note in done.notes:
        (output.warn if len(done.notes) > fell_back else output.note)(note)
    output.result("load", done, _lines(done))
    return output.exit_code


def _lines(done: LoadResult) -> list[str]:
    """What a person wants to know of a load."""
    rate = done.page_bytes / done.seconds / 1e6 if done.seconds else 0.0
    how = f"{done.channels} multifd channels" if done.channels else "no multifd"
    return [
        f"loaded: {format_size(done.memory_bytes)} of memory, {format_size(done.page_bytes)} read "
        f"in {done.seconds:.2f} s ({rate:.0f} MB/s), machine {done.machine}",
        f"{how}, O_DIRECT {'on' if done.direct else 'off'}; the guest is {done.run_state}",
        *disk_lines(done.disks),
    ]
