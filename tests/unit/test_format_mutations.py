"""Hostile streams: valid ones with bytes flipped, cut out, put in or taken from elsewhere.

Whatever the bytes are, the reader gives events that obey the format's rules, or a FormatError; no
other exception, no read outside the file, and no more events than bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from imagewriter import PAGE, Device
from mainstreams import (
    EOS,
    PlainBlock,
    page_record,
    plain_start,
    plain_tail,
    ram_section,
    small_image,
    word,
    zero_record,
)

from uringmig.errors import FormatError
from uringmig.format.events import DescriptionRead, Event, RamBlockRead, RamPage, RamZero
from uringmig.format.headers import Command, Configuration, SectionHeader, StreamHeader
from uringmig.format.mainstream import MainStreamReader

DEVICES = [Device(), Device(idstr="cpu", body=b"\x06\x00\x00\x00\x02{}", section_id=9)]
EARLY = [Device(idstr="early", section_id=5, body=b"")]
IMAGE = small_image(devices=DEVICES, early=EARLY).to_bytes()
PLAIN = plain_start(
    [PlainBlock(idstr="a", used_length=2 * PAGE, gpa=0)], capabilities=["x-ignore-shared"]
) + plain_tail(
    early=EARLY,
    devices=DEVICES,
    ram=ram_section(
        2, zero_record(0, "a") + page_record(PAGE, b"\x10" * PAGE) + zero_record(0) + word(EOS)
    ),
)
#: Offsets of an image's main stream; a flip in a page would prove nothing.
STREAM = [*range(0x93), *range(0x3000, 0x3033), *range(0x5000, len(IMAGE))]

Mutation = Callable[[bytes], bytes]
BYTES = st.binary(min_size=1, max_size=9) | st.sampled_from(
    [b"\x00", b"\xff" * 8, b"\x06", b"\x7e", b"\x04", b"{", b'"size": 99999999999', b"\x80"]
)


def flip(at: int, data: bytes) -> Mutation:
    return lambda image: image[:at] + data + image[at + len(data) :]


def insert(at: int, data: bytes) -> Mutation:
    return lambda image: image[:at] + data + image[at:]


def remove(at: int, count: int) -> Mutation:
    return lambda image: image[:at] + image[at + count :]


def cut(at: int) -> Mutation:
    return lambda image: image[:at]


def copy(source: int, target: int, count: int) -> Mutation:
    return lambda image: image[:target] + image[source : source + count] + image[target + count :]


def mutations(places: st.SearchStrategy[int]) -> st.SearchStrategy[list[Mutation]]:
    one = (
        st.builds(flip, places, BYTES)
        | st.builds(insert, places, BYTES)
        | st.builds(remove, places, st.integers(1, 40))
        | st.builds(cut, places)
        | st.builds(copy, places, places, st.integers(1, 40))
    )
    return st.lists(one, min_size=1, max_size=4)


def read(stream: bytes, *, file: bool, step: int) -> list[Event]:
    """Read to the end or to the refusal, in at most as many feeds as there are bytes."""
    reader = MainStreamReader(file_size=len(stream) if file else None)
    events: list[Event] = []
    try:
        for _ in range(len(stream) + 2):
            data = stream[reader.offset : reader.offset + step]
            if not data:
                reader.end_of_input()
            if reader.finished:
                break
            reader.feed(data)
            # Of a file the reader finds it by itself, when all of the stream is there.
            if reader.waiting_for_description and not file:
                description = reader.find_description()
                if description is not None:
                    reader.set_description(description)
            events += reader.events()
    except FormatError:
        events += reader.events()
        return events
    assert reader.finished
    assert isinstance(events[-1], DescriptionRead)
    return events


def check(events: list[Event], size: int) -> None:
    """What holds of the events of any stream, good or bad up to its fault."""
    lengths: dict[str, int] = {}
    assert len(events) <= size
    for event in events:
        assert 0 <= event.offset <= size
        if isinstance(event, RamBlockRead):
            assert event.idstr not in lengths
            assert event.used_length % PAGE == 0 < event.used_length
            lengths[event.idstr] = event.used_length
            if event.mapped_ram is not None:
                assert event.mapped_ram.page_size == PAGE
                assert event.mapped_ram.pages_offset + event.used_length <= size
        if isinstance(event, RamPage | RamZero):
            assert 0 <= event.page_offset <= lengths[event.idstr] - PAGE


@settings(deadline=None, max_examples=1500)
@given(mutations(st.sampled_from(STREAM)), st.sampled_from([64, 1000, 1 << 20]))
def test_mutated_image(changes: list[Mutation], step: int) -> None:
    image = IMAGE
    for change in changes:
        image = change(image)
    events = read(image, file=True, step=step)
    check(events, len(image))
    assert events == read(image, file=True, step=4096)


@settings(deadline=None, max_examples=1000)
@given(mutations(st.integers(0, len(PLAIN))), st.booleans(), st.sampled_from([700, 1 << 20]))
def test_mutated_plain_stream(changes: list[Mutation], file: bool, step: int) -> None:
    wire = PLAIN
    for change in changes:
        wire = change(wire)
    check(read(wire, file=file, step=step), len(wire))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_noise_after_a_good_start(noise: bytes, file: bool) -> None:
    for start in (b"", PLAIN[:8], PLAIN[:76], IMAGE[:0x47], IMAGE[:0x60]):
        check(read(start + noise, file=file, step=1 << 20), len(start + noise))


@given(st.binary(max_size=80))
def test_noise_is_no_record(noise: bytes) -> None:
    for record in (StreamHeader, Configuration, SectionHeader, Command):
        try:
            found = record.unpack(noise)
        except FormatError:
            continue
        assert found.pack() == noise or isinstance(found, Configuration)


def test_streams_that_are_mutated_are_valid() -> None:
    assert isinstance(read(IMAGE, file=True, step=100)[-1], DescriptionRead)
    assert isinstance(read(PLAIN, file=False, step=100)[-1], DescriptionRead)
