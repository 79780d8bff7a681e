"""The map of a guest's memory out of QEMU's own words: all of it, or none.

The texts in mtree/ are what QEMU 10.0.2 printed for each machine; q35big has 6 GiB and two VGA
adapters, pcbig 5 GiB, q35dimm a DIMM and virtio-mem.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError
from uringmig.format.mtree import MappedRange, parse_mtree
from uringmig.units import GiB, MiB

TEXTS = Path(__file__).parent / "mtree"
SAMPLE = (TEXTS / "q35big.txt").read_text()
RAM = "  0000000000000000-000000000009ffff (prio 0, ram): pc.ram"


def view(*lines: str, name: str = "memory") -> str:
    """A text with one view, which has these lines."""
    head = ["FlatView #0", f' AS "{name}", root: system', ' AS "cpu-memory-0", root: system']
    return "\n".join([*head, " Root memory region: system", *lines, "", ""])


def test_six_gib_lie_below_and_above_four() -> None:
    ranges = parse_mtree(SAMPLE)
    assert ranges[0] == MappedRange(0, 0xA0000, "pc.ram", 0, read_only=False)
    assert ranges[1] == MappedRange(0xC0000, 0xB000, "pc.ram", 0xC0000, read_only=True)
    assert ranges[-1] == MappedRange(4 * GiB, 4 * GiB, "pc.ram", 2 * GiB, read_only=False)
    assert [one.region for one in ranges[-4:-1]] == ["vga.vram", "vga.vram", "pc.bios"]
    assert {one.read_only for one in ranges if one.region == "pc.bios"} == {True}


@pytest.mark.parametrize(
    ("name", "bytes_mapped", "above"),
    [
        ("q35", 256 * MiB, None),
        ("pc", 256 * MiB, None),
        ("pcbig", 5 * GiB, ("pc.ram", 2 * GiB, 3 * GiB)),
        ("q35dimm", 512 * MiB, ("m1", 128 * MiB, 0)),
        ("microvm", 256 * MiB, None),
    ],
)
def test_ram_of_each_machine(
    name: str, bytes_mapped: int, above: tuple[str, int, int] | None
) -> None:
    """All of the guest's RAM is mapped, but for what the VGA window hides at 640 KiB."""
    ranges = parse_mtree((TEXTS / f"{name}.txt").read_text())
    ram = [one for one in ranges if one.region in ("pc.ram", "microvm.ram")]
    hidden = bytes_mapped - sum(one.length for one in ram)
    assert 0 <= hidden <= 128 << 10
    assert all(one.offset in (one.start, one.start - GiB) for one in ram)
    high = [one for one in ranges if one.start >= 4 * GiB][:1]
    assert [(one.region, one.length, one.offset) for one in high] == ([above] if above else [])


def test_line_ends_and_marks_of_kvm_are_not_part_of_a_name() -> None:
    plain = parse_mtree(view(RAM, f"{RAM[:2]}00000000000a0000-00000000000bffff (prio 1, i/o): vga"))
    text = view(f"{RAM} KVM", "  00000000000a0000-00000000000bffff (prio 1, i/o): vga lowmem")
    assert parse_mtree(text.replace("\n", "\r\n")) == plain
    offset = (
        "  0000000000100000-00000000001fffff (prio -1, nv-ram): nv dimm @0000000000001000 KVM KVM"
    )
    assert parse_mtree(view(RAM, offset))[1] == MappedRange(
        MiB, MiB, "nv dimm", 0x1000, read_only=False
    )


def test_other_views_are_not_looked_at() -> None:
    assert parse_mtree(view("what is this", name="I/O") + view(RAM)) == parse_mtree(view(RAM))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "  No rendered FlatView",
        "  0000000000000000-000000000009ffff (prio 0, ram) pc.ram",
        "  0000000000000000-000000000009ffff (prio 0, newkind): pc.ram",
        "  00000000000a0000-000000000009ffff (prio 0, ram): pc.ram",
        "  0000000000000000-ffffffffffffffff (prio 0, ram): pc.ram",
        "  0000000000000000-0000000000000fff (prio 0, ram): pc.ram @fffffffffffffff0",
        "  0000000000000000-0000000000000fff (prio 0, ram): ",
        "  0000000000000000-0000000000000fff (prio 0, ram): " + "KVM " * 1_000_000 + "x",
        f"{RAM}\n{RAM}",
        f"{RAM}\n junk",
    ],
)
def test_a_view_with_a_line_that_is_not_understood_is_refused_whole(line: str) -> None:
    with pytest.raises(FormatError, match="info mtree"):
        parse_mtree(view(line))


def test_no_view_of_the_memory_and_two_are_refused() -> None:
    for text in ("", "unknown command: 'info mtree'\r\n", view(RAM, name="I/O"), view(RAM) * 2):
        with pytest.raises(FormatError, match="views of the guest's memory"):
            parse_mtree(text)


@given(st.text(alphabet='\n\r -:(),@"0123456789abcdfFlatView#ASrtom', max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(FormatError):
        parse_mtree(text)


@given(st.integers(0, len(SAMPLE)), st.text(max_size=6), st.integers(0, 40))
def test_a_changed_text_is_refused_or_a_map_in_order(at: int, patch: str, dropped: int) -> None:
    """Whatever is cut out or put in, what comes of it is in order and within bounds."""
    try:
        ranges = parse_mtree(SAMPLE[:at] + patch + SAMPLE[at + dropped :])
    except FormatError:
        return
    end = 0
    for one in ranges:
        assert one.start >= end
        assert one.length > 0
        assert one.offset >= 0
        end = one.start + one.length
    assert end <= 1 << 63


@st.composite
def maps(draw: st.DrawFn) -> list[MappedRange]:
    """Ranges of memory as a machine may have them."""
    ranges, at = [], 0
    for _ in range(draw(st.integers(1, 12))):
        start = at + draw(st.integers(0, 1 << 40))
        length = draw(st.integers(1, 1 << 40))
        name = draw(st.sampled_from(["pc.ram", "/objects/mem0", "vga.vram", "a b"]))
        offset = draw(st.just(0) | st.integers(0, 1 << 40))
        ranges.append(MappedRange(start, length, name, offset, draw(st.booleans())))
        at = start + length
    return ranges


@given(maps())
def test_every_map_is_read_back_from_the_words_that_qemu_has_for_it(
    ranges: list[MappedRange],
) -> None:
    lines = [
        f"  {one.start:016x}-{one.start + one.length - 1:016x} "
        f"(prio 0, {'rom' if one.read_only else 'ram'}): {one.region}"
        + (f" @{one.offset:016x}" if one.offset else "")
        for one in ranges
    ]
    assert parse_mtree(view(*lines)) == tuple(ranges)
