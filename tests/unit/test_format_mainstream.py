"""The main stream's reader and writer: one table of streams, each walked in every cut."""

from __future__ import annotations

import imagewriter
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
    read_file,
    read_file_cut,
    read_socket,
    small_image,
    word,
    zero_record,
)

from uringmig.errors import FormatError, StateError
from uringmig.format.device_state import DeviceState
from uringmig.format.events import (
    CommandRead,
    ConfigurationRead,
    DescriptionRead,
    Event,
    FullSection,
    MultifdFlush,
    RamBlockRead,
    RamPage,
    RamSectionEnded,
    RamSetupEnded,
    RamStarted,
    RamZero,
    StreamEnded,
    StreamStarted,
)
from uringmig.format.headers import Configuration, MappedRamHeader, SectionHeader
from uringmig.format.layout import BlockLayout, ImageLayout
from uringmig.format.mainstream import MainStreamReader, compose_setup
from uringmig.format.vmdescription import VmDescription

VMEM = Device(idstr="0000:00:01.0/vm-early", version_id=1, body=b"\x06" * 9, section_id=37)
TIMER = Device()
CPU = Device(idstr="cpu", instance_id=1, version_id=12, body=b"", section_id=3)
A = bytes(range(256)) * 16
B = A[::-1]


def full(device: Device, offset: int) -> FullSection:
    header = SectionHeader(
        4, device.section_id, device.idstr, device.instance_id, device.version_id
    )
    return FullSection(offset, header, imagewriter.full_section(device))


def described(offset: int, *devices: Device) -> DescriptionRead:
    text = imagewriter.description_json(devices)
    return DescriptionRead(offset, VmDescription.parse(text))


def opening(*capabilities: str) -> list[Event]:
    return [
        StreamStarted(0),
        ConfigurationRead(8, Configuration("pc-q35-10.0", capabilities)),
    ]


MAPPED_CAPABILITIES = ("mapped-ram",)
#: Where things lie in `small_image()`; 0x47 is the START section, 0x6000 the end of the pages.
MAPPED_RAM_PART: list[Event] = [
    *opening("mapped-ram"),
    RamStarted(0x47, 1, 3 * PAGE),
    RamBlockRead(0x60, "pc.ram", 2 * PAGE, None, MappedRamHeader(PAGE, 0x8B, 0x1000)),
    RamBlockRead(0x3000, "/rom@x", PAGE, None, MappedRamHeader(PAGE, 0x302B, 0x4000)),
    RamSetupEnded(0x5000),
    RamSectionEnded(0x5008, 1, 0x500D),
]
MAPPED_LAYOUT = ImageLayout(
    0,
    (
        BlockLayout("pc.ram", 2 * PAGE, 0x8B, 0x1000),
        BlockLayout("/rom@x", PAGE, 0x302B, 0x4000),
    ),
    0x5000,
)

MAPPED: list[tuple[str, bytes, list[Event]]] = [
    (
        "no devices",
        small_image().to_bytes(),
        [
            *MAPPED_RAM_PART,
            RamSectionEnded(0x501A, 2, 0x501F),
            RamSectionEnded(0x502C, 3, 0x5031),
            StreamEnded(0x5031),
            described(0x5032),
        ],
    ),
    (
        "early section, two devices, switchover",
        small_image(
            early=[VMEM], devices=[TIMER, CPU], commands=imagewriter.command(11)
        ).to_bytes(),
        [
            *MAPPED_RAM_PART,
            full(VMEM, 0x500D),
            RamSectionEnded(0x504B, 2, 0x5050),
            CommandRead(0x5050, 11, b""),
            RamSectionEnded(0x5062, 3, 0x5067),
            full(TIMER, 0x5067),
            full(CPU, 0x5097),
            StreamEnded(0x50AD),
            described(0x50AE, VMEM, TIMER, CPU),
        ],
    ),
]

