"""``uringmig save``: a VM to one image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.options import WriteOptions
from uringmig.qemu.monitor import Monitor
from uringmig.units import format_size

if TYPE_CHECKING:
    from uringmig.qemu.vmsave import VmSave


@command(
    parameters.qmp_socket(),
    parameters.out_file(),
    click.Option(
        ["--then"], type=click.Choice(["cont", "quit", "leave"]), show_default="as it was found",
        help="Afterwards let the guest run, quit QEMU, or leave the guest stopped.",
    ),
    click.Option(
        ["--how"], type=click.Choice(["auto", "outside", "migrate"]), default="auto",
        help="Read the VM's memory from outside, or have QEMU migrate and leave shared RAM out; "
        "auto takes the second where QEMU's process cannot be read.",
    ),
    click.Option(
        ["--live"], is_flag=True,
        help="Write everything once while the guest runs, and only then stop it, for what it has "
        "changed since. So is a running guest saved with --rate.",
    ),
    click.Option(
        ["--disks"], type=str, default="none", metavar="none|internal|external=DIR",
        help="Keep the guest's disks as they are at the image's moment: not, by a snapshot in each "
        "qcow2 file, or beneath overlays in DIR, to which the guest writes from then on.",
    ),
    *parameters.transfer(),
    click.Option(
        ["--manifest/--no-manifest"], default=parameters.WRITE.manifest,
        help="Write digests beside the image.",
    ),
    *parameters.profile(),
)  # fmt: skip
@parameters.takes_options(WriteOptions)
def save(
    session: Session,
    *,
    qmp: Path,
    out: Path,
    then: Literal["cont", "quit", "leave"] | None,
    how: Literal["auto", "outside", "migrate"],
    live: bool,
    disks: str,
    options: WriteOptions,
    manifest: bool,
    profile: bool,
    profile_file: Path | None,
) -> int:
    """Save a VM of this host, whatever its RAM; it goes on as it was found."""
    output = session.output
    options = replace(options, manifest=manifest)
    if profile or profile_file is not None:
        from uringmig.cli.profile import tuned

        options = tuned(output, options, where=out, file=profile_file)
    with Monitor(qmp) as monitor:
        # Only now: the writer and numpy take longer to load than a QEMU that is not there, or is
        # busy, should have us wait.
        from uringmig.qemu.saving import save_vm

        done = save_vm(
            monitor, out, how=how, live=live, then=then, disks=disks, options=options,
            progress=session.progress,
        )  # fmt: skip
    for note in done.notes:
        # A fallback that the options allow is a note; what else went amiss is a warning.
        (output.note if note in done.image.notes else output.warn)(note)
    output.result("save", done, _lines(done, depth=options.depth, verbose=output.verbose))
    return output.exit_code


def _lines(done: VmSave, *, depth: int, verbose: bool) -> list[str]:
    """What a person wants to know of a save."""
    from uringmig.image.guestfacts import how_kept  # there by now

    image, time = done.image, done.image.time
    rate = image.written_bytes / time.elapsed / 1e6
    lines = [
        f"saved {image.path}: {format_size(image.memory_bytes)} of memory, "
        f"{format_size(image.written_bytes)} written in {time.elapsed:.2f} s ({rate:.0f} MB/s)",
        f"engine {image.engine}, O_DIRECT {'on' if image.direct else 'off'}, "
        f"{image.channels} channels x {depth} x {format_size(image.block_size)}",
        f"guest was {done.state_before}, is {done.state_after or 'gone'}, "
        f"stood still for {done.stopped_seconds:.3f} s"
        + (", after all was written once while it ran" if done.passes > 1 else ""),
        *(
            f"disk {one.name} ({one.files[0].path}) kept: {how_kept(one)}"
            for one in done.disks
            if one.kept in ("internal", "external")
        ),
    ]
    if verbose:
        lines += [
            f"requests {image.requests}, pages set {image.pages_set}, "
            f"zero {format_size(image.zero_bytes)}, file {format_size(image.file_size)}"
            + (", unaligned memory was copied" if image.bounced else ""),
            f"seconds: scan {time.scan:.2f}, digest {time.digest:.2f}, submit {time.submit:.2f}, "
            f"wait {time.wait:.2f}, receive {time.receive:.2f}, sync {time.sync:.2f}, "
            f"publish {time.publish:.2f}, cpu of channels {time.channel_cpu:.2f}",
            f"blocks from shared memory: {', '.join(done.blocks_mapped) or 'none'}; "
            f"copied ({done.how}): {', '.join(done.blocks_copied) or 'none'}",
            f"manifest {image.manifest_path or 'none'}",
        ]
    return lines
