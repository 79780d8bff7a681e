"""Device state without lengths: cut, told another run state, and never by mistake."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError
from uringmig.format.devicesections import DeviceSections
from uringmig.format.vmdescription import VmDescription, find_vmdescription

RAM_ID = 0x7FFFFFFF


def section(section_id: int, name: str, body: bytes, *, instance: int = 0) -> bytes:
    head = b"\x04" + struct.pack(">I", section_id) + bytes([len(name)]) + name.encode()
    return head + struct.pack(">II", instance, 1) + body + b"\x7e" + struct.pack(">I", section_id)


def globalstate(section_id: int, *, suspended: bool = False) -> bytes:
    flags = bytes([1, suspended])
    body = struct.pack(">I", 8) + b"running".ljust(32, b"\0") + flags + bytes(66)
    return section(section_id, "globalstate", body)


def saved(*sections: bytes) -> bytes:
    return struct.pack(">II", 0x5145564D, 3) + b"".join(sections) + b"\0"


TIMER = section(0, "timer", bytes(24))


def tail_sections(tail: bytes) -> list[tuple[str, int, int]]:
    """Name, instance and body length of each device, by the made-up vmdescription."""
    place = find_vmdescription(tail)
    assert place is not None
    devices = VmDescription.parse(tail[place + 5 :]).devices
    return [(device.name, device.instance_id, device.body_bytes) for device in devices]


def test_sections_are_copied_byte_for_byte() -> None:
    """In QEMU's order, after RAM's end, with a description that says how long each is."""
    sections = [TIMER, globalstate(3), section(7, "a/b", b"xyz", instance=2), section(9, "c", b"")]
    parsed = DeviceSections.parse(saved(*sections))
    tail = parsed.device_state(RAM_ID, "running").tail
    assert b"".join(sections) in tail
    assert tail_sections(tail) == [
        ("timer", 0, 24), ("globalstate", 0, 104), ("a/b", 2, 3), ("c", 0, 0)
    ]  # fmt: skip
    assert parsed.clock == TIMER
    assert not parsed.suspended


@pytest.mark.parametrize("state", ["paused", "prelaunch", "suspended", "guest-panicked"])
@pytest.mark.parametrize("suspended", [True, False])
def test_another_run_state_is_told(state: str, suspended: bool) -> None:
    """Name and length are changed, the flags behind them kept, and nothing else."""
    parsed = DeviceSections.parse(saved(TIMER, globalstate(3, suspended=suspended)))
    assert parsed.suspended is suspended
    tail = parsed.device_state(RAM_ID, state).tail
    told = struct.pack(">I", len(state) + 1) + state.encode().ljust(32, b"\0")
    was = struct.pack(">I", 8) + b"running".ljust(32, b"\0")
    assert globalstate(3, suspended=suspended).replace(was, told) in tail
    assert tail_sections(tail)[1] == ("globalstate", 0, 104)


def test_a_state_that_cannot_be_told() -> None:
    """No globalstate, or two places that look like one: refused, unless it is to say "running"."""
    without = DeviceSections.parse(saved(TIMER))
    planted = section(5, "virtio-blk", b"\0" + globalstate(3))
    twice = DeviceSections.parse(saved(TIMER, planted, globalstate(3)))
    for parsed in (without, twice):
        parsed.device_state(RAM_ID, "running")
        with pytest.raises(FormatError, match="paused"):
            parsed.device_state(RAM_ID, "paused")


def test_what_a_guest_plants_changes_no_byte() -> None:
    """A footer and a header in a device's buffer: cut wrongly at worst, and written as it was."""
    planted = section(5, "virtio-blk", b"\x7e\0\0\0\x05" + section(8, "nothing", b"12")[:-5])
    whole = [TIMER, planted, section(6, "next", b"1")]
    parsed = DeviceSections.parse(saved(*whole))
    tail = parsed.device_state(RAM_ID, "running").tail
    assert b"".join(whole) in tail
    # What was planted leads nowhere: the cut goes on from the real footer.
    assert [name for name, *_ in tail_sections(tail)] == ["timer", "virtio-blk", "next"]


EARLY = "0000:00:04.0/virtio-mem-device-early"


def test_early_sections_stand_before_the_end_of_ram() -> None:
    early = section(4, EARLY, b"size")
    tail = DeviceSections.parse(saved(TIMER, early, section(6, "next", b"1"))).device_state(
        RAM_ID, "running"
    )
    ram_end = b"\x03" + struct.pack(">I", RAM_ID)
    assert tail.tail.startswith(early)
    assert tail.tail.index(ram_end) < tail.tail.index(TIMER)


def test_an_early_section_that_may_be_a_guests() -> None:
    """It would be moved: one that is planted, or whose end is not certain, is refused."""
    early = section(4, EARLY, b"size")
    planted = section(5, "virtio-blk", b"\x7e\0\0\0\x05" + early + section(5, "x", b"")[:-5])
    unsure = section(4, EARLY, b"size\x7e\0\0\0\x04" + section(4, "x", b"")[:-5])
    for sections in ([planted], [planted, early], [unsure]):
        parsed = DeviceSections.parse(saved(TIMER, *sections))
        with pytest.raises(FormatError, match="early"):
            parsed.device_state(RAM_ID, "running")


def test_an_id_that_is_taken() -> None:
    with pytest.raises(FormatError, match="id of the ram section"):
        DeviceSections.parse(saved(TIMER)).device_state(0, "running")


def test_no_clock() -> None:
    with pytest.raises(FormatError, match="clock"):
        _ = DeviceSections.parse(saved(globalstate(3))).clock


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_state_that_is_cut(cut: int) -> None:
    whole = saved(TIMER, globalstate(3))
    with pytest.raises(FormatError):
        DeviceSections.parse(whole[:-cut])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_taken(body: bytes) -> None:
    """Never anything but a `FormatError`; a section of any bytes comes out as it went in."""
    whole = [TIMER, section(5, "device", body), globalstate(9)]
    tail = DeviceSections.parse(saved(*whole)).device_state(RAM_ID, "running").tail
    assert b"".join(whole) in tail
    for damaged in (body, saved()[:-1] + body):
        try:
            DeviceSections.parse(damaged)
        except FormatError:
            continue


def test_the_description_is_json_that_our_reader_takes() -> None:
    tail = DeviceSections.parse(saved(TIMER)).device_state(RAM_ID, "running").tail
    place = find_vmdescription(tail)
    assert place is not None
    text = json.loads(tail[place + 5 :])
    assert text["devices"][0]["vmsd_name"] == "timer"
