"""What does it cost to be told of progress: a snapshot, and a save with and without a callback?

A save tells about ten times a second and once for each phase. The save here writes nowhere: the
null engine takes everything, so that only our own work is left.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

from perf.micro import Micro, TimeFunction
from uringmig.options import CHANNELS_MAX, WriteOptions
from uringmig.progress import ChannelCounters, ProgressCallback, Snapshot, take_snapshot
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.enginechoice import EngineChoice
from uringmig.testing.engines import NullEngine
from uringmig.testing.guests import fill_guest
from uringmig.units import MiB, format_size
from uringmig.writer import MappedRamWriter, RamBlock

MEMORY_BYTES = 256 * MiB
CHANNELS = (1, WriteOptions().channels, 16, CHANNELS_MAX)
NULL = EngineChoice("null", NullEngine)
#: Snapshots in one loop, so that a loop is long against the clock.
ROUNDS = 100


def look(snapshot: Snapshot) -> None:
    """Ask a snapshot for what a progress bar shows."""
    assert snapshot.share + snapshot.rate + (snapshot.seconds_left or 0.0) >= 0.0


def snapshots(channels: int) -> TimeFunction:
    """Time snapshots of so many channels."""
    counters = [ChannelCounters(finished_bytes=MiB, completed_bytes=MiB) for _ in range(channels)]

    def run(loops: int) -> float:
        started = time.perf_counter()
        for _ in range(loops * ROUNDS):
            look(take_snapshot("write", counters, total_bytes=MEMORY_BYTES, seconds=1.0))
        return time.perf_counter() - started

    return run


@functools.cache
def make_block() -> RamBlock:
    """Fill a guest; only in the process that saves it."""
    memory = aligned_buffer(MEMORY_BYTES)
    fill_guest(memory, "dense")
    return RamBlock("pc.ram", memory)


def saves(folder: Path, progress: ProgressCallback | None) -> TimeFunction:
    """Time the page phase of whole saves to nowhere."""
    options = WriteOptions(manifest=False)

    def run(loops: int) -> float:
        block, seconds = make_block(), 0.0
        for _ in range(loops):
            with MappedRamWriter(
                folder / "none", [block], options=options, progress=progress, engine=NULL
            ) as writer:
                started = time.perf_counter()
                writer.write_all()
                seconds += time.perf_counter() - started
        return seconds

    return run


def main() -> None:
    micro = Micro(
        "perf.bench_progress",
        __doc__ or "",
        memory=format_size(MEMORY_BYTES),
        channels=WriteOptions().channels,
    )
    for channels in CHANNELS:
        micro.cost(
            f"snapshot: {channels} channels", snapshots(channels), operations=ROUNDS, of="snapshot"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, progress in (("no callback", None), ("callback", look)):
            micro.rate(
                f"save to nowhere: {name}",
                saves(Path(folder), progress),
                loop_bytes=MEMORY_BYTES,
            )


if __name__ == "__main__":
    main()
