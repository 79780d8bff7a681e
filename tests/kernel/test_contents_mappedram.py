"""Mapped-ram images as contents: every byte, in any order of rows, with every engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import imagewriter
import numpy as np
import pytest
from contentsreading import collect
from smallguests import MIB, OPTIONS, PAGE, aligned, copy_of, make_guest, ramblocks_of

from uringmig import MappedRamWriter, ReadOptions
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.opening import open_contents
from uringmig.contents.source import Row, all_rows
from uringmig.errors import FormatError, MismatchError, StateError
from uringmig.format.device_state import DeviceState
from uringmig.options import WINDOW_BYTES

FAST = ReadOptions(channels=2, depth=4, block_size=64 << 10)


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    guest = make_guest(1, ram_bytes=21 * MIB)
    guest["pc.ram"][5 * MIB : 13 * MIB] = 0
    with MappedRamWriter(tmp_path / "a.mig", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish(DeviceState.empty())
    return tmp_path / "a.mig", copy_of(guest)


@pytest.mark.parametrize("engine", ["io_uring", "pwrite"])
@pytest.mark.parametrize("direct", ["required", "off"])
def test_gives_every_byte(image: tuple[Path, dict[str, bytes]], engine: str, direct: str) -> None:
    options = ReadOptions(channels=3, engine=engine, direct=direct)  # type: ignore[arg-type]
    with open_contents(image[0], options=options) as source:
        assert collect(source) == image[1]
        assert collect(source) == image[1], "a second time"
        assert source.kind == "mapped-ram"
        assert source.configuration.capabilities == ("mapped-ram",)
        assert source.device_state() == DeviceState.empty()


def test_rows_come_in_any_order_and_only_those_asked_for(
    image: tuple[Path, dict[str, bytes]],
) -> None:
    with open_contents(image[0], options=FAST) as source:
        rows = [(1, 0), (0, 5), (0, 1), (0, 2)]
        found = collect(source, rows)
        expected = {idstr: bytearray(len(data)) for idstr, data in image[1].items()}
        for number, row in rows:
            idstr = source.blocks[number].idstr
            at = slice(row * WINDOW_BYTES, (row + 1) * WINDOW_BYTES)
            expected[idstr][at] = image[1][idstr][at]
        assert found == {idstr: bytes(data) for idstr, data in expected.items()}
        assert collect(source, []) == {idstr: bytes(len(d)) for idstr, d in image[1].items()}


@pytest.mark.parametrize("row", [(0, 6), (3, 0), (-1, 0), (0, -1)])
def test_refuses_a_row_that_is_not_there(image: tuple[Path, dict[str, bytes]], row: Row) -> None:
    with open_contents(image[0]) as source, pytest.raises(StateError, match="no row"):
        list(source.windows([row]))


def test_an_abandoned_iterator_ends_its_threads_and_the_source_goes_on(
    image: tuple[Path, dict[str, bytes]],
) -> None:
    before = threading.active_count()
    with open_contents(image[0], options=FAST) as source:
        for taken in range(4):
            windows = iter(source.windows(all_rows(source.blocks)))
            for _ in range(taken):
                next(windows)
            windows.close()  # type: ignore[attr-defined]
            assert threading.active_count() == before
        assert collect(source) == image[1]


def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    guest = {"pc.ram": aligned(96 * MIB)}
    guest["pc.ram"][:] = np.random.default_rng(3).integers(1, 255, 96 * MIB, dtype=np.uint8)
    with MappedRamWriter(tmp_path / "a.mig", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish(DeviceState.empty())
    with open_contents(tmp_path / "a.mig", options=FAST) as source:
        places = {read.memory.ctypes.data for read in source.windows(all_rows(source.blocks))}
    # Two channels with two windows for requests and two to spare each.
    assert len(places) <= 8


@pytest.mark.parametrize("base", [0, 17, 5 << 20])
def test_reads_at_any_offset(tmp_path: Path, base: int) -> None:
    pages = {7: b"\x07" * PAGE, 1500: b"\x15" * PAGE}
    block = imagewriter.Block(idstr="pc.ram", used_length=8 * MIB, pages=pages)
    path = imagewriter.build_image(blocks=[block], base=base).write(tmp_path / "a.mig")
    expected = bytearray(8 * MIB)
    for index, data in pages.items():
        expected[index * PAGE : (index + 1) * PAGE] = data
    with open_contents(path, offset=base) as source:
        assert collect(source) == {"pc.ram": bytes(expected)}
        assert source.stored_bytes() == 2 * PAGE


def test_stale_bytes_of_clear_pages_are_zero(tmp_path: Path) -> None:
    # The slot of page 1 holds old bytes between two that are set: it is read along with them.
    pages: Mapping[int, bytes] = {index: bytes([index + 1]) * PAGE for index in range(3)}
    block = imagewriter.Block(idstr="pc.ram", used_length=MIB, pages=pages, bits=[0, 2])
    path = imagewriter.build_image(blocks=[block]).write(tmp_path / "a.mig")
    with open_contents(path) as source:
        (read,) = source.windows([(0, 0)])
        assert read.memory[:PAGE].tolist() == [1] * PAGE
        assert not read.memory[PAGE : 2 * PAGE].any()
        assert read.data is not None
        assert read.data.start.tolist() == [0, 2 * PAGE]


def test_fingerprint_follows_the_file(image: tuple[Path, dict[str, bytes]]) -> None:
    path = image[0]

    def fingerprint() -> str:
        with open_contents(path) as source:
            return source.fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    os.utime(path, ns=(1, 1))
    assert first != fingerprint()


def test_a_file_that_changes_under_the_reader_is_refused(
    image: tuple[Path, dict[str, bytes]],
) -> None:
    with open_contents(image[0], options=FAST) as source:
        windows = source.windows(all_rows(source.blocks))
        next(windows)
        os.utime(image[0], ns=(1, 1))
        with pytest.raises(MismatchError, match="changed while it was read"):
            list(windows)


def test_a_file_cut_under_the_reader_is_refused(
    image: tuple[Path, dict[str, bytes]],
) -> None:
    with MappedRamContents(image[0], options=FAST) as source:
        os.truncate(image[0], source.reader.image.blocks[0].pages_offset + MIB)
        with pytest.raises(FormatError, match="ends inside a page area"):
            list(source.windows(all_rows(source.blocks)))
