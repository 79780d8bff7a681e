"""Composed plain streams, read back event by event; and a real guest's device state in them."""

from __future__ import annotations

import lzma
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import mainstreams
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagewriter import (
    PAGE,
    Device,
    command,
    description,
    description_json,
    full_section,
    ram_section,
    trailer,
)
from mainstreams import (
    EOS,
    PlainBlock,
    page_record,
    plain_start,
    plain_tail,
    read_file,
    read_socket,
    word,
    zero_record,
)

from uringmig.errors import FormatError
from uringmig.format.device_state import DeviceState
from uringmig.format.events import (
    ConfigurationRead,
    FullSection,
    RamBlockRead,
    RamPage,
    RamSectionEnded,
    RamZero,
)
from uringmig.format.headers import Configuration
from uringmig.format.mainstream import MainStreamReader
from uringmig.format.plainstate import PlainState
from uringmig.format.plainstream import PlainComposer, read_opening

BLOCKS = [("pc.ram", 40 * PAGE), ("vga", 3 * PAGE)]
EARLY = [Device(idstr="vm0", section_id=40, body=b"e" * 30)]
DEVICES = [Device(), Device(idstr="cpu", section_id=3, body=b"\x06\x00\x00\x00\x02{}")]
CONFIGURATION = Configuration("pc-q35-10.0", ("mapped-ram",), uuid=bytes(range(16)))
GOLDEN = Path(__file__).parents[1] / "interop" / "golden" / "pc-uuid-virtiomem.mig.xz"


def compose(
    windows: list[tuple[int, int, list[bool]]], *, zeros: bool, tail: bytes
) -> tuple[bytes, dict[tuple[str, int], bytes]]:
    """A stream of windows (block, first page, which pages are present), and what it must hold."""
    composer = PlainComposer(CONFIGURATION, BLOCKS, section_id=5, device_state=DeviceState(tail))
    stream = composer.setup()
    pages = {}
    for number, (block, first, bits) in enumerate(windows):
        memory = np.random.default_rng(number).integers(1, 256, len(bits) * PAGE, np.uint8)
        for at, bit in enumerate(bits):
            data = memory[at * PAGE : (at + 1) * PAGE].tobytes() if bit else bytes(PAGE)
            if bit or zeros:
                pages[BLOCKS[block][0], first + at] = data
        present = np.array(bits, np.bool_)
        for piece in composer.records(block, memory, present, first_page=first, zeros=zeros):
            stream += piece
    return stream + composer.trailer(), pages


@st.composite
def some_windows(draw: st.DrawFn) -> list[tuple[int, int, list[bool]]]:
    """Windows of both blocks in any order; pages may come again, and the last one counts."""
    windows = []
    for _ in range(draw(st.integers(0, 6))):
        block = draw(st.integers(0, 1))
        count = BLOCKS[block][1] // PAGE
        first = draw(st.integers(0, count - 1))
        bits = draw(st.lists(st.booleans(), min_size=1, max_size=count - first))
        windows.append((block, first, bits))
    return windows


