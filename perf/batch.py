"""Does a batch archive at the disk's speed, in bounded memory, and leave the page cache alone?

    python -m perf.batch --folder DIR

Dense images are archived one alone and then several in one run, in turns, on the disk that the
folder is on; then small ones, 2 in a run and 20 in a run. As root the page cache is dropped first.
The machine should be quiet.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from perf.host import describe_host
from perf.observe import cached_bytes, drop_page_cache
from uringmig import MappedRamWriter, RamBlock
from uringmig.testing.guests import fill_guest
from uringmig.units import GiB, MiB, format_size, parse_size

console: Final = Console()
_IDLE_BYTES: Final = 256 * MiB
_SMALL_BYTES: Final = 64 * MiB
#: A process that has mapped and read a file, and then does nothing.
_IDLE: Final = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(mapped[::4096])
    print("ready", flush=True)
    sys.stdin.read()
"""


def make_images(folder: Path, count: int, size: int) -> list[Path]:
    """Dense images, each of another seed."""
    paths = []
    for number in range(count):
        memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        fill_guest(memory, "dense", seed=number)
        paths.append(folder / f"dense-{size}-{number}.mig")
        with MappedRamWriter(paths[-1], [RamBlock("pc.ram", memory)]) as writer:
            writer.write_all()
            writer.finish()
    return paths


@dataclass(frozen=True)
class Batch:
    """One run: seconds from the first job's begin to the last one's end; page cache in bytes."""

    seconds: float
    cached_entries: int
    cached_more: int
    summary: dict[str, Any]


def archive(folder: Path, images: list[Path]) -> Batch:
    """Archive images in one run, measure, and remove what was archived."""
    jobs = "".join(
        f'[[jobs]]\nname = "j{number}"\nsource = {{ image = "{image}" }}\n'
        for number, image in enumerate(images)
    )
    path = folder / "jobs.toml"
    path.write_text(f'[defaults]\narchive = "archive"\n{jobs}')
    command = [sys.executable, "-m", "uringmig", "archive", "run", str(path), "--json"]
    before = page_cache_bytes()
    began = ended = 0.0
    summary: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "job" and event["stage"] == "running":
                began = began or time.monotonic()
            if event["event"] == "job" and event["stage"] == "done":
                ended = time.monotonic()
            if event["event"] == "summary":
                summary = event
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    more = page_cache_bytes() - before
    cached = sum(cached_bytes(path) or 0 for path in (folder / "archive").glob("*.mig"))
    shutil.rmtree(folder / "archive")
    return Batch(ended - began, cached, more, summary)


def page_cache_bytes() -> int:
    """The page cache of the whole machine; others' files are in it too."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) * 1024
    return 0


def speed(folder: Path, *, count: int, size: int, rounds: int) -> None:
    """One alone and several in one run, in turns."""
    images = make_images(folder, count, size)
    idle_file = folder / "idle"
    idle_file.write_bytes(os.urandom(_IDLE_BYTES))
    os.sync()
    drop_page_cache()
    alone, batches = [], []
    with subprocess.Popen(
        [sys.executable, "-c", _IDLE, str(idle_file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as idle:  # fmt: skip
        assert idle.stdout is not None
        idle.stdout.readline()
        for _ in range(rounds):
            alone.append(size / archive(folder, images[:1]).seconds)
            batches.append(archive(folder, images))
        cached = cached_bytes(idle_file) or 0
        idle.communicate("")
    rates = [count * size / one.seconds for one in batches]
    table = Table("", "MB/s each round", "median")
    for name, measured in (("one alone", alone), (f"{count} in one run", rates)):
        shown = " ".join(f"{rate / 1e6:.0f}" for rate in measured)
        table.add_row(name, shown, f"{statistics.median(measured) / 1e6:.0f}")
    console.print(table)
    ratio = statistics.median(rates) / statistics.median(alone)
    depths = [one.summary["disk_depths"] for one in batches]
    console.print(f"batch / alone: {ratio:.2f}; depths measured: {depths}")
    for what, values in (
        ("page cache of the whole machine grown", [one.cached_more for one in batches]),
        ("of the entries in the page cache", [one.cached_entries for one in batches]),
    ):
        console.print(f"{what}: {', '.join(f'{value / MiB:.1f}' for value in values)} MiB")
    largest = max(one.summary["peak_worker_bytes"] for one in batches)
    console.print(f"largest worker in the batches: {format_size(largest)}")
    held = sum(cached_bytes(image) or 0 for image in images)
    console.print(f"of the sources in the page cache: {format_size(held)}")
    console.print(f"idle file still cached: {format_size(cached)} of {format_size(_IDLE_BYTES)}")
    for path in (*images, idle_file):
        path.unlink()


def memory(folder: Path) -> None:
    """Peak memory of runner and workers, by the number of jobs."""
    images = make_images(folder, 20, _SMALL_BYTES)
    table = Table("jobs", "runner", "largest worker")
    for count in (2, 20):
        summary = archive(folder, images[:count]).summary
        table.add_row(
            str(count),
            format_size(summary["peak_runner_bytes"]),
            format_size(summary["peak_worker_bytes"]),
        )
    console.print(table)
    for path in images:
        path.unlink()


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), required=True, help="On the disk to measure."
)
@click.option("--count", default=8, show_default=True, help="Images in the batch.")
@click.option("--size", default=f"{GiB}", show_default=True, help="Of each.")
@click.option("--rounds", default=3, show_default=True, help="Of both.")
def main(folder: Path, count: int, size: str, rounds: int) -> None:
    """Measure and print."""
    console.print(describe_host(folder))
    with tempfile.TemporaryDirectory(dir=folder, prefix="perf-batch-") as name:
        speed(Path(name), count=count, size=parse_size(size), rounds=rounds)
        memory(Path(name))


if __name__ == "__main__":
    main()
