"""The small records of the stream: bytes known good, both ways, and what each of them refuses."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError, StateError
from uringmig.format import cursor
from uringmig.format.constants import KNOWN_CAPABILITIES
from uringmig.format.headers import (
    Command,
    Configuration,
    MappedRamHeader,
    SectionFooter,
    SectionHeader,
    StreamHeader,
    pack_lstr,
)
from uringmig.format.qcow2 import Qcow2Header, Qcow2Snapshot

UUID = bytes(range(16))


class Record(Protocol):
    def pack(self) -> bytes: ...


def be32(value: int) -> bytes:
    return struct.pack(">I", value)


def be64(value: int) -> bytes:
    return struct.pack(">Q", value)


CAPABILITIES = b"\x05\x1aconfiguration/capabilities" + be32(1)
PAGE_BITS = b"\x05\x1econfiguration/target-page-bits" + be32(1)
UUID_HEAD = b"\x05\x12configuration/uuid" + be32(1)
NAME = b"\x07" + be32(4) + b"none"

RECORDS: list[tuple[Record, bytes]] = [
    (StreamHeader(), b"QEVM" + be32(3)),
    (Configuration("none"), NAME),
    (
        Configuration("none", ("mapped-ram",)),
        NAME + CAPABILITIES + be32(1) + b"\x0amapped-ram",
    ),
    (
        Configuration("none", ("x-ignore-shared", "multifd"), 12, UUID),
        NAME + PAGE_BITS + be32(12) + CAPABILITIES + be32(2)
        + b"\x0fx-ignore-shared\x07multifd" + UUID_HEAD + UUID,
    ),
    (SectionHeader(1, 77, "ram", 0, 4), b"\x01" + be32(77) + b"\x03ram" + be32(0) + be32(4)),
    (
        SectionHeader(4, 2, "0000:00:01.0/x", 3, 9),
        b"\x04" + be32(2) + b"\x0e0000:00:01.0/x" + be32(3) + be32(9),
    ),
    (SectionFooter(77), b"\x7e" + be32(77)),
    (Command(1), bytes.fromhex("0800010000")),
    (Command(2, be32(1)), bytes.fromhex("080002000400000001")),
    (Command(11), bytes.fromhex("08000b0000")),
    (
        MappedRamHeader(4096, 0x8B, 0x100000),
        be32(1) + be64(4096) + be64(0x8B) + be64(0x100000),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("record", "wire"), RECORDS)
def test_record_packs_to_its_bytes(record: Record, wire: bytes) -> None:
    assert record.pack() == wire


@pytest.mark.parametrize(("record", "wire"), RECORDS)
def test_record_unpacks_from_its_bytes(record: Any, wire: bytes) -> None:
    assert type(record).unpack(wire, at=1000) == record


@pytest.mark.parametrize(("record", "wire"), RECORDS)
def test_record_of_another_length_is_refused(record: Any, wire: bytes) -> None:
    """A prefix is refused, or is itself a record that packs to those bytes; a longer one is not."""
    for cut in range(len(wire)):
        try:
            part = type(record).unpack(wire[:cut])
        except FormatError:
            continue
        assert isinstance(record, Configuration)
        assert part.pack() == wire[:cut]
    with pytest.raises(FormatError):
        type(record).unpack(wire + b"\x01")


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (cursor.BE32, 4),
        (cursor.BE64, 8),
        (StreamHeader.STRUCT, 8),
        (SectionHeader.STRUCT, 8),
        (SectionFooter.STRUCT, 5),
        (Command.STRUCT, 5),
        (MappedRamHeader.STRUCT, 28),
        (Qcow2Header.STRUCT, 72),
        (Qcow2Snapshot.STRUCT, 40),
        (Qcow2Snapshot.EXTRA, 16),
    ],
)
def test_struct_sizes(layout: struct.Struct, size: int) -> None:
    assert layout.size == size
    assert layout.format.startswith(">")


BAD_RECORDS: list[tuple[str, Callable[..., object], bytes, int, object, object]] = [
    ("magic", StreamHeader.unpack, b"QEVN" + be32(3), 0, "QEVM", "'QEVN'"),
    ("version", StreamHeader.unpack, b"QEVM" + be32(2), 4, 3, 2),
    ("type", Configuration.unpack, b"\x01" + NAME[1:], 0, 7, 1),
    ("name length", Configuration.unpack, b"\x07" + be32(256) + b"a" * 256, 1, "at most 255", 256),
    ("no name", Configuration.unpack, b"\x07" + be32(0), 1, "1 or more characters", 0),
    ("name", Configuration.unpack, b"\x07" + be32(2) + b"a\n", 1, "printable ASCII", b"a\n"),
    ("page bits", Configuration.unpack, NAME + PAGE_BITS + be32(16), 45, 12, 16),
    ("count", Configuration.unpack, NAME + CAPABILITIES + be32(65), 41, "at most 64", 65),
    (
        "unknown capability",
        Configuration.unpack,
        NAME + CAPABILITIES + be32(1) + b"\x03foo",
        45,
        "one QEMU has",
        "foo",
    ),
    (
        "repeated capability",
        Configuration.unpack,
        NAME + CAPABILITIES + be32(2) + b"\x07multifd\x07multifd",
        53,
        None,
        "multifd",
    ),
    (
        "both capabilities",
        Configuration.unpack,
        NAME + CAPABILITIES + be32(2) + b"\x0fx-ignore-shared\x0amapped-ram",
        41,
        "one of the two",
        "both",
    ),
    (
        "subsection version",
        Configuration.unpack,
        NAME + UUID_HEAD[:-4] + be32(2) + UUID,
        29,
        1,
        2,
    ),
    (
        "repeated subsection",
        Configuration.unpack,
        NAME + 2 * (UUID_HEAD + UUID),
        50,
        None,
        "configuration/uuid",
    ),
    (
        "unknown subsection",
        Configuration.unpack,
        NAME + b"\x05\x03foo" + be32(1),
        10,
        (
            "configuration/target-page-bits",
            "configuration/capabilities",
            "configuration/uuid",
        ),
        "foo",
    ),
    ("section type", SectionHeader.unpack, b"\x02" + be32(1), 0, "START or FULL", "0x02"),
    ("footer", SectionFooter.unpack, b"\x00" + be32(1), 0, 0x7E, 0),
    ("ping", Command.unpack, bytes.fromhex("0800020000"), 3, 4, 0),
    ("postcopy", Command.unpack, bytes.fromhex("0800030000"), 1, "one of 1, 2, 11", 3),
    ("command 12", Command.unpack, bytes.fromhex("08000c0000"), 1, "one of 1, 2, 11", 12),
]


@pytest.mark.parametrize(
    ("unpack", "wire", "where", "expected", "found"),
    [case[1:] for case in BAD_RECORDS],
    ids=[case[0] for case in BAD_RECORDS],
)
def test_bad_record_is_refused_with_its_place(
    unpack: Callable[..., object], wire: bytes, where: int, expected: object, found: object
) -> None:
    with pytest.raises(FormatError) as refusal:
        unpack(wire, at=5000)
    error = refusal.value
    assert (error.offset, error.expected, error.found) == (5000 + where, expected, found)


@pytest.mark.parametrize(
    ("fields", "where", "expected", "found"),
    [
        ((0, 4096, 1, 4096), 0, 1, 0),
        ((2, 4096, 1, 4096), 0, 1, 2),
        ((1, 0, 1, 4096), 4, 4096, 0),
        ((1, 2048, 1, 4096), 4, 4096, 2048),
        ((1, 65536, 1, 65536), 4, 4096, 65536),
        ((1, 4096, 1 << 63, 4096), 12, f"at most {(1 << 63) - 1}", 1 << 63),
        ((1, 4096, 1, 1 << 63), 20, f"at most {(1 << 63) - 1}", 1 << 63),
        ((1, 4096, 1, 4097), 20, "a multiple of 4096", 4097),
    ],
)
def test_bad_mapped_ram_header(
    fields: tuple[int, ...], where: int, expected: object, found: object
) -> None:
    with pytest.raises(FormatError) as refusal:
        MappedRamHeader.unpack(struct.pack(">IQQQ", *fields), at=100, block="pc.ram")
    error = refusal.value
    assert (error.offset, error.expected, error.found) == (100 + where, expected, found)
    assert error.block == "pc.ram"


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration(""),
        Configuration("x" * 256),
        Configuration("ä"),
        Configuration("none", ("foo",)),
        Configuration("none", (), 13),
        Configuration("none", (), None, b"short"),
    ],
)
def test_configuration_nobody_could_read_is_not_written(configuration: Configuration) -> None:
    with pytest.raises(StateError):
        configuration.pack()


@pytest.mark.parametrize("name", ["", "x" * 256, "a\x00b", "é"])
def test_name_nobody_could_read_is_not_written(name: str) -> None:
    with pytest.raises(StateError):
        pack_lstr(name)


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255)
CONFIGURATIONS = st.builds(
    Configuration,
    machine=NAMES,
    capabilities=st.lists(
        st.sampled_from(sorted(KNOWN_CAPABILITIES - {"x-ignore-shared"})), unique=True
    ).map(tuple),
    target_page_bits=st.sampled_from([None, 12]),
    uuid=st.none() | st.binary(min_size=16, max_size=16),
)


@given(CONFIGURATIONS)
def test_any_configuration_comes_back(configuration: Configuration) -> None:
    assert Configuration.unpack(configuration.pack()) == configuration


@given(
    st.sampled_from([1, 4]),
    NAMES,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
def test_any_section_header_comes_back(
    kind: int, idstr: str, section_id: int, instance_id: int, version_id: int
) -> None:
    header = SectionHeader(kind, section_id, idstr, instance_id, version_id)
    assert SectionHeader.unpack(header.pack()) == header


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**51 - 1))
def test_any_mapped_ram_header_comes_back(bitmap_offset: int, slot: int) -> None:
    header = MappedRamHeader(4096, bitmap_offset, slot * 4096)
    assert MappedRamHeader.unpack(header.pack()) == header