PLAIN_BLOCKS = [
    PlainBlock(idstr="pc.ram", used_length=2 * PAGE, gpa=0),
    PlainBlock(idstr="pc.bios", used_length=PAGE, gpa=0xFFFC0000),
]
PLAIN_START = plain_start(
    PLAIN_BLOCKS,
    capabilities=["x-ignore-shared"],
    commands=imagewriter.command(1) + imagewriter.command(2, b"\x00\x00\x00\x01"),
    section_id=77,
)
PLAIN_RAM = ram_section(
    2,
    zero_record(0, "pc.ram") + page_record(PAGE, A) + page_record(0, B, "pc.bios") + word(EOS),
    section_id=77,
) + ram_section(3, zero_record(0) + word(EOS), section_id=77)

PLAIN: list[tuple[str, bytes, list[Event]]] = [
    (
        "x-ignore-shared, return path, early section",
        PLAIN_START + plain_tail(early=[VMEM], devices=[TIMER], ram=PLAIN_RAM),
        [
            *opening("x-ignore-shared"),
            CommandRead(0x4C, 1, b""),
            CommandRead(0x51, 2, b"\x00\x00\x00\x01"),
            RamStarted(0x5A, 77, 3 * PAGE),
            RamBlockRead(0x73, "pc.ram", 2 * PAGE, 0, None),
            RamBlockRead(0x8A, "pc.bios", PAGE, 0xFFFC0000, None),
            RamSetupEnded(0xA2),
            RamSectionEnded(0xAA, 1, 0xAF),
            full(VMEM, 0xAF),
            RamZero(0xE5, "pc.ram", 0),
            RamPage(0xF5, "pc.ram", PAGE, A),
            RamPage(0x10FD, "pc.bios", 0, B),
            RamSectionEnded(0x2115, 2, 0x211A),
            RamZero(0x211F, "pc.bios", 0),
            RamSectionEnded(0x2130, 3, 0x2135),
            full(TIMER, 0x2135),
            StreamEnded(0x2165),
            described(0x2166, VMEM, TIMER),
        ],
    ),
    (
        "multifd: barriers and no pages",
        plain_start([PlainBlock(idstr="a", used_length=PAGE)], words=word(FLUSH) + word(EOS))
        + plain_tail(ram=ram_section(3, word(FLUSH) + word(EOS))),
        [
            *opening(),
            RamStarted(0x18, 1, PAGE),
            RamBlockRead(0x31, "a", PAGE, None, None),
            MultifdFlush(0x3B),
            RamSetupEnded(0x43),
            RamSectionEnded(0x4B, 1, 0x50),
            MultifdFlush(0x55),
            RamSectionEnded(0x65, 3, 0x6A),
            StreamEnded(0x6A),
            described(0x6B),
        ],
    ),
]

MAPPED_IDS = [name for name, _, _ in MAPPED]
PLAIN_IDS = [name for name, _, _ in PLAIN]


@pytest.mark.parametrize(("image", "events"), [case[1:] for case in MAPPED], ids=MAPPED_IDS)
@pytest.mark.parametrize("step", [1 << 20, 4096, 7, 1])
def test_reader_takes_an_image_in_steps(image: bytes, events: list[Event], step: int) -> None:
    assert read_file(image, step=step) == events


@pytest.mark.parametrize(("image", "events"), [case[1:] for case in MAPPED], ids=MAPPED_IDS)
def test_reader_takes_an_image_in_any_two_pieces(image: bytes, events: list[Event]) -> None:
    stretches = [*range(0x8B), *range(0x3000, 0x302B), *range(0x5000, len(image))]
    for cut in stretches:
        assert read_file_cut(image, cut) == events, hex(cut)


