"""One trial: a save's own writes, of incompressible memory, to a file that has no name.

What is timed is what a save does with dense memory: scan, digest, plan, submit, reap, on a fresh
file, until it is durable. Making the file and giving its room back are not timed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from uringmig import signals
from uringmig.errors import StorageError
from uringmig.format.layout import ImageLayout, plan_layout
from uringmig.image.savework import SavedBlock, SaveWork
from uringmig.image.windowview import WindowViews
from uringmig.memory.array import BufferMemory
from uringmig.options import PAGE_SIZE, WriteOptions
from uringmig.progress import ChannelCounters
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.directfile import DirectFile, open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.mainfile import MainFile
from uringmig.storage.nameless import nameless_file, path_of
from uringmig.transfer.channel import ChannelFile, run_round
from uringmig.transfer.plan import spans_of
from uringmig.units import MiB, div_ceil
from uringmig.writer import MACHINE_NONE

#: How the file gets its length: before the first write, by the writes, or with its blocks.
Preparation = Literal["sized", "extending", "fallocated"]

#: The memory that is written, over and over: larger than a cache, small beside any guest.
MEMORY_BYTES: Final = 64 * MiB
#: Packed bits of every other page, the first one included.
_EVERY_OTHER: Final = 0x55


@dataclass(frozen=True, slots=True)
class Trial:
    """What to try.

    Attributes:
        options: as of a save.
        preparation: of the file.
        every_other: write only every other page, one request each.
    """

    options: WriteOptions
    preparation: Preparation = "sized"
    every_other: bool = False


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """What came of a trial: bytes written and requests, in seconds until they were durable."""

    written_bytes: int
    requests: int
    seconds: float
    direct: bool
    note: str | None

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.written_bytes / self.seconds


class Workbench:
    """Runs trials in one folder; holds the memory they write.

    Args:
        folder: where.
        engine: with what.
        seed: of the memory's bytes.
    """

    def __init__(self, folder: str, engine: EngineChoice, *, seed: int) -> None:
        self._folder = folder
        self._engine = engine
        self._memory = aligned_buffer(MEMORY_BYTES)
        words = np.random.Generator(np.random.SFC64(seed)).integers(
            1, 1 << 64, size=MEMORY_BYTES // 8, dtype=np.uint64
        )
        self._memory.view(np.uint64)[:] = words

    def run(self, trial: Trial, *, length_bytes: int, seconds_max: float) -> TrialOutcome:
        """Write ``length_bytes``, or what ``seconds_max`` allow, and sync.

        Raises:
            StorageError: for example ENOSPC, or O_DIRECT is required and cannot be had.
        """
        signals.look()  # a trial of little data ends before its round is looked at
        blocks, layout = self._lay_out(length_bytes, every_other=trial.every_other)
        counters = [ChannelCounters() for _ in range(trial.options.channels)]
        with nameless_file(self._folder) as main, self._pages_of(main, trial.options) as file:
            shared = ChannelFile(
                file=file,
                path=self._folder,
                operation=Operation.WRITE,
                engine=self._engine,
                options=trial.options,
                bounce=False,
            )
            started = time.perf_counter()
            _prepare(main, trial.preparation, layout.trailer_offset)
            channels = run_round(
                shared,
                spans_of([block.layout.page_count for block in blocks], trial.options),
                lambda counter: SaveWork(
                    blocks,
                    trial.options,
                    counter,
                    WindowViews([block.memory for block in blocks], trial.options, []),
                ),
                counters,
            )
            with contextlib.closing(channels):
                for _ in channels:
                    signals.look()
                    if time.perf_counter() - started >= seconds_max:
                        break
            main.sync()
            seconds = time.perf_counter() - started
            if trial.every_other:
                _fill_gaps(main, blocks)
        return TrialOutcome(
            written_bytes=sum(counter.completed_bytes for counter in counters),
            requests=sum(counter.requests for counter in counters),
            seconds=seconds,
            direct=file.direct,
            note=file.note,
        )

    def can_allocate(self) -> bool:
        """Say whether this file system can allocate blocks ahead of a write.

        Raises:
            StorageError: it can, and fails.
        """
        with nameless_file(self._folder) as main:
            try:
                main.allocate(0, PAGE_SIZE)
            except StorageError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                return False
        return True

    def _lay_out(
        self, length_bytes: int, *, every_other: bool
    ) -> tuple[list[SavedBlock], ImageLayout]:
        """Make a guest of blocks that all lie in the same memory."""
        count = div_ceil(length_bytes, MEMORY_BYTES)
        lengths = [min(MEMORY_BYTES, length_bytes - n * MEMORY_BYTES) for n in range(count)]
        layout = plan_layout(
            MACHINE_NONE, [(f"ram{number}", length) for number, length in enumerate(lengths)]
        )
        blocks = [
            SavedBlock(place, BufferMemory(self._memory[: place.used_length]), dense=False)
            for place in layout.blocks
        ]
        for block in blocks:
            if every_other:
                block.selected = np.full_like(block.bitmap, _EVERY_OTHER)
        return blocks, layout

    @contextlib.contextmanager
    def _pages_of(self, main: MainFile, options: WriteOptions) -> Iterator[DirectFile]:
        """Open the file again for its pages, and empty it after the probe."""
        file = open_direct(path_of(main), Operation.WRITE, options.direct, shown=self._folder)
        try:
            main.set_size(0)
            yield file
        finally:
            os.close(file.fd)


def _prepare(main: MainFile, preparation: Preparation, length_bytes: int) -> None:
    """Give the file its length in one of the three ways."""
    if preparation == "sized":
        main.set_size(length_bytes)
    elif preparation == "fallocated":
        main.allocate(0, length_bytes)


def _fill_gaps(main: MainFile, blocks: Sequence[SavedBlock]) -> None:
    """Write what lies between single pages, so that the file is given back in a few pieces.

    Where every piece is discarded by itself (ext4 without a journal, mounted with discard) a
    thousand took 0.9 to 3 s here, and 0.1 s after this.
    """
    for block in blocks:
        assert isinstance(block.memory, BufferMemory), "a trial's memory is its own"
        main.write_at(block.layout.pages_offset, block.memory.view.data)
    main.sync()
