"""A real guest, saved by uringmig and by QEMU itself, each restored in a second, stock QEMU.

Run by ci/demo. Without a QEMU that can load mapped-ram images it saves and verifies a synthetic
guest instead, and says so. Exit code 0: every restored guest remembered its memory and went on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from uringmig import MappedRamReader, MappedRamWriter, RamBlock, stdio, verify
from uringmig.options import PAGE_SIZE
from uringmig.testing.guestimage import GuestImage, build_guest
from uringmig.testing.guests import fill_guest
from uringmig.testing.machine import Machine, find_qemu
from uringmig.units import MiB, format_size

CHANNELS = 2

console = Console()


@dataclass(frozen=True)
class Save:
    """One image of the guest and what it took."""

    writer: str
    image: Path
    seconds: float
    page_bytes: int


@dataclass(frozen=True)
class Restore:
    """One restored guest: what it took and what it said."""

    loader: str
    seconds: float
    digest: str
    first_count: int
    later_count: int


def say(text: str) -> None:
    """One step, on a line of its own."""
    console.print(f"[bold]demo:[/bold] {text}", highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=512, help="guest memory in MiB")
    parser.add_argument("--fill", type=int, default=320, help="MiB the guest fills")
    parser.add_argument("--folder", type=Path, help="where the images go (default: in .cache)")
    arguments = parser.parse_args()
    parent = arguments.folder or Path(__file__).parents[1] / ".cache"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as images, tempfile.TemporaryDirectory() as run:
        guest = build_guest(Path(run))
        if find_qemu() is None or guest is None:
            say("no QEMU or no guest kernel here, so a synthetic guest is saved and verified")
            return synthetic(Path(images), memory_bytes=arguments.memory * MiB)
        return real(
            guest,
            images=Path(images),
            run=Path(run),
            memory_bytes=arguments.memory * MiB,
            fill_bytes=arguments.fill * MiB,
        )


def real(guest: GuestImage, *, images: Path, run: Path, memory_bytes: int, fill_bytes: int) -> int:
    """Save a real guest both ways, restore it both ways, and compare."""
    say(
        f"booting a guest of {format_size(memory_bytes)} (-m alone, so its RAM is private); "
        f"it fills {format_size(fill_bytes)} with random bytes (about half a minute under TCG)"
    )
    with Machine(
        run / "source", memory_bytes=memory_bytes, backend="", guest=guest, fill_bytes=fill_bytes
    ) as source:
        digest = source.console.wait_until_ready()
        source.console.wait_for("^UM count=3$")
        count = source.console.count()
        say(f"the guest's digest is {digest}, its counter at {count}; stopping it")
        source.monitor.execute("stop")
        saves = [save_by_uringmig(source, images / "uringmig.mig")]
        saves.append(save_by_qemu(source, images / "qemu.mig"))
    for save in saves:
        if verify(save.image).mismatches:
            raise SystemExit(f"{save.image.name} does not verify")
    restores = []
    # The first load into a new process was four times slower than the next, whoever did it and of
    # whichever image; so one that does not count goes ahead.
    steps = [
        (saves[1], restore_by_qemu),
        *zip(saves, (restore_by_uringmig, restore_by_qemu), strict=True),
    ]
    for number, (save, restore) in enumerate(steps):
        say(f"restoring {save.image.name} in a second QEMU" + ("" if number else " (to warm up)"))
        with Machine(
            run / f"destination-{number}",
            memory_bytes=memory_bytes,
            backend="",
            guest=guest,
            incoming=True,
        ) as destination:
            restores.append(restore(destination, save.image))
    return report(saves, restores[1:], digest=digest, count=count)


def save_by_uringmig(source: Machine, image: Path) -> Save:
    """``uringmig save`` as an operator would call it; the time is that of the whole process."""
    command = ["uringmig", "save", "--qmp", str(source.qmp_path), str(image)]
    say(" ".join(command))
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    return Save("uringmig save", image, seconds, page_bytes(image))


def save_by_qemu(source: Machine, image: Path) -> Save:
    """QEMU's own mapped-ram + multifd + direct-io save, not throttled."""
    say(f"QEMU's own save: mapped-ram, multifd with {CHANNELS} channels, direct-io")
    monitor = source.monitor
    monitor.set_capabilities(**{"mapped-ram": True, "multifd": True})
    monitor.set_parameters(**{"multifd-channels": CHANNELS, "direct-io": True, "max-bandwidth": 0})
    started = time.monotonic()
    monitor.execute("migrate", uri=f"file:{image}")
    outcome = monitor.wait_for_migration(timeout_s=3600)
    seconds = time.monotonic() - started
    if outcome.status != "completed":
        raise SystemExit(f"QEMU's own save failed: {outcome.error}")
    return Save("QEMU mapped-ram + multifd + direct-io", image, seconds, page_bytes(image))


