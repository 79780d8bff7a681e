"""Later rounds of a save: overwritten in place, bits cleared, nothing in flight together."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagereader import read_image
from numpy.typing import NDArray
from smallguests import MIB, OPTIONS, PAGE, PWRITE, RING, aligned, left_in, make_guest, ramblocks_of

from uringmig import (
    FileMemory,
    MappedRamReader,
    MappedRamWriter,
    RamBlock,
    ReadOptions,
    StateError,
    WriteOptions,
    verify,
)
from uringmig.memory.mapping import create_memfd
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.mainfile import MainFile
from uringmig.testing.faults import RequestLog, faulty, recorded


def late(engine: EngineChoice, log: RequestLog) -> EngineChoice:
    """Completions late and out of order, so that what could overlap would."""
    factory = faulty(engine.factory, lambda _: (), seed=1, hold_max=5)
    return EngineChoice("late", recorded(factory, log))


@pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)
def test_pages_are_overwritten_where_they_lie(tmp_path: Path, engine: EngineChoice) -> None:
    guest, log = make_guest(), RequestLog()
    source = np.random.default_rng(4)
    with MappedRamWriter(
        tmp_path / "vm", ramblocks_of(guest), options=OPTIONS, engine=late(engine, log)
    ) as writer:
        writer.write_all()
        place = {block.idstr: block.pages_offset for block in writer.layout.blocks}
        for idstr in ("pc.ram", "vga.vram", "pc.rom", "pc.ram"):
            pages = guest[idstr].reshape(-1, PAGE)
            index = np.unique(source.integers(0, len(pages), 60))
            pages[index] = source.integers(1, 256, (len(index), PAGE), dtype=np.uint8)
            pages[index[::3]] = 0
            log.requests.clear()
            writer.write_pages(idstr, source.permutation(np.repeat(index, 2)))
            asked = sorted(
                (offset - place[idstr]) // PAGE + page
                for offset, length in log.requests
                for page in range(length // PAGE)
            )
            assert len(set(asked)) == len(asked), "a page went twice"
            assert set(asked) <= set(index.tolist()), "a page nobody asked for was written"
        writer.finish()
    assert log.overlaps == [], "two rounds were in flight together"
    image = read_image(tmp_path / "vm")
    for block in image.blocks:
        assert image.contents[block.idstr] == guest[block.idstr].tobytes(), block.idstr
        pages = guest[block.idstr].reshape(-1, PAGE)
        if block.idstr != "pc.rom":
            assert block.bits == tuple(np.flatnonzero(pages.any(axis=1)).tolist())
    assert not verify(tmp_path / "vm").mismatches


def test_page_that_became_zero_has_its_bit_cleared_and_back(tmp_path: Path) -> None:
    memory = np.full(MIB, 1, np.uint8)
    options = WriteOptions(dense_up_to=0)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)], options=options) as writer:
        writer.write_all()
        memory[3 * PAGE : 6 * PAGE] = 0
        writer.write_pages("ram", np.array([3, 4, 5]))
        memory[4 * PAGE : 5 * PAGE] = 2
        writer.write_pages("ram", np.array([4]))
        result = writer.finish()
    image = read_image(tmp_path / "vm")
    assert image.blocks[0].bits == (*range(3), 4, *range(6, 256))
    assert image.contents["ram"] == memory.tobytes()
    assert result.pages_set == 254
    assert not verify(tmp_path / "vm").mismatches


def test_rounds_keep_to_the_rate_together(tmp_path: Path) -> None:
    """Each round alone is one batch of a channel and would go at once."""
    memory = np.full(4 * MIB, 1, np.uint8)
    options = WriteOptions(channels=1, rate=16 * MIB, manifest=False)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)], options=options) as writer:
        writer.write_all()
        started = time.monotonic()
        for _ in range(4):
            writer.write_pages("ram", np.arange(1024))
        seconds = time.monotonic() - started
        writer.finish()
    assert seconds > 0.7, "sixteen mebibytes at sixteen a second"
    reading = ReadOptions(channels=1, rate=16 * MIB)
    with MappedRamReader(tmp_path / "vm", options=reading) as reader:
        started = time.monotonic()
        for _ in range(4):
            reader.read_into("ram", memory)
        assert time.monotonic() - started > 0.5
    assert memory.all()


def test_zero_page_of_a_dense_block_is_written_as_zeros(tmp_path: Path) -> None:
    """Its bit stays set, so the older bytes in its slot have to go."""
    memory = np.full(64 * PAGE, 1, np.uint8)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("rom", memory, dense=True)]) as writer:
        writer.write_all()
        memory[PAGE : 2 * PAGE] = 0
        writer.write_pages("rom", np.array([1]))
        writer.finish()
    image = read_image(tmp_path / "vm")
    assert image.blocks[0].bits == tuple(range(64))
    assert image.contents["rom"] == memory.tobytes()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("again", ["write_all", "write_pages"])
def test_page_that_became_a_hole_is_zero_in_the_image(
    tmp_path: Path, dense: bool, again: str
) -> None:
    """A balloon gives memory back between rounds: what was data is a hole then."""
    path = tmp_path / "ram"
    path.write_bytes(b"\1" * (8 * MIB))
    memory = FileMemory(path)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory, dense=dense)]) as writer:
        writer.write_all()
        os.truncate(path, 4 * MIB)
        os.truncate(path, 8 * MIB)
        if again == "write_all":
            writer.write_all()
        else:
            writer.write_pages("ram", np.arange(1024, 2048))
        writer.finish()
    memory.close()
    image = read_image(tmp_path / "vm")
    assert image.contents["ram"] == b"\1" * (4 * MIB) + bytes(4 * MIB)
    assert len(image.blocks[0].bits) == (2048 if dense else 1024)
    assert not verify(tmp_path / "vm").mismatches


def test_a_hole_of_a_dense_block_is_written_where_an_earlier_round_wrote(tmp_path: Path) -> None:
    """Its slot is not fresh any more. The hole before has the memory asked anew where data is."""
    memfd = create_memfd("ram", 8 * MIB)
    memory, file = FileMemory(memfd, writable=True), MainFile(memfd, "ram")
    memory.view[:] = 1
    file.punch_hole(4 * MIB, MIB)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory, dense=True)]) as writer:
        writer.write_all()
        file.punch_hole(0, MIB)
        writer.write_pages("ram", np.arange(MIB // PAGE))
        writer.finish()
    expected = memory.view.tobytes()
    memory.close()
    os.close(memfd)
    assert read_image(tmp_path / "vm").contents["ram"] == expected
    assert expected[:MIB] == bytes(MIB)


def test_gap_is_bridged_only_over_pages_of_this_round(tmp_path: Path) -> None:
    """Zeros written over a page of an earlier round, to save a request, would destroy it."""
    memory, log = np.full(MIB, 1, np.uint8), RequestLog()
    memory[PAGE : 2 * PAGE] = 0
    options = WriteOptions(dense_up_to=0, channels=1)
    engine = EngineChoice("pwrite", recorded(PWRITE.factory, log))
    with MappedRamWriter(
        tmp_path / "vm", [RamBlock("ram", memory)], options=options, engine=engine
    ) as writer:
        writer.write_all()
        log.requests.clear()
        memory[: 16 * PAGE] = 2
        memory[PAGE : 2 * PAGE] = 0
        memory[9 * PAGE : 10 * PAGE] = 0
        writer.write_pages("ram", np.array([0, 2, 8, 9, 10]))
        assert [((at - MIB) // PAGE, size // PAGE) for at, size in sorted(log.requests)] == [
            (0, 1), (2, 1), (8, 3),
        ]  # fmt: skip
        writer.write_pages("ram", np.arange(16))
        writer.finish()
    assert read_image(tmp_path / "vm").contents["ram"] == memory.tobytes()


@pytest.mark.parametrize(
    "index",
    [
        np.array([-1]),
        np.array([256]),
        np.array([0, 1 << 40]),
        np.array([1 << 63], np.uint64),
        np.array([1.5]),
        np.ones(256, np.bool_),
        np.array([[1]]),
        np.array(3),
        np.array(["1"]),
    ],
    ids=str,
)
def test_what_is_no_page_is_refused_and_harms_nothing(tmp_path: Path, index: object) -> None:
    memory = np.full(MIB, 1, np.uint8)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)]) as writer:
        writer.write_all()
        with pytest.raises(StateError):
            writer.write_pages("ram", index)  # type: ignore[arg-type]
        with pytest.raises(StateError, match="no ramblock 'rom'"):
            writer.write_pages("rom", np.array([0]))
        writer.finish()
    assert read_image(tmp_path / "vm").contents["ram"] == memory.tobytes()


@pytest.mark.parametrize("index", [[], np.array([], np.int64), [5, 5, 2]], ids=str)
def test_no_pages_and_plain_lists_are_taken(tmp_path: Path, index: object) -> None:
    memory = np.full(MIB, 1, np.uint8)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)]) as writer:
        writer.write_all()
        memory[5 * PAGE] = 9
        memory[2 * PAGE] = 9
        writer.write_pages("ram", index)  # type: ignore[arg-type]
        writer.write_pages("ram", np.array([2, 5], np.uint16))
        writer.finish()
    assert read_image(tmp_path / "vm").contents["ram"] == memory.tobytes()


def test_round_before_the_first_full_one_counts_too(tmp_path: Path) -> None:
    memory = np.full(MIB, 1, np.uint8)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)]) as writer:
        writer.write_pages("ram", np.array([7]))
        with pytest.raises(StateError):
            writer.finish()
        memory[7 * PAGE :] = 0
        writer.write_all()
        writer.finish()
    assert left_in(tmp_path) == ["vm", "vm.manifest.json"]
    assert read_image(tmp_path / "vm").contents["ram"] == memory.tobytes()


@dataclass(frozen=True)
class Round:
    """What happens between two rounds, and what the next one is asked to write.

    Attributes:
        wiped: the guest's whole memory becomes zero first.
        changes: pages set to a byte; None gives the page back to the host, where it can be: a hole.
        asked: pages to be written beside those that changed.
        everything: `write_all` instead of `write_pages`.
    """

    wiped: bool
    changes: dict[int, int | None]
    asked: list[int]
    everything: bool


PAGES = 1301
_page = st.integers(0, PAGES - 1)
rounds_of_a_save = st.lists(
    st.builds(
        Round,
        wiped=st.booleans(),
        changes=st.dictionaries(_page, st.none() | st.integers(0, 2), max_size=8),
        asked=st.lists(_page, max_size=8),
        everything=st.booleans(),
    ),
    max_size=5,
)


def happen(change: Round, pages: NDArray[np.uint8], memfd: int | None) -> NDArray[np.int64]:
    """Let the guest do what it does between two rounds; the pages that are to be written."""
    before = pages.any(axis=1)
    if change.wiped:
        pages[:] = 0
    for page, value in change.changes.items():
        pages[page] = value or 0
        if value is None and memfd is not None:
            MainFile(memfd, "ram").punch_hole(page * PAGE, PAGE)
    changed = np.flatnonzero(before) if change.wiped else np.empty(0, np.int64)
    return np.concatenate([changed, np.array([*change.changes, *change.asked], np.int64)])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rounds=rounds_of_a_save,
    first=st.sampled_from([0, 5]),
    dense=st.booleans(),
    holes=st.booleans(),
    bridge=st.sampled_from([0, 4 * PAGE, 16 * PAGE]),
)
def test_image_is_the_memory_after_any_rounds(
    tmp_path: Path, rounds: list[Round], first: int, dense: bool, holes: bool, bridge: int
) -> None:
    """Pages are set, zeroed, wiped all together, given back; in the end the image is the memory.

    A set bit always stands over bytes that the save put there: also the one bit of a guest that
    has become all zero, whose slot an earlier round has filled.
    """
    log = RequestLog()
    memory = aligned(PAGES * PAGE)
    source: object = memory
    memfd = create_memfd("ram", PAGES * PAGE) if holes else None
    if memfd is not None:
        source = mapped = FileMemory(memfd, writable=True)
        memory = mapped.view
    pages = memory.reshape(-1, PAGE)
    pages[::7] = first
    options = WriteOptions(channels=2, depth=2, block_size=16 * PAGE, bridge=bridge)
    with MappedRamWriter(
        tmp_path / "vm", [RamBlock("ram", source, dense=dense)],
        options=options, engine=late(PWRITE, log),
    ) as writer:  # fmt: skip
        writer.write_all()
        for change in rounds:
            index = happen(change, pages, memfd)
            if change.everything:
                writer.write_all()
            else:
                writer.write_pages("ram", index)
        writer.finish()
    image = read_image(tmp_path / "vm")
    assert image.contents["ram"] == memory.tobytes()
    nonzero = np.flatnonzero(pages.any(axis=1)).tolist()
    assert image.blocks[0].bits == tuple(range(PAGES) if dense else nonzero or [0])
    assert log.overlaps == []
    assert not verify(tmp_path / "vm").mismatches
    if memfd is not None:
        os.close(memfd)


def test_guest_that_became_all_zero_is_zero_in_the_image(tmp_path: Path) -> None:
    """The one bit that says that an image is whole stands over a page of zeros, not over old bytes.

    By itself, beside the property above, so that the case is never left to chance.
    """
    memory = np.full(MIB, 0x5A, np.uint8)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory, dense=False)]) as writer:
        writer.write_all()
        memory[:] = 0
        writer.write_pages("ram", np.arange(MIB // PAGE))
        result = writer.finish()
    assert result.pages_set == 1
    image = read_image(tmp_path / "vm")
    assert image.blocks[0].bits == (0,)
    assert image.contents["ram"] == bytes(MIB)
    assert not verify(tmp_path / "vm").mismatches


def test_memfd_with_holes_is_written_round_by_round(tmp_path: Path) -> None:
    fd = create_memfd("ram", 16 * MIB)
    memory = FileMemory(fd, writable=True)
    memory.view[5 * PAGE] = 1
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)]) as writer:
        writer.write_all()
        memory.view[3000 * PAGE] = 1
        writer.write_pages("ram", np.array([3000, 3001]))
        writer.finish()
    memory.close()
    os.close(fd)
    assert read_image(tmp_path / "vm").blocks[0].bits == (5, 3000)
