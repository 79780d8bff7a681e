"""The index of a plain stream's pages against the reader's events, one for each record."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

from uringmig.errors import FormatError
from uringmig.format.events import Event, RamPage, RamZero
from uringmig.format.mainstream import MainStreamReader
from uringmig.format.plainrecords import ABSENT, PageIndex
from uringmig.options import WINDOW_BYTES

ROW_PAGES = WINDOW_BYTES // PAGE
BLOCKS = [
    PlainBlock(idstr="pc.ram", used_length=(2 * ROW_PAGES + 40) * PAGE),
    PlainBlock(idstr="b", used_length=3 * PAGE),
]
DEVICES = [Device()]


def record_of(kind: str, block: int, page: int, *, named: bool) -> bytes:
    idstr = BLOCKS[block].idstr if named else None
    if kind == "zero":
        return zero_record(page * PAGE, idstr)
    return page_record(page * PAGE, bytes([page % 251 + 1]) * PAGE, idstr)


@st.composite
def ram_bodies(draw: st.DrawFn) -> list[bytes]:
    """Bodies of PART and END sections: stretches of pages, forwards, backwards and again."""
    bodies = []
    last = None
    for _ in range(draw(st.integers(1, 3))):
        body = b""
        for _ in range(draw(st.integers(0, 5))):
            block = draw(st.integers(0, 1))
            pages = BLOCKS[block].used_length // PAGE
            start = draw(st.integers(0, pages - 1))
            step = draw(st.sampled_from([1, -1, 0, 700]))
            kinds = draw(st.sampled_from([["page"], ["zero"], ["page", "zero"], ["zero"] * 9]))
            for number in range(draw(st.integers(1, 12))):
                page = (start + number * step) % pages
                named = block != last or draw(st.integers(0, 6)) == 0
                body += record_of(kinds[number % len(kinds)], block, page, named=named)
                last = block
        bodies.append(body + draw(st.sampled_from([b"", word(FLUSH)])) + word(EOS))
    return bodies


def stream_of(bodies: list[bytes]) -> bytes:
    sections = [ram_section(2, body) for body in bodies[:-1]] + [ram_section(3, bodies[-1])]
    return plain_start(BLOCKS) + plain_tail(devices=DEVICES, ram=b"".join(sections))


def read(
    stream: bytes, pieces: list[int], index: PageIndex | None
) -> tuple[list[Event], str | None]:
    """Read a file of these bytes in pieces; the events, and the refusal if there is one."""
    reader = MainStreamReader(file_size=len(stream), index=index)
    events: list[Event] = []
    sizes = iter(pieces)
    try:
        while not reader.finished:
            start = reader.offset
            reader.feed(stream[start : start + next(sizes, 1 << 20)])
            events += reader.events()
            if reader.offset == len(stream):
                reader.end_of_input()
    except FormatError as error:
        return events, str(error)
    return events, None


def slow_index(stream: bytes, events: list[Event]) -> dict[tuple[str, int], int]:
    """Where each page's last bytes lie, by the events; a zero page is absent."""
    names = {block.idstr: len(block.idstr) + 1 for block in BLOCKS}
    places: dict[tuple[str, int], int] = {}
    for event in events:
        if isinstance(event, RamZero):
            places.pop((event.idstr, event.page_offset // PAGE), None)
        elif isinstance(event, RamPage):
            nameless = stream[event.offset + 7] & 0x20
            at = event.offset + 8 + (0 if nameless else names[event.idstr])
            assert stream[at : at + PAGE] == event.data
            places[event.idstr, event.page_offset // PAGE] = at
    return places


def places_of(index: PageIndex) -> dict[tuple[str, int], int]:
    found = {}
    for block in BLOCKS:
        for number in range(-(-block.used_length // WINDOW_BYTES)):
            row = index.row(block.idstr, number)
            for page in [] if row is None else np.flatnonzero(row != ABSENT).tolist():
                assert row is not None
                found[block.idstr, number * ROW_PAGES + page] = int(row[page])
    return found


@settings(max_examples=80, deadline=None)
@given(ram_bodies(), st.lists(st.integers(1, 20_000), max_size=12))
def test_index_is_what_the_events_say(bodies: list[bytes], pieces: list[int]) -> None:
    stream = stream_of(bodies)
    events, refusal = read(stream, [], None)
    assert refusal is None
    index = PageIndex()
    found, refusal = read(stream, pieces, index)
    assert refusal is None
    assert found == [event for event in events if not isinstance(event, RamPage | RamZero)]
    assert places_of(index) == slow_index(stream, events)
    assert index.page_count() == len(slow_index(stream, events))


@settings(max_examples=120, deadline=None)
@given(ram_bodies(), st.data())
def test_a_bent_stream_is_refused_alike(bodies: list[bytes], data: st.DataObject) -> None:
    stream = stream_of(bodies)
    start = len(plain_start(BLOCKS))
    # Most bytes are a page's: choose among those of words, names, fills and footers.
    body = stream[start:]
    places = [at for at in range(len(body)) if at < 40 or len(set(body[at - 8 : at + 9])) > 1]
    at = start + data.draw(st.sampled_from(places))
    bent = data.draw(st.binary(min_size=1, max_size=8))
    stream = stream[:at] + bent + stream[at + len(bent) :]
    pieces = data.draw(st.lists(st.integers(1, 9000), max_size=6))
    events, refusal = read(stream, [], None)
    index = PageIndex()
    _, other = read(stream, pieces, index)
    assert refusal == other
    if refusal is None:
        assert places_of(index) == slow_index(stream, events)


def test_a_row_is_made_for_a_page_only() -> None:
    zeros = b"".join(record_of("zero", 0, page, named=page == 0) for page in range(ROW_PAGES))
    index = PageIndex()
    _, refusal = read(stream_of([zeros + word(EOS)]), [], index)
    assert refusal is None
    assert index.row("pc.ram", 0) is None
    assert index.page_count() == 0


@pytest.mark.parametrize("capabilities", [["mapped-ram"]])
def test_pages_in_a_mapped_ram_stream_are_refused_with_an_index_too(
    capabilities: list[str],
) -> None:
    import imagewriter

    tail = imagewriter.trailer(part=ram_section(2, zero_record(0, "a") + word(EOS)))
    blocks = [imagewriter.Block(idstr="a", used_length=PAGE, pages_offset=PAGE)]
    image = imagewriter.build_image(blocks=blocks, tail=tail).to_bytes()
    _, refusal = read(image, [], PageIndex())
    assert refusal is not None
    assert refusal.startswith("ram flags")
