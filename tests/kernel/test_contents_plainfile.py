"""Plain streams in files as contents: the last of each page, wherever its bytes lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from contentsreading import collect
from imagewriter import PAGE, Device
from mainstreams import (
    EOS,
    FLUSH,
    PlainBlock,
    page_record,
    plain_start,
    plain_tail,
    ram_section,
    word,
    zero_record,
)
from plainstreams import random_stream

from uringmig import ReadOptions
from uringmig.contents.opening import open_contents
from uringmig.contents.source import all_rows
from uringmig.errors import FormatError
from uringmig.options import WINDOW_BYTES

FAST = ReadOptions(channels=2, depth=4, block_size=64 << 10)


@pytest.mark.parametrize("direct", ["required", "off"])
@pytest.mark.parametrize("engine", ["io_uring", "pwrite"])
def test_gives_the_last_of_each_page(tmp_path: Path, engine: str, direct: str) -> None:
    stream, memory = random_stream(1)
    path = tmp_path / "plain"
    path.write_bytes(stream)
    options = ReadOptions(engine=engine, direct=direct)  # type: ignore[arg-type]
    with open_contents(path, options=options) as source:
        assert source.kind == "plain"
        assert source.configuration.capabilities == ("mapped-ram",)
        assert collect(source) == memory
        assert (
            collect(source, [(0, 2)])["pc.ram"][2 * WINDOW_BYTES :][:WINDOW_BYTES]
            == (memory["pc.ram"][2 * WINDOW_BYTES : 3 * WINDOW_BYTES])
        )
        stored = sum(
            any(data[at : at + PAGE])
            for data in memory.values()
            for at in range(0, len(data), PAGE)
        )
        assert source.stored_bytes() == stored * PAGE
        tail = source.device_state().tail
        assert tail.index(b"early") < tail.index(b"\x02\x00\x00\x00\x01") < tail.index(b"cpu")


@pytest.mark.parametrize("padding", range(0, PAGE, 509))
def test_whatever_the_bytes_behind_the_last_whole_page(tmp_path: Path, padding: int) -> None:
    # The stream's end moves over a page: pages in its last one are read by the other descriptor.
    blocks = [PlainBlock(idstr="a", used_length=2 * PAGE)]
    devices = [Device(body=b"\x33" * padding)]
    body = zero_record(0, "a") + page_record(PAGE, b"\x44" * PAGE) + word(EOS)
    stream = plain_start(blocks) + plain_tail(devices=devices, ram=ram_section(3, body))
    (tmp_path / "plain").write_bytes(stream)
    with open_contents(tmp_path / "plain", options=FAST) as source:
        assert collect(source) == {"a": bytes(PAGE) + b"\x44" * PAGE}


def test_a_buffer_shows_nothing_of_the_window_before(tmp_path: Path) -> None:
    """More windows than there are buffers, the later ones nearly empty."""
    blocks = [PlainBlock(idstr="a", used_length=24 * WINDOW_BYTES)]
    page = b"\x77" * PAGE
    body = page_record(0, page, "a")
    pages = [*range(1, 600), *(row * 1024 + row for row in range(1, 24))]
    body += b"".join(page_record(number * PAGE, page) for number in pages)
    stream = plain_start(blocks) + plain_tail(ram=ram_section(3, body + word(EOS)))
    (tmp_path / "plain").write_bytes(stream)
    with open_contents(tmp_path / "plain", options=replace(FAST, channels=1)) as source:
        # The rows with many pages come first, so that their buffers are used again.
        memory = collect(source)["a"]
    assert [at for at in range(0, len(memory), PAGE) if any(memory[at : at + PAGE])] == [
        number * PAGE for number in [0, *pages]
    ]


@pytest.mark.parametrize("base", [1, 4096, WINDOW_BYTES + 3])
def test_reads_at_any_offset(tmp_path: Path, base: int) -> None:
    stream, memory = random_stream(2, rounds=1)
    (tmp_path / "plain").write_bytes(b"\xaa" * base + stream)
    with open_contents(tmp_path / "plain", offset=base, options=FAST) as source:
        assert collect(source) == memory


def test_refuses_what_does_not_hold_the_guest(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    blocks = [PlainBlock(idstr="a", used_length=PAGE)]
    nothing = plain_tail(ram=ram_section(3, zero_record(0, "a") + word(EOS)))
    for stream, message in (
        (plain_start(blocks) + nothing, "not a single page"),
        (plain_start(blocks, words=word(FLUSH) + word(EOS)) + nothing, "multifd"),
        (plain_start(blocks)[:60], "is cut|vmdescription missing"),
        (b"", "cut"),
        (b"QEVM", "cut"),
        (b"\x7fELF" + bytes(9000), "not a migration stream"),
    ):
        path.write_bytes(stream)
        with pytest.raises(FormatError, match=message):
            open_contents(path).close()
    shared = [PlainBlock(idstr="a", used_length=PAGE, gpa=0)]
    path.write_bytes(plain_start(shared, capabilities=["x-ignore-shared"]) + nothing)
    with pytest.raises(FormatError, match="x-ignore-shared"):
        open_contents(path)


def test_a_huge_claim_costs_nothing(tmp_path: Path) -> None:
    blocks = [PlainBlock(idstr="a", used_length=3 << 40)]
    body = page_record(2 << 40, b"\x55" * PAGE, "a") + word(EOS)
    stream = plain_start(blocks) + plain_tail(ram=ram_section(3, body))
    (tmp_path / "plain").write_bytes(stream)
    with open_contents(tmp_path / "plain") as source:
        (read,) = source.windows([(0, (2 << 40) // WINDOW_BYTES)])
        assert read.memory[:PAGE].tobytes() == b"\x55" * PAGE
        assert read.data is not None
        assert read.data.length.tolist() == [PAGE]


def test_a_claim_that_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    blocks = [PlainBlock(idstr="a", used_length=5 << 40)]
    body = page_record(0, b"\x55" * PAGE, "a") + word(EOS)
    stream = plain_start(blocks) + plain_tail(ram=ram_section(3, body))
    (tmp_path / "plain").write_bytes(stream)
    with pytest.raises(FormatError, match="total of the ramblocks"):
        open_contents(tmp_path / "plain")


def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    stream, memory = random_stream(3, rounds=1)
    (tmp_path / "plain").write_bytes(stream)
    with open_contents(tmp_path / "plain", options=FAST) as source:
        places = set()
        for _ in range(3):
            for read in source.windows(all_rows(source.blocks)):
                places.add(read.memory.ctypes.data)
        assert collect(source) == memory
    assert len(places) <= 3 * 8
