"""How long does a guest stand still for a save: in one pass, live, and by QEMU itself?

    python -m perf.standstill --folder DIR

A real guest is saved while it runs, by each in turn, in shuffled rounds: first while it does next
to nothing, then while it writes to its memory all the time. QEMU's figure is the downtime that it
tells of its own live save (mapped-ram, multifd, direct-io). The machine should be quiet.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import click
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from uringmig import save_vm
from uringmig.errors import HostError, PeerError
from uringmig.testing.guestimage import build_guest
from uringmig.testing.machine import Machine
from uringmig.units import MiB, format_size, parse_size

console: Final = Console()
#: Given to the guest's shell: 32 MiB of its memory written anew for ever.
_BUSY: Final = (
    "run (while dd if=/dev/zero of=/mem/busy bs=1M count=32 conv=notrunc 2>/dev/null; do :; done) &"
)


class Save(Struct, frozen=True):
    """One save; seconds.

    Attributes:
        stopped: how long the guest stood still.
        whole: until the image was there.
    """

    stopped: float
    whole: float


def by_us(machine: Machine, image: Path, *, live: bool) -> Save:
    """Save by the library, with the defaults."""
    began = time.monotonic()
    saved = save_vm(machine.monitor, image, how="outside", live=live)
    return Save(saved.stopped_seconds, time.monotonic() - began)


def by_qemu(machine: Machine, image: Path) -> Save:
    """Save by QEMU, and let the guest go on."""
    monitor = machine.monitor
    with monitor.saved_settings():
        monitor.set_capabilities(**{"mapped-ram": True, "multifd": True})
        monitor.set_parameters(**{"multifd-channels": 2, "direct-io": True, "max-bandwidth": 0})
        began = time.monotonic()
        monitor.execute("migrate", uri=f"file:{image}")
        outcome = monitor.wait_for_migration(timeout_s=3600)
        whole = time.monotonic() - began
    if outcome.status != "completed":
        raise PeerError(f"QEMU's own save {outcome.status}: {outcome.error}")
    monitor.execute("cont")
    return Save(outcome.info["downtime"] / 1000, whole)


WAYS: Final[dict[str, Callable[[Machine, Path], Save]]] = {
    "uringmig save": lambda machine, image: by_us(machine, image, live=False),
    "uringmig save --live": lambda machine, image: by_us(machine, image, live=True),
    "qemu mapped-ram multifd x2 direct": by_qemu,
}


def measure(machine: Machine, folder: Path, *, rounds: int, seed: int) -> dict[str, list[Save]]:
    """Every way once a round, in an order of its own."""
    order = random.Random(seed)
    found: dict[str, list[Save]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        names = list(WAYS)
        order.shuffle(names)
        for name in names:
            found[name].append(WAYS[name](machine, folder / "guest.mig"))
            for image in folder.glob("guest.mig*"):
                image.unlink()
            time.sleep(0.5)  # the guest's own work goes on between two saves
    return found


def span(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


@click.command(help=__doc__)
@click.option("--folder", type=Path, required=True, help="Where images are made, on the disk.")
@click.option("--memory", default="1G", help="Of the guest.")
@click.option("--fill", default="512M", help="What the guest fills at random before.")
@click.option("--rounds", default=7)
@click.option("--seed", default=1)
def main(folder: Path, memory: str, fill: str, rounds: int, seed: int) -> None:
    memory_bytes, fill_bytes = parse_size(memory), parse_size(fill)
    with tempfile.TemporaryDirectory(dir=folder) as images, tempfile.TemporaryDirectory() as run:
        guest = build_guest(Path(run))
        if guest is None:
            raise HostError("no guest kernel here; ci/setup fetches one")
        with Machine(
            Path(run) / "vm",
            memory_bytes=memory_bytes,
            backend="",
            guest=guest,
            fill_bytes=fill_bytes,
        ) as machine:
            machine.console.wait_until_ready()
            title = f"-m {format_size(memory_bytes)}, {format_size(fill_bytes)} filled at random"
            table = Table("guest", "by", "stands still, s", "whole save, s", title=title)
            for what in ("next to idle", f"writes {format_size(32 * MiB)} over and over"):
                if what.startswith("writes"):
                    machine.console.send(_BUSY)
                found = measure(machine, Path(images), rounds=rounds, seed=seed)
                for name, saves in found.items():
                    stopped, whole = [s.stopped for s in saves], [s.whole for s in saves]
                    table.add_row(what, name, span(stopped), span(whole))
    console.print(table)


if __name__ == "__main__":
    main()
