"""The vmdescription: sizes of sections, hostile JSON, and the search for it at the end of bytes."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError, StateError
from uringmig.format.constants import (
    TAIL_BYTES_MAX,
    VMDESCRIPTION_BYTES_MAX,
    VMDESCRIPTION_OBJECTS_MAX,
)
from uringmig.format.device_state import DeviceState
from uringmig.format.vmdescription import DeviceDescription, VmDescription, find_vmdescription
from uringmig.units import MiB


def item(text: bytes) -> bytes:
    return b"\x06" + struct.pack(">I", len(text)) + text


def describe(*devices: dict[str, Any]) -> bytes:
    return json.dumps({"configuration": {}, "page_size": 4096, "devices": devices}).encode()


def size_by_hand(part: dict[str, Any]) -> int:
    """The rule, once more: fields, and subsections with a head of 6 bytes and their name."""
    total: int = sum(field["size"] * field.get("array_len", 1) for field in part.get("fields", []))
    for subsection in part.get("subsections", []):
        total += 6 + len(subsection["vmsd_name"]) + size_by_hand(subsection)
    return total


def test_nested_structures_are_not_counted_twice() -> None:
    """A struct's own size holds its members; an array that is folded counts array_len times."""
    inner = {"vmsd_name": "x", "fields": [{"name": "a", "size": 8}]}
    device = {
        "name": "apic",
        "instance_id": 1,
        "vmsd_name": "apic",
        "version": 3,
        "fields": [
            {"name": "regs", "type": "struct", "struct": inner, "size": 24},
            {"name": "isr", "array_len": 8, "type": "uint32", "size": 4},
        ],
        "subsections": [{"vmsd_name": "apic/sipi", "version": 1, "fields": [{"size": 5}]}],
    }
    parsed = VmDescription.parse(describe(device))
    assert parsed.devices == (DeviceDescription("apic", 1, 24 + 32 + 6 + 9 + 5),)
    assert parsed.pack() == item(parsed.raw)


FIELDS = st.lists(
    st.fixed_dictionaries(
        {"size": st.integers(0, 9999)}, optional={"array_len": st.integers(0, 99)}
    ),
    max_size=4,
)
PARTS = st.recursive(
    st.fixed_dictionaries({"vmsd_name": st.text("abc/", max_size=9), "fields": FIELDS}),
    lambda inner: st.fixed_dictionaries(
        {
            "vmsd_name": st.text("abc/", max_size=9),
            "fields": FIELDS,
            "subsections": st.lists(inner, max_size=3),
        }
    ),
    max_leaves=6,
)


@given(st.lists(PARTS, max_size=4))
def test_sizes_follow_the_rule(parts: list[dict[str, Any]]) -> None:
    devices = [
        {**part, "name": f"d{index}", "instance_id": index} for index, part in enumerate(parts)
    ]
    assert VmDescription.parse(describe(*devices)).devices == tuple(
        DeviceDescription(device["name"], device["instance_id"], size_by_hand(device))
        for device in devices
    )