@settings(max_examples=100, deadline=None)
@given(some_windows(), st.booleans(), st.booleans())
def test_what_is_composed_is_read(
    windows: list[tuple[int, int, list[bool]]], zeros: bool, early: bool
) -> None:
    tail = trailer(section_id=5, early=EARLY if early else [], devices=DEVICES)
    stream, pages = compose(windows, zeros=zeros, tail=tail)
    events = read_file(stream)
    (configuration,) = [e.configuration for e in events if isinstance(e, ConfigurationRead)]
    assert configuration == Configuration("pc-q35-10.0", (), uuid=bytes(range(16)))
    listed = [(e.idstr, e.used_length) for e in events if isinstance(e, RamBlockRead)]
    assert listed == BLOCKS
    found = {}
    for event in events:
        if isinstance(event, RamPage):
            found[event.idstr, event.page_offset // PAGE] = event.data
        elif isinstance(event, RamZero):
            found[event.idstr, event.page_offset // PAGE] = bytes(PAGE)
    assert found == pages
    # Sections before memory stay before it, and behind it everything is as it was.
    order = [
        e.header.idstr if isinstance(e, FullSection) else "ram"
        for e in events
        if isinstance(e, FullSection | RamSectionEnded)
    ]
    assert order == ["ram", *(["vm0"] if early else []), "ram", "ram", "ram", "timer", "cpu"]
    assert stream.endswith(tail[len(full_section(EARLY[0])) if early else 0 :])


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("early", [[], EARLY])
@pytest.mark.parametrize(
    "ram",
    [
        {},
        {"commands": command(11)},
        {"part": ram_section(2, section_id=5) * 3, "commands": command(11)},
        {"part": b"", "commands": command(11)},
    ],
)
def test_the_tail_comes_out_as_it_went_in(
    ram: dict[str, bytes], early: list[Device], zeros: bool
) -> None:
    """A mapped-ram image made a stream and read again has the same device state, and digest."""
    tail = trailer(section_id=5, early=early, devices=DEVICES, **ram)  # type: ignore[arg-type]
    stream, _ = compose([(0, 0, [True, False]), (1, 0, [True])], zeros=zeros, tail=tail)
    found = state_of(stream).device_state().tail
    if ram.get("part") == b"":
        # One empty PART is what every image of QEMU's has.
        end = ram_section(3, section_id=5)
        tail = tail.replace(command(11) + end, ram_section(2, section_id=5) + command(11) + end)
    assert found == tail


def state_of(stream: bytes) -> PlainState:
    state = PlainState(1 << 40)
    for event in read_file(stream):
        state.note(event)
    return state


def test_commands_of_a_migration_are_left_out() -> None:
    """OPEN_RETURN_PATH and PING would ask the loader for an answer."""
    stream = plain_start(
        [PlainBlock(idstr="a", used_length=PAGE)], commands=command(1) + command(2, b"\0\0\0\1")
    ) + plain_tail(
        devices=DEVICES,
        ram=mainstreams.ram_section(2, page_record(0, bytes(PAGE), "a") + word(EOS))
        + command(2, b"\0\0\0\2")
        + command(11)
        + mainstreams.ram_section(3, zero_record(0) + word(EOS)),
    )
    assert state_of(stream).device_state().tail == trailer(devices=DEVICES, commands=command(11))


def test_a_tail_without_ends_of_ram() -> None:
    """QEMU loads an image without PART and END, and so does it the stream."""
    tail = (
        b"".join(full_section(device) for device in DEVICES)
        + b"\x00"
        + description(description_json(DEVICES))
    )
    stream, pages = compose([(0, 0, [True, False])], zeros=True, tail=tail)
    assert sum(isinstance(e, RamPage | RamZero) for e in read_socket(stream)) == len(pages) == 2


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        trailer(section_id=6, devices=DEVICES),
        trailer(section_id=5, devices=DEVICES)[:-1],
        trailer(section_id=5, devices=DEVICES) + b"\0",
        trailer(section_id=5, devices=[Device(section_id=5)]),
    ],
)
def test_a_device_state_that_cannot_follow_is_refused(tail: bytes) -> None:
    with pytest.raises(FormatError):
        compose([], zeros=True, tail=tail)


def test_a_real_guests_early_section_stays_before_its_memory() -> None:
    """QEMU's own image with virtio-mem, made a plain stream without a page."""
    base = 0x3001
    image = lzma.decompress(GOLDEN.read_bytes())
    reader = MainStreamReader(base=base, file_size=len(image))
    blocks: list[tuple[str, int]] = []
    configuration = Configuration("")
    while not reader.finished:
        reader.feed(memoryview(image)[reader.offset : reader.offset + 65536])
        for event in reader.events():
            if isinstance(event, RamBlockRead):
                blocks.append((event.idstr, event.used_length))
            elif isinstance(event, ConfigurationRead):
                configuration = event.configuration
    assert reader.tail_offset is not None
    tail = DeviceState(image[reader.tail_offset : reader.offset])
    composer = PlainComposer(configuration, blocks, section_id=1, device_state=tail)
    setup = composer.setup()
    assert read_opening(setup, at=0) == replace(configuration, capabilities=())
    assert setup.count(b"virtio-mem-device-early") == 1
    assert setup.endswith(b"\x02\0\0\0\x01"), "where the pages go"
    # The other sections are as many as in the image.
    count = sum(isinstance(event, FullSection) for event in read_file(setup + composer.trailer()))
    assert count == sum(isinstance(event, FullSection) for event in read_file(image, base=base))


@given(st.binary(max_size=80))
def test_any_opening_is_read_or_refused(data: bytes) -> None:
    for candidate in (data, b"QEVM\0\0\0\x03" + data):
        with suppress(FormatError):
            assert read_opening(candidate, at=7).machine.isprintable()
