"""One save or read by uringmig in a process of its own, so that its costs are its own.

``python -m perf.child``: imports, says ``ready``, takes one `Job` as a line of JSON, does it,
answers with one line, and stays until its standard input ends, so that it can still be looked at.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from contextlib import closing
from dataclasses import asdict
from typing import Literal

import msgspec
import numpy as np

from uringmig import (
    MappedRamReader,
    MappedRamWriter,
    RamBlock,
    ReadOptions,
    WriteOptions,
    save_vm,
)
from uringmig.errors import UringmigError
from uringmig.memory.mapping import FileMemory
from uringmig.progress import Snapshot
from uringmig.result import SaveResult
from uringmig.storage.enginechoice import EngineChoice
from uringmig.testing.engines import MemoryEngine, NullEngine
from uringmig.units import MiB

#: Beside the guest's memory: header, bitmaps and trailer of an image in an array.
_IMAGE_MARGIN = 64 * MiB


class Job(msgspec.Struct, kw_only=True):
    """What to do.

    Attributes:
        action: save memory to an image, or read an image into memory.
        ram: file that is the guest's memory.
        image: the image's name.
        qmp: save the machine at this socket, not just the file; None is the file alone.
        engine: ``null`` and ``memory`` are made here; None leaves it to the options.
        options: of `WriteOptions` or `ReadOptions`, by name.
    """

    action: Literal["save", "read"]
    ram: str
    image: str
    qmp: str | None = None
    engine: Literal["null", "memory"] | None = None
    options: dict[str, int | str | bool] = {}


class Answer(msgspec.Struct, kw_only=True):
    """What came of it; seconds and bytes.

    Attributes:
        error: why it failed; then nothing else means anything.
        completed_s: until the last page was written or read.
        durable_s: until all was durable and had its name.
        account: the time account, by name.
        timeline: (seconds, bytes completed) as progress told it.
    """

    error: str | None = None
    completed_s: float = 0.0
    durable_s: float = 0.0
    written_bytes: int = 0
    read_bytes: int = 0
    requests: int = 0
    account: dict[str, float] = {}
    timeline: list[tuple[float, int]] = []
    notes: list[str] = []


def main() -> None:
    """Serve one job."""
    write(b"ready")
    line = sys.stdin.buffer.readline()
    if not line:
        return
    try:
        answer = serve(msgspec.json.decode(line, type=Job))
    except (UringmigError, OSError, MemoryError) as error:
        answer = Answer(error=f"{type(error).__name__}: {error}")
    write(msgspec.json.encode(answer))
    sys.stdin.buffer.read()


def write(line: bytes) -> None:
    """Send one line to the parent."""
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def serve(job: Job) -> Answer:
    """Do one job; the caller's clock starts when it sends the job, so nothing is left out."""
    timeline: list[tuple[float, int]] = []

    def progress(snapshot: Snapshot) -> None:
        timeline.append((snapshot.seconds, snapshot.completed_bytes))

    started = time.monotonic()
    if job.action == "read":
        return _read(job, started)
    options = WriteOptions(**job.options)  # type: ignore[arg-type]  # checked by its own class
    if job.qmp is not None:
        saved = save_vm(job.qmp, job.image, how="outside", options=options, progress=progress)
        return _saved(saved.image, timeline, started)
    with closing(FileMemory(job.ram)) as memory:
        engine, started = _engine(job, memory.length_bytes, started)
        blocks = [RamBlock("pc.ram", memory)]
        with MappedRamWriter(
            job.image, blocks, options=options, progress=progress, engine=engine
        ) as writer:
            writer.write_all()
            return _saved(writer.finish(), timeline, started)


def _engine(job: Job, memory_bytes: int, started: float) -> tuple[EngineChoice | None, float]:
    """The engine of a twin, which writes to no disk; its clock starts when its memory is there."""
    if job.engine == "null":
        return EngineChoice("null", NullEngine), started
    if job.engine == "memory":
        storage = np.frombuffer(mmap.mmap(-1, memory_bytes + _IMAGE_MARGIN), np.uint8)
        storage[:: mmap.PAGESIZE] = 0
        choice = EngineChoice(
            "memory", lambda fd, operation, depth: MemoryEngine(storage, operation, depth)
        )
        return choice, time.monotonic()
    return None, started


def _saved(result: SaveResult, timeline: list[tuple[float, int]], started: float) -> Answer:
    """The answer for a save that has just ended."""
    durable_s = time.monotonic() - started
    return Answer(
        completed_s=durable_s - result.time.sync - result.time.publish,
        durable_s=durable_s,
        written_bytes=result.written_bytes,
        requests=result.requests,
        account=asdict(result.time),
        timeline=timeline,
        notes=list(result.notes),
    )


def _read(job: Job, started: float) -> Answer:
    """Read every block of an image into fresh memory."""
    options = ReadOptions(**job.options)  # type: ignore[arg-type]  # checked by its own class
    read_bytes = 0
    with MappedRamReader(job.image, options=options) as reader:
        for block in reader.blocks:
            buffer = mmap.mmap(-1, block.used_length)
            reader.read_into(block.idstr, buffer, assume_zero=True)
            read_bytes += block.pages_set * os.sysconf("SC_PAGE_SIZE")
    seconds = time.monotonic() - started
    return Answer(completed_s=seconds, durable_s=seconds, read_bytes=read_bytes)


if __name__ == "__main__":
    main()
