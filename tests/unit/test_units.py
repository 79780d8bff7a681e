"""Sizes: rounding says its way, and text is read as it is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import StateError
from uringmig.units import (
    GiB,
    KiB,
    MiB,
    TiB,
    align_down,
    align_up,
    div_ceil,
    format_duration,
    format_size,
    is_aligned,
    parse_duration,
    parse_size,
)


def test_names_are_powers_of_1024() -> None:
    assert (KiB, MiB, GiB, TiB) == (1024, 1024**2, 1024**3, 1024**4)


@given(st.integers(0, 1 << 62), st.integers(1, 1 << 40))
def test_rounding_brackets_the_value(value: int, step: int) -> None:
    down, up = align_down(value, step), align_up(value, step)
    assert down <= value <= up
    assert down % step == up % step == 0
    assert up - down == (0 if value % step == 0 else step)
    assert is_aligned(value, step) == (down == value)
    assert div_ceil(value, step) == up // step


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512K", 512 * KiB),
        ("512k", 512 * KiB),
        ("1MiB", MiB),
        ("1MB", MiB),
        ("1.5G", 3 * GiB // 2),
        ("2 GiB", 2 * GiB),
        (" 7 ", 7),
        ("3T", 3 * TiB),
        ("10B", 10),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1e3", "1.5", "0.3K", "1P", "1 2", "0x10", "1KK", "9" * 400, "9" * 5000]
)
def test_what_is_no_size_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(StateError, match=r"size|whole") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KiB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * MiB, "5.0 MiB"),
        (GiB, "1.0 GiB"),
        (3 * TiB, "3.0 TiB"),
        (-2 * MiB, "-2.0 MiB"),
        (0.5, "0 B"),
    ],
)
def test_size_is_written_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 66))
def test_plain_number_is_read_back(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), (" 2d ", 172800)],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "m", "-1s", "1 h", "1h-30m", "1e3s", "infs", "1w"])
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(StateError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (60, "1m00s"), (185, "3m05s"), (3599.6, "1h00m"),
     (7620, "2h07m")],
)  # fmt: skip
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
