"""Registers out of the state of processors: by name, by the known layout, or not at all."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from elffiles import read_notes
from hypothesis import given
from hypothesis import strategies as st

from uringmig.export.registers import _LAYOUT, _SIZES, processor_notes, read_registers
from uringmig.format.events import FullSection
from uringmig.format.headers import SectionHeader

BODY = bytes(range(256)) * 8


def section(number: int = 0, body: bytes = BODY, version: int = 12) -> FullSection:
    header = SectionHeader(4, 7 + number, "cpu", number, version)
    return FullSection(0, header, header.pack() + body + b"\x7e" + struct.pack(">I", 7 + number))


def description(number: int = 0, shift: int = 0, **changed: int) -> bytes:
    """Fields of a processor, all of the layout's with what lies between them."""
    fields: list[dict[str, Any]] = [{"name": "before", "size": shift}]
    at = 0
    for name, place in _LAYOUT.items():
        fields.append({"name": "between", "size": place - at})
        fields.append({"name": name, "size": changed.get(name, _SIZES[name])})
        at = place + _SIZES[name]
    devices = [{"name": "cpu", "instance_id": number, "fields": fields}]
    return json.dumps({"devices": devices}).encode()


def test_names_say_where_they_are() -> None:
    """Rule: where the image names the fields they are taken from there, wherever that is."""
    named, word = read_registers([section()], description(shift=5), target=None)
    assert word is None
    (one,) = named
    assert one.words["rax"] == int.from_bytes(BODY[5:13], "big")
    assert one.words["kernel_gs_base"] == int.from_bytes(BODY[861:869], "big")
    assert one.segments["cs"] == struct.unpack_from(">IQII", BODY, 5 + 236 + 20)


def test_without_names_the_layout_is_for_the_known_target_alone() -> None:
    """Rule: registers are read by place only if target and version are those it holds for."""
    (one,), word = read_registers([section()], b"{}", target="x86_64")
    assert one.words["rip"] == int.from_bytes(BODY[128:136], "big")
    assert word is not None
    for target, version in (("i386", 12), (None, 12), ("x86_64", 11), ("x86_64", 13)):
        none, word = read_registers([section(version=version)], b"{}", target=target)
        assert none == []
        assert word is not None
        assert word.startswith("no registers")


@pytest.mark.parametrize("name", ["env.regs", "env.segs", "env.kernelgsbase"])
def test_fields_of_another_size_are_not_taken(name: str) -> None:
    none, word = read_registers([section()], description(**{name: 4}), target=None)
    assert none == []
    assert word is not None


@given(body=st.binary(max_size=2000), text=st.binary(max_size=200), named=st.booleans())
def test_any_bytes_give_registers_or_a_word(body: bytes, text: bytes, named: bool) -> None:
    """Rule: no state and no description of it ends otherwise."""
    about = description() if named else text
    found, word = read_registers([section(body=body)], about, target="x86_64")
    assert found or word


def test_notes_of_all_processors_in_the_order_of_their_numbers() -> None:
    found, _ = read_registers([section(1), section(0)], b"{}", target="x86_64")
    notes = list(read_notes(processor_notes(found)))
    assert [(name, kind, len(content)) for name, kind, content in notes] == [
        (b"CORE", 1, 336), (b"CORE", 1, 336), (b"QEMU", 0, 440), (b"QEMU", 0, 440),
    ]  # fmt: skip
    assert [struct.unpack_from("<I", content, 32)[0] for _, _, content in notes[:2]] == [1, 2]