def page_bytes(image: Path) -> int:
    """Bytes of guest memory in an image."""
    with MappedRamReader(image) as reader:
        return PAGE_SIZE * sum(block.pages_set for block in reader.blocks)


def restore_by_uringmig(destination: Machine, image: Path) -> Restore:
    """``uringmig load`` as an operator would call it."""
    started = time.monotonic()
    subprocess.run(["uringmig", "load", str(image), "--qmp", str(destination.qmp_path)], check=True)
    return ask("uringmig load", destination, time.monotonic() - started)


def restore_by_qemu(destination: Machine, image: Path) -> Restore:
    """QEMU's own load with multifd and direct-io."""
    monitor = destination.monitor
    monitor.set_capabilities(**{"mapped-ram": True, "multifd": True})
    monitor.set_parameters(**{"multifd-channels": CHANNELS, "direct-io": True})
    started = time.monotonic()
    monitor.execute("migrate-incoming", uri=f"file:{image}")
    outcome = monitor.wait_for_migration(timeout_s=3600)
    if outcome.status != "completed":
        raise SystemExit(f"QEMU's own load failed: {outcome.error}")
    return ask("QEMU migrate-incoming", destination, time.monotonic() - started)


def ask(loader: str, destination: Machine, seconds: float) -> Restore:
    """Let the restored guest run, and ask what it remembers."""
    destination.monitor.execute("cont")
    digest = destination.console.digest()
    first = destination.console.count()
    later = int(destination.console.wait_for(rf"^UM count=({first + 2})$")[1])
    return Restore(loader, seconds, digest, first, later)


def report(saves: list[Save], restores: list[Restore], *, digest: str, count: int) -> int:
    """Print the table; returns 0 if every guest remembered and went on."""
    table = Table(title="the same stopped guest, saved and restored")
    for heading in ("saved by", "s", "MiB/s", "restored by", "s", "digest", "counter"):
        table.add_column(heading, justify="right" if heading in ("s", "MiB/s") else "left")
    good = True
    for save, restore in zip(saves, restores, strict=True):
        equal = restore.digest == digest
        goes_on = restore.later_count > restore.first_count >= count
        good = good and equal and goes_on
        table.add_row(
            save.writer,
            f"{save.seconds:.2f}",
            f"{save.page_bytes / MiB / save.seconds:.0f}",
            restore.loader,
            f"{restore.seconds:.2f}",
            "equal" if equal else "[red]DIFFERENT[/red]",
            f"{count} -> {restore.later_count}" if goes_on else "[red]STANDS STILL[/red]",
        )
    console.print(table)
    console.print(
        "uringmig's times are of whole processes, from their start until the image is durable (its "
        "own lines above say how long the bytes took); QEMU's are from migrate to completed, and "
        "QEMU does not sync.",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if good else 1


def synthetic(folder: Path, *, memory_bytes: int) -> int:
    """Save and verify memory of this process; what can be shown without QEMU."""
    memory = np.zeros(memory_bytes, np.uint8)
    fill_guest(memory, "mixed")
    image = folder / "synthetic.mig"
    with MappedRamWriter(image, [RamBlock("pc.ram", memory)]) as writer:
        started = time.monotonic()
        writer.write_all()
        result = writer.finish()
        seconds = time.monotonic() - started
    outcome = verify(image)
    back = np.ones_like(memory)
    with MappedRamReader(image) as reader:
        reader.read_into("pc.ram", back)
    equal = bool(np.array_equal(back, memory)) and not outcome.mismatches
    table = Table(title="a synthetic guest, saved and verified")
    for heading in ("engine", "direct", "s", "MiB/s", "verified"):
        table.add_column(heading)
    table.add_row(
        result.engine,
        "yes" if result.direct else "no",
        f"{seconds:.2f}",
        f"{PAGE_SIZE * result.pages_set / MiB / seconds:.0f}",
        "equal" if equal else "[red]DIFFERENT[/red]",
    )
    console.print(table)
    return 0 if equal else 1


if __name__ == "__main__":
    # Whoever reads along may leave (`| head`); it goes on, and ends its guests.
    stdio.prepare()
    sys.exit(main())
