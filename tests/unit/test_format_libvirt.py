"""Libvirt's save header, written here byte by byte from its description."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError
from uringmig.format.libvirt import DATA_BYTES_MAX, LibvirtHeader

MAGIC = b"LibvirtQemudSave"


def header(
    *,
    magic: bytes = MAGIC,
    version: int = 2,
    data_length: int = 70_000,
    was_running: int = 1,
    form: int = 0,
    cookie: int = 0,
    order: str = "<",
) -> bytes:
    return (
        magic
        + struct.pack(f"{order}5I", version, data_length, was_running, form, cookie)
        + bytes(56)
    )


def test_the_header_has_92_bytes() -> None:
    assert len(header()) == LibvirtHeader.STRUCT.size == LibvirtHeader.SWAPPED.size == 92


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", [0, 6])
def test_reads_both_byte_orders(order: str, form: int) -> None:
    found = LibvirtHeader.unpack(header(order=order, form=form, cookie=400, was_running=0))
    assert found == LibvirtHeader(2, 70_000, False, form, 400)
    assert found.stream_offset == 92 + 70_000
    assert found.sparse == (form == 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": b"LibvirtQemudPart"}, "never completed"),
        ({"magic": b"LibvirtQemudSavf"}, "not a libvirt save image"),
        ({"version": 0}, "version"),
        ({"version": 3}, "version"),
        ({"version": 0x7FFFFFFF}, "version"),
        ({"data_length": DATA_BYTES_MAX + 1}, "length of libvirt's XML"),
        ({"was_running": 2}, "was-running"),
        ({"form": 5}, "format zstd"),
        ({"form": 1}, "format gzip"),
        ({"form": 7}, "format unknown"),
        ({"cookie": 70_001}, "cookie"),
    ],
)
def test_refuses_with_one_line(fields: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        LibvirtHeader.unpack(header(**fields))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_header_or_refused(data: bytes) -> None:
    for candidate in (data, MAGIC + data, (MAGIC + data)[:92].ljust(92, b"\0")):
        try:
            found = LibvirtHeader.unpack(candidate)
        except FormatError:
            continue
        assert 92 <= found.stream_offset <= 92 + DATA_BYTES_MAX