@pytest.mark.parametrize(("image", "events"), [case[1:] for case in MAPPED], ids=MAPPED_IDS)
def test_writer_gives_the_image(image: bytes, events: list[Event]) -> None:
    """What the reader takes apart, the writer puts together again: the same bytes."""
    sections = [event for event in events if isinstance(event, FullSection)]
    end_of_part = next(
        event.offset
        for event in events
        if isinstance(event, RamSectionEnded) and event.section_type == 2
    )
    last = events[-1]
    assert isinstance(last, DescriptionRead)
    configuration = Configuration("pc-q35-10.0", MAPPED_CAPABILITIES)
    pieces = compose_setup(configuration, MAPPED_LAYOUT, section_id=1)
    state = DeviceState.compose(
        1,
        early=[section.raw for section in sections if section.offset < end_of_part],
        full=[section.raw for section in sections if section.offset > end_of_part],
        vmdescription=last.description.raw,
    )
    for offset, piece in pieces:
        assert image[offset : offset + len(piece)] == piece
    # SWITCHOVER_START is the one thing that a composed state leaves out.
    assert image[0x500D:].replace(imagewriter.command(11), b"") == state.tail


@pytest.mark.parametrize(("wire", "events"), [case[1:] for case in PLAIN], ids=PLAIN_IDS)
def test_reader_takes_a_plain_stream_in_any_two_pieces(wire: bytes, events: list[Event]) -> None:
    page_bytes = range(0x120, 0x2100)
    for cut in range(len(wire) + 1):
        # Cuts inside a page are all alike; some of them will do.
        if cut not in page_bytes or cut % 512 == 0 or len(wire) < 0x2100:
            assert read_socket(wire[:cut], wire[cut:]) == events, hex(cut)


@pytest.mark.parametrize(("wire", "events"), [case[1:] for case in PLAIN], ids=PLAIN_IDS)
def test_reader_takes_a_plain_stream_byte_by_byte(wire: bytes, events: list[Event]) -> None:
    assert read_socket(*(wire[index : index + 1] for index in range(len(wire)))) == events


@pytest.mark.parametrize(("wire", "events"), [case[1:] for case in PLAIN], ids=PLAIN_IDS)
def test_reader_takes_a_plain_stream_from_a_file(wire: bytes, events: list[Event]) -> None:
    assert read_file(wire) == events
    assert read_file(wire, step=100) == events


@pytest.mark.parametrize("base", [1, 12345, 0x3001])
@pytest.mark.parametrize("section_id", [0, 1, 77, 0xFFFFFFFF])
def test_any_base_and_section_id(base: int, section_id: int) -> None:
    image = small_image(base=base, section_id=section_id, devices=[TIMER])
    events = read_file(image.to_bytes(), base=base)
    assert events[0] == StreamStarted(base)
    assert events[2] == RamStarted(base + 0x47, section_id, 3 * PAGE)
    assert isinstance(events[-1], DescriptionRead)


def test_reader_jumps_over_pages_and_drops_what_it_jumps_over() -> None:
    image = small_image().to_bytes()
    reader = MainStreamReader(file_size=len(image))
    assert (reader.offset, reader.tail_offset) == (0, None)
    reader.feed(image)
    assert reader.offset == 0x3000
    reader.feed(image[0x3000:])
    assert reader.offset == 0x5000
    reader.feed(image[0x5000:])
    assert (reader.finished, reader.offset, reader.tail_offset) == (True, len(image), 0x500D)


def test_reader_says_that_it_waits_and_takes_a_description_given_before() -> None:
    _, wire, events = PLAIN[0]
    reader = MainStreamReader()
    reader.feed(wire[:-1])
    assert reader.waiting_for_description
    assert reader.find_description() is None
    assert list(reader.events()) == events[:9]
    reader.feed(wire[-1:])
    description = reader.find_description()
    assert description is not None
    reader.set_description(description)
    assert reader.finished
    assert list(reader.events()) == events[9:]

    reader = MainStreamReader()
    reader.set_description(description)
    for index in range(0, len(wire), 50):
        reader.feed(wire[index : index + 50])
        assert not reader.waiting_for_description
    assert list(reader.events()) == events


def test_description_that_is_not_json_is_not_found_on_a_socket() -> None:
    """Bytes of a device can look like the item; only whole JSON ends the stream."""
    reader = MainStreamReader()
    device = Device(body=b"\x06\x00\x00\x00\x02}}")
    reader.feed(plain_start([PlainBlock(idstr="a", used_length=PAGE)]))
    reader.feed(imagewriter.full_section(device)[:-5])
    assert reader.waiting_for_description
    assert reader.find_description() is None


