"""Differences of images: those that were made, all of them, and no others."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from archiveentries import add_cold_entry, add_entry, flip
from commandline import uringmig
from hypothesis import given, settings
from hypothesis import strategies as st
from imagewriter import Device, trailer
from smallguests import MIB, OPTIONS, PAGE, Memories, make_guest, ramblocks_of

from uringmig import DeviceState, MappedRamWriter, ReadOptions, diff_images
from uringmig.archive.directory import Archive
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.streaming import plain_pieces
from uringmig.export import difference


def save(path: Path, guest: Memories, *devices: Device, manifest: bool = True) -> Path:
    with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish(DeviceState(trailer(devices=devices)))
    if not manifest:
        Path(f"{path}.manifest.json").unlink()
    return path


def as_plain(image: Path) -> Path:
    """The same guest as a plain stream."""
    plain = image.with_suffix(".plain")
    with MappedRamContents(image) as contents, plain.open("wb") as file:
        for piece in plain_pieces(contents):
            file.write(piece)
    return plain


@settings(max_examples=25, deadline=None)
@given(
    pages=st.dictionaries(
        st.integers(0, 9 * MIB // PAGE - 1),
        st.sampled_from(["set", "clear", "change"]),
        max_size=12,
    ),
    digests=st.booleans(),
)
def test_it_finds_what_was_changed_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, pages: dict[int, str], digests: bool
) -> None:
    """Rule: ranges are exactly the pages that differ, with or without digests to go by."""
    folder = tmp_path_factory.mktemp("diff")
    one, other = make_guest(), make_guest()
    expected: dict[str, set[int]] = {kind: set() for kind in difference.KINDS}
    for page, change in pages.items():
        at = slice(page * PAGE, (page + 1) * PAGE)
        before = one["pc.ram"][at].copy()
        if change == "clear":
            other["pc.ram"][at] = 0
        elif change == "set":
            other["pc.ram"][at] = 7
        else:
            other["pc.ram"][at][-1] ^= 1
        after = other["pc.ram"][at]
        if not np.array_equal(before, after):
            kind = "differs" if before.any() and after.any() else "only-b"
            expected[kind if after.any() else "only-a"].add(page)
    a = save(folder / "a", one, manifest=digests)
    b = save(folder / "b", other, manifest=digests)
    report = diff_images(a, b)
    found: dict[str, set[int]] = {kind: set() for kind in difference.KINDS}
    ram, *rest = report.blocks
    for item in ram.ranges:
        found[item.kind] |= set(range(item.start // PAGE, (item.start + item.length) // PAGE))
    assert found == expected
    assert ram.differing_bytes == PAGE * len(expected["differs"])
    assert all(block.equal for block in rest)
    assert report.equal == (not any(expected.values()))
    total = sum(len(memory) for memory in one.values())
    assert report.read_bytes + report.digest_bytes == total
    assert (report.digest_bytes > 0) == digests


def test_every_kind_of_file_is_compared_with_every_other(tmp_path: Path) -> None:
    """Rule: what holds the guest does not matter; only what it holds does."""
    image = save(tmp_path / "a.mig", make_guest(), manifest=False)
    names: list[str | Path] = [image, as_plain(image)]
    with Archive.open(tmp_path / "archive", write=True) as archive:
        add_entry(archive, "hot", ram_bytes=9 * MIB)
        cold = add_cold_entry(archive, "cold", ram_bytes=9 * MIB)
    names += [f"{tmp_path}/archive#hot", f"{tmp_path}/archive#cold", cold.image]
    for one in names:
        for other in names:
            report = diff_images(one, other)
            assert all(block.equal for block in report.blocks), (one, other)


def test_blocks_of_other_names_and_lengths(tmp_path: Path) -> None:
    """Rule: a block or a part of one that the other has not is a difference, its pages too."""
    one, other = make_guest(), make_guest(ram_bytes=5 * MIB)
    other["pc.ram"][:] = one["pc.ram"][: 5 * MIB]
    other["pc.rom"][:] = one["pc.rom"]
    del other["vga.vram"]
    report = diff_images(save(tmp_path / "a", one), save(tmp_path / "b", other))
    ram, vga, rom = report.blocks
    assert (ram.length_a, ram.length_b) == (9 * MIB, 5 * MIB)
    rest = one["pc.ram"][5 * MIB :].reshape(-1, PAGE).any(axis=1).sum()
    assert (ram.differing_bytes, ram.only_a_bytes, ram.only_b_bytes) == (0, rest * PAGE, 0)
    assert (vga.length_b, vga.equal, rom.equal) == (None, False, True)
    assert vga.only_a_bytes == PAGE * one["vga.vram"].reshape(-1, PAGE).any(axis=1).sum()


def test_sections_differ_by_name_whatever_their_number(tmp_path: Path) -> None:
    """Rule: devices are compared by name, instance, version and body, not by their place."""
    timer, cpu = Device(section_id=2), Device(idstr="cpu", section_id=3)
    a = save(tmp_path / "a", make_guest(), timer, cpu, Device(idstr="gone", section_id=4))
    b = save(
        tmp_path / "b",
        make_guest(),
        Device(idstr="cpu", section_id=7),
        Device(section_id=8, body=b"\x12" * 24),
    )
    report = diff_images(a, b)
    assert [(one.idstr, one.kind) for one in report.sections] == [
        ("timer", "differs"),
        ("gone", "only-a"),
    ]
    assert not report.equal


def test_the_command_says_so_and_exits_as_diff_does(tmp_path: Path) -> None:
    guest = make_guest()
    a = save(tmp_path / "a", guest)
    guest["pc.ram"][3 * PAGE : 5 * PAGE] = 9
    b = save(tmp_path / "b", guest)
    assert uringmig("diff", a, a).code == 0
    differing = uringmig("diff", a, b, "--json")
    assert differing.code == 1
    said = differing.result()
    assert (said["exit_code"], said["equal"]) == (1, False)
    assert said["blocks"][0]["ranges"][0]["start"] == 3 * PAGE
    text = uringmig("diff", a, b).out
    assert "pc.ram" in text
    assert "0x3000" in text
    assert uringmig("diff", a, tmp_path / "none").code == 5


def test_ranges_are_kept_up_to_a_bound_and_all_are_counted(tmp_path: Path) -> None:
    """Rule: no guest makes the report larger than its bound, and what is left out is told."""
    one = make_guest(ram_bytes=96 * MIB)
    one["pc.ram"][:] = 0
    a = save(tmp_path / "a", one)
    one["pc.ram"][:: 2 * PAGE] = 1
    report = diff_images(a, save(tmp_path / "b", one))
    count = 96 * MIB // PAGE // 2
    (ram,) = (block for block in report.blocks if not block.equal)
    assert len(ram.ranges) == difference.RANGES_MAX
    assert ram.ranges_left_out == count - difference.RANGES_MAX
    assert ram.only_b_bytes == count * PAGE


@pytest.mark.parametrize("which", [0, 1])
def test_rot_is_not_taken_for_a_difference(tmp_path: Path, which: int) -> None:
    """Rule: a window that is read is compared with its digest first; damage exits 3, named."""
    guest = make_guest()
    paths = [save(tmp_path / "a", guest)]
    guest["pc.ram"][0] ^= 1
    paths.append(save(tmp_path / "b", guest))
    with MappedRamContents(paths[which]) as contents:
        offset = contents.reader.image.blocks[0].pages_offset
    flip(str(paths[which]), offset + 100)
    ended = uringmig("diff", *paths)
    assert ended.code == 3
    assert f"{paths[which]}: " in ended.err


def test_how_it_is_read_makes_no_difference(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", make_guest(1)), save(tmp_path / "b", make_guest(2))
    reports = [
        diff_images(a, b, options=ReadOptions(engine="pwrite", direct="off", channels=1)),
        diff_images(a, b, options=ReadOptions(engine="io_uring", direct="required", channels=3)),
    ]
    assert reports[0].blocks == reports[1].blocks


def test_density_says_where(tmp_path: Path) -> None:
    """Rule: each part of a block has the number of pages that differ there."""
    one = make_guest(ram_bytes=33 * MIB)
    a = save(tmp_path / "a", one)
    changed = [0, 1, 700, 4000, 33 * MIB // PAGE - 1]
    for page in changed:
        one["pc.ram"][page * PAGE] ^= 1
    ram, *rest = diff_images(a, save(tmp_path / "b", one)).blocks
    count = 33 * MIB // PAGE
    assert len(ram.density) == difference.DENSITY_PARTS
    assert {part: pages for part, pages in enumerate(ram.density) if pages} == {
        part: len(list(pages))
        for part, pages in itertools.groupby(
            page * difference.DENSITY_PARTS // count for page in changed
        )
    }
    assert all(block.density == () for block in rest)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture(tmp_path: Path, suffix: str) -> None:
    """Rule: a picture is there as a whole, or there is a line that says why it is not."""
    a, b = save(tmp_path / "a", make_guest(1)), save(tmp_path / "b", make_guest(2))
    out = tmp_path / f"out.{suffix}"
    assert uringmig("diff", a, b, "--plot", out).code == 1
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert out.read_bytes().startswith(magic[suffix])
    assert uringmig("diff", a, a, "--plot", out).code == 0
    refused = uringmig("diff", a, b, "--plot", tmp_path / "out.txt")
    assert refused.code == 2
    assert ".png" in refused.err