DEEP = 100_000
HOSTILE = {
    "empty": b"",
    "not JSON": b"hello",
    "cut": describe()[:-1],
    "trailing": describe() + b"{}",
    "no devices": b"{}",
    "an array": b"[]",
    "raw bytes": b'{"devices": [{"name": "\xff", "instance_id": 0}]}',
    "name not text": b'{"devices": [{"name": 7, "instance_id": 0}]}',
    "negative size": describe({"name": "a", "instance_id": 0, "fields": [{"size": -1}]}),
    "size not a number": describe({"name": "a", "instance_id": 0, "fields": [{"size": "8"}]}),
    "float size": describe({"name": "a", "instance_id": 0, "fields": [{"size": 1.5}]}),
    "huge size": describe({"name": "a", "instance_id": 0, "fields": [{"size": 10**30}]}),
    "no size": describe({"name": "a", "instance_id": 0, "fields": [{}]}),
    "negative instance": describe({"name": "a", "instance_id": -1}),
    "deep unknown": b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b', "devices": []}',
    "deep open": b'{"x": ' + b"[" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"0" + b"}" * DEEP,
    "deep subsections": b'{"devices":[{"name":"a","instance_id":0,"subsections":['
    + b'{"vmsd_name":"s","subsections":[' * DEEP
    + b"]}" * DEEP
    + b"]}]}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError) as refusal:
        VmDescription.parse(text, at=4711)
    assert refusal.value.offset == 4711


def test_subsections_seventeen_deep_are_refused() -> None:
    part: dict[str, Any] = {"vmsd_name": "s", "fields": []}
    for _ in range(17):
        part = {"vmsd_name": "s", "fields": [], "subsections": [part]}
    with pytest.raises(FormatError) as refusal:
        VmDescription.parse(describe({**part, "name": "a", "instance_id": 0}))
    assert (refusal.value.expected, refusal.value.found) == ("at most 16", 17)


def test_sizes_that_only_multiply_beyond_the_limit_are_refused() -> None:
    fields = [{"size": TAIL_BYTES_MAX, "array_len": 2}]
    with pytest.raises(FormatError) as refusal:
        VmDescription.parse(describe({"name": "a", "instance_id": 0, "fields": fields}))
    assert refusal.value.found == 2 * TAIL_BYTES_MAX


def test_text_beyond_the_limits_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(FormatError) as refusal:
        VmDescription.parse(b" " * (VMDESCRIPTION_BYTES_MAX + 1))
    assert refusal.value.found == VMDESCRIPTION_BYTES_MAX + 1
    many = b'{"devices":[' + b"{}," * VMDESCRIPTION_OBJECTS_MAX + b"{}]}"
    with pytest.raises(FormatError) as refusal:
        VmDescription.parse(many)
    assert refusal.value.found == VMDESCRIPTION_OBJECTS_MAX + 2


@given(st.binary(max_size=60))
def test_any_bytes_parse_or_are_refused(text: bytes) -> None:
    try:
        assert VmDescription.parse(text).raw == text
    except FormatError:
        return


def find_by_hand(tail: bytes) -> int | None:
    found = None
    for place in range(len(tail) - 4):
        if tail[place] == 6 and tail[place:] == item(tail[place + 5 :]):
            found = place
    return found


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=3))
def test_search_equals_the_slow_obvious_one(before: bytes, text: bytes, after: bytes) -> None:
    for tail in (before + item(text), before + item(text) + after, before):
        assert find_vmdescription(tail) == find_by_hand(tail)


@pytest.mark.parametrize("size", [0, 1, MiB - 6, MiB - 5, MiB - 4, MiB, 3 * MiB + 1])
def test_search_crosses_its_own_steps(size: int) -> None:
    for before in (b"", b"\x06" * 7):
        assert find_vmdescription(before + item(b"{" * size)) == len(before)


def test_search_in_nothing_but_type_bytes_finds_nothing() -> None:
    """The worst case for a search by type byte: each of 40 MiB could begin the item."""
    assert find_vmdescription(b"\x06" * (40 * MiB)) is None


def test_item_longer_than_the_limit_is_not_found() -> None:
    assert find_vmdescription(item(b" " * VMDESCRIPTION_BYTES_MAX)) == 0
    assert find_vmdescription(item(b" " * (VMDESCRIPTION_BYTES_MAX + 1))) is None


def test_empty_device_state_is_what_qemu_expects_of_ram() -> None:
    text = b'{"configuration": {}, "page_size": 4096, "devices": []}'
    part, end = (
        bytes([kind]) + bytes.fromhex("00000009 0000000000000010 7e00000009") for kind in (2, 3)
    )
    assert DeviceState.empty(9).tail == part + end + b"\x00" + item(text)


def test_device_state_keeps_early_sections_before_the_end_of_ram() -> None:
    state = DeviceState.compose(1, early=[b"E1", b"E2"], full=[b"F"], vmdescription=b"{}")
    part, end = (
        bytes([kind]) + bytes.fromhex("00000001 0000000000000010 7e00000001") for kind in (2, 3)
    )
    assert state.tail == b"E1E2" + part + end + b"F" + b"\x00" + item(b"{}")


def test_device_state_with_an_endless_description_is_not_composed() -> None:
    text = b" " * (VMDESCRIPTION_BYTES_MAX + 1)
    with pytest.raises(StateError):
        DeviceState.compose(1, early=(), full=(), vmdescription=text)