@pytest.mark.parametrize("end", ["", "PART", "END"])
def test_part_and_end_may_be_missing(end: str) -> None:
    tail = imagewriter.trailer(
        devices=[TIMER],
        part=None if end == "PART" else b"",
        end=None if end == "END" else b"",
    )
    block = imagewriter.Block(idstr="a", used_length=PAGE, pages_offset=PAGE)
    image = imagewriter.build_image(blocks=[block], tail=tail).to_bytes()
    assert isinstance(read_file(image)[-1], DescriptionRead)


def test_areas_in_any_order_are_legal() -> None:
    """A gap before pages, headers chained backwards, bitmaps behind the stream's end."""
    blocks = [
        imagewriter.Block(idstr="a", used_length=PAGE, pages_offset=5 * PAGE, bitmap_offset=30000),
        imagewriter.Block(
            idstr="b", used_length=PAGE, pages_offset=PAGE, bitmap_offset=30008, pages={0: A}
        ),
    ]
    tail = imagewriter.trailer(devices=[TIMER])
    image = imagewriter.build_image(blocks=blocks, tail=tail)
    assert image.fields["trailer"] == 2 * PAGE
    events = read_file(image.to_bytes())
    assert [event.offset for event in events if isinstance(event, RamBlockRead)] == [0x60, 6 * PAGE]
    assert isinstance(events[-1], DescriptionRead)


def test_first_error_is_final_and_events_before_it_are_kept() -> None:
    reader = MainStreamReader()
    wire = plain_start([PlainBlock(idstr="a", used_length=PAGE)])
    with pytest.raises(FormatError) as first:
        reader.feed(wire + b"\x55")
    with pytest.raises(FormatError) as second:
        reader.feed(b"\x00")
    with pytest.raises(FormatError):
        reader.end_of_input()
    assert second.value is first.value
    assert [type(event) for event in reader.events()][-1] is RamSectionEnded


BLOCK_LISTS = st.lists(
    st.tuples(
        st.text("abc./@:", min_size=1, max_size=9),
        st.integers(1, 70),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda block: block[0],
)
DEVICES = st.lists(
    st.builds(
        Device,
        idstr=st.text("abc/", min_size=1, max_size=9),
        instance_id=st.integers(0, 9),
        version_id=st.integers(0, 9),
        body=st.binary(max_size=50),
        section_id=st.integers(2, 99),
    ),
    max_size=3,
)


@settings(deadline=None)
@given(BLOCK_LISTS, DEVICES, DEVICES, st.integers(0, 9000), st.data())
def test_any_image_is_read_in_any_pieces(
    blocks: list[tuple[str, int, int]],
    early: list[Device],
    devices: list[Device],
    base: int,
    data: st.DataObject,
) -> None:
    position = base
    placed = []
    for idstr, pages, gap in blocks:
        start = (position + 2 * PAGE - 1) // PAGE * PAGE + gap * PAGE
        placed.append(imagewriter.Block(idstr=idstr, used_length=pages * PAGE, pages_offset=start))
        position = start + pages * PAGE
    tail = imagewriter.trailer(early=early, devices=devices)
    image = imagewriter.build_image(blocks=placed, base=base, tail=tail).to_bytes()
    events = read_file(image, base=base)
    assert [event.raw for event in events if isinstance(event, FullSection)] == [
        imagewriter.full_section(device) for device in [*early, *devices]
    ]
    assert [
        (event.idstr, event.used_length, event.mapped_ram.pages_offset)
        for event in events
        if isinstance(event, RamBlockRead) and event.mapped_ram
    ] == [(block.idstr, block.used_length, block.pages_offset) for block in placed]
    step = data.draw(st.integers(1, 300))
    first = data.draw(st.integers(0, len(image)))
    assert read_file(image, base=base, step=step, first=first) == events


def test_configuration_that_no_reader_takes_is_not_composed() -> None:
    with pytest.raises(StateError):
        compose_setup(Configuration("none"), MAPPED_LAYOUT, section_id=1)
