"""An idle guest: windows that are nothing but hole cost a question a hole, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from smallguests import MIB, OPTIONS, PAGE, check_image

from uringmig import FileMemory, MappedRamReader, MappedRamWriter, RamBlock, verify
from uringmig.memory.mapping import create_memfd
from uringmig.options import WINDOW_BYTES
from uringmig.progress import Snapshot

#: Data at the end of a hole, alone in a window, in adjacent windows, and none after them.
PAGES = (1, 5 * 1024 - 1, 9 * 1024, 10 * 1024 + 7)
SIZE = 16 * WINDOW_BYTES - 3 * PAGE


class AskedMemory(FileMemory):
    """Notes what is asked about holes."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.asked: list[int] = []
        self.looked_at: list[int] = []

    def next_data(self, start: int) -> int:
        self.asked.append(start // WINDOW_BYTES)
        return super().next_data(start)

    def data_extents(self, *, start: int, length: int):  # type: ignore[no-untyped-def]
        self.looked_at.append(start // WINDOW_BYTES)
        return super().data_extents(start=start, length=length)


@pytest.fixture
def memory() -> Iterator[AskedMemory]:
    fd = create_memfd("idle", SIZE)
    for page in PAGES:
        os.pwrite(fd, b"x" * PAGE, page * PAGE)
    memory = AskedMemory(fd)
    yield memory
    memory.close()
    os.close(fd)


def test_only_windows_with_data_go_through_a_channel(tmp_path: Path, memory: AskedMemory) -> None:
    out = tmp_path / "vm"
    seen: list[Snapshot] = []
    rom = np.zeros(PAGE, np.uint8)
    blocks = [RamBlock("ram", memory), RamBlock("rom", rom, dense=True)]
    with MappedRamWriter(out, blocks, options=OPTIONS, progress=seen.append) as writer:
        writer.write_all()
        result = writer.finish()
    assert sorted(memory.looked_at) == [0, 4, 9, 10]
    assert memory.asked == [0, 1, 5, 10, 11]
    assert result.zero_bytes == SIZE - len(PAGES) * PAGE
    assert result.pages_set == len(PAGES) + 1
    assert seen[-1].finished_bytes == seen[-1].scanned_bytes == SIZE + PAGE
    contents = bytearray(SIZE)
    for page in PAGES:
        contents[page * PAGE : (page + 1) * PAGE] = b"x" * PAGE
    check_image(out, {"ram": bytes(contents), "rom": bytes(PAGE)})
    assert verify(out).mismatches == ()


def test_page_written_between_rounds_is_seen_in_a_hole(tmp_path: Path, memory: AskedMemory) -> None:
    """Only a first round may pass over holes; a full second one looks at every window again."""
    out = tmp_path / "vm"
    with MappedRamWriter(out, [RamBlock("ram", memory)], options=OPTIONS) as writer:
        writer.write_all()
        with Path(f"/proc/self/fd/{memory._fd}").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"y" * PAGE, 2 * WINDOW_BYTES)
        writer.write_all()
        writer.finish()
    with MappedRamReader(out) as reader:
        back = np.ones(MIB, np.uint8)
        reader.read_into("ram", back, start=2 * WINDOW_BYTES, length=MIB)
    assert back[:PAGE].tobytes() == b"y" * PAGE
    assert not back[PAGE:].any()
    assert verify(out).mismatches == ()
