"""Buffers of our own: aligned, bounded, and a machine that has no room for them is told so."""

from __future__ import annotations

from pathlib import Path

import pytest
from smallguests import MIB, PAGE

from uringmig import HostError, WriteOptions
from uringmig.storage import ring
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.directfile import Alignment, DirectFile
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.ring import RingEngine
from uringmig.transfer.channel import ChannelFile


def channel_file(options: WriteOptions, engine: EngineChoice) -> ChannelFile:
    """Of memory that has to be copied."""
    file = DirectFile(-1, direct=True, alignment=Alignment(PAGE, PAGE))
    return ChannelFile(file, "vm", Operation.WRITE, engine, options, bounce=True)


def test_buffer_begins_at_a_page_and_is_zero() -> None:
    buffer = aligned_buffer(3 * PAGE)
    assert buffer.ctypes.data % PAGE == 0
    assert not buffer.any()
    buffer[:] = 1


def test_buffer_of_two_mebibytes_and_more_is_of_huge_pages() -> None:
    """Of small pages a request of 1 MiB is 256 pieces, more than many a disk takes in one go."""
    buffer = aligned_buffer(4 * MIB + PAGE)
    assert len(buffer) == 4 * MIB + PAGE
    assert buffer.ctypes.data % (2 * MIB) == 0
    assert not buffer.any()
    assert "hg" in flags_of(buffer.ctypes.data)  # MADV_HUGEPAGE
    assert "sh" not in flags_of(buffer.ctypes.data)  # shared memory has none


def test_no_child_gets_a_buffer() -> None:
    """A page that both have is copied at the next write, and a device may write to either."""
    for length in (PAGE, 4 * MIB):
        assert "dc" in flags_of(aligned_buffer(length).ctypes.data)  # MADV_DONTFORK


def flags_of(address: int) -> list[str]:
    """Of the mapping that an address lies in, see proc(5), VmFlags."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, _, end = first.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError("no such mapping")


def test_buffer_that_cannot_be_had_is_the_hosts_fault() -> None:
    with pytest.raises(HostError, match=f"{1 << 62} bytes.*fewer channels"):
        aligned_buffer(1 << 62)


@pytest.mark.parametrize(
    ("depth", "block_size", "slots"),
    [(8, MIB, 16), (1, MIB, 16), (32, MIB, 32), (8, 64 << 10, 128), (8, 4 * MIB, 8)],
)
def test_copies_take_sixteen_mebibytes_a_channel_or_the_depth(
    depth: int, block_size: int, slots: int
) -> None:
    options = WriteOptions(depth=depth, block_size=block_size)
    engine = EngineChoice("io_uring", RingEngine)
    assert channel_file(options, engine).slots == slots


def test_ring_is_closed_if_its_copies_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[RingEngine] = []
    monkeypatch.setattr(ring.RingEngine, "close", lambda engine: closed.append(engine))

    class Huge(RingEngine):
        """Says that it takes more than any buffer could serve."""

        def __init__(self, fd: int, operation: Operation, depth: int) -> None:
            super().__init__(fd, operation, depth)
            self.depth = 1 << 40

    shared = channel_file(WriteOptions(), EngineChoice("huge", Huge))
    with pytest.raises(HostError, match="no buffer"):
        shared.make_engine(8)
    monkeypatch.undo()
    [engine] = closed
    engine.close()
