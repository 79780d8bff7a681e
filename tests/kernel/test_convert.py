"""Images converted and back: each end judged by an independent reader of its format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from archiveentries import add_cold_entry, add_entry, flip
from commandline import uringmig
from contentsreading import collect
from elffiles import read_core, read_lime
from hypothesis import given, settings
from hypothesis import strategies as st
from imagewriter import Block, Device, build_image
from mappedguests import Ranges, edit_manifest, facts, save_guest, write_plain
from pagecache import resident_bytes
from smallguests import MIB, OPTIONS, PAGE, Memories, check_image, copy_of, left_in, make_guest

from uringmig import FormatError, ReadOptions, StateError, StorageError, convert_image, verify
from uringmig.archive.directory import Archive
from uringmig.contents.opening import open_contents
from uringmig.export.conversion import TargetFormat
from uringmig.units import GiB

READ = ReadOptions(channels=2, depth=4, block_size=64 << 10)
FORMATS: tuple[TargetFormat, ...] = ("mapped-ram", "stream", "raw", "elf", "lime")
#: As a q35 with a hole below 4 GiB has it: RAM in two pieces, a BIOS at two addresses.
RANGES: Ranges = (
    (0, 5 * MIB, "pc.ram", 0),
    (0x0FD00000, MIB, "vga.vram", 0),
    (0xFFFC0000, 128 << 10, "pc.rom", 0),
    (4 * GiB, 4 * MIB, "pc.ram", 5 * MIB),
    (5 * GiB, 64 << 10, "pc.rom", 64 << 10),
)


def memory_at(path: Path, to: str, address: int, length: int) -> bytes:
    """Bytes at a physical address of a converted file."""
    if to == "elf":
        return read_core(path).read(address, length)
    at = address
    if to == "lime":
        places = read_lime(path)
        (at,) = (place + address - a for a, place, size in places if a <= address < a + size)
    with path.open("rb") as file:
        file.seek(at)
        return file.read(length)


def assert_placed(path: Path, to: str, guest: Memories, ranges: Ranges) -> None:
    """Every range holds its block's bytes, and nothing else is in the file."""
    for start, length, block, offset in ranges:
        if block is not None:
            expected = guest[block][offset : offset + length].tobytes()
            assert memory_at(path, to, start, length) == expected, hex(start)
    named = [(start, length) for start, length, block, _ in ranges if block is not None]
    if to == "elf":
        assert [(start, size) for start, _, size in read_core(path).segments] == named
    elif to == "lime":
        assert [(start, size) for start, _, size in read_lime(path)] == named
    else:
        assert path.stat().st_size == sum(named[-1])


@pytest.mark.parametrize("to", ["raw", "elf", "lime"])
def test_memory_lies_at_its_address(tmp_path: Path, to: TargetFormat) -> None:
    """Rule: by the manifest's map, holes as holes, past 4 GiB; one block may be at two places."""
    guest = make_guest()
    image = save_guest(tmp_path / "a.mig", guest, RANGES)
    done = convert_image(image, tmp_path / "out", to=to, read=READ, write=OPTIONS)
    assert_placed(tmp_path / "out", to, guest, RANGES)
    assert (done.segments, done.derived_map, done.source_kind) == (5, False, "mapped-ram")
    assert done.allocated_bytes < 12 * MIB
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json", "out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 9),
    to=st.sampled_from(["raw", "elf", "lime"]),
    engine=st.sampled_from(["pwrite", "io_uring"]),
)
def test_any_map_is_kept_to(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    seed: int,
    to: TargetFormat,
    engine: str,
) -> None:
    """Rule: whatever pages of whatever blocks lie where, each is found there and nowhere else."""
    folder = tmp_path_factory.mktemp("c")
    guest = make_guest(seed, ram_bytes=6 * MIB)
    ranges, at = [], 0
    for _ in range(data.draw(st.integers(1, 8))):
        block = data.draw(st.sampled_from(sorted(guest)))
        pages = len(guest[block]) // PAGE
        first = data.draw(st.integers(0, pages - 1))
        count = data.draw(st.integers(1, pages - first))
        at += PAGE * data.draw(st.integers(1, 5000))  # never adjacent: nothing is joined
        ranges.append((at, count * PAGE, block, first * PAGE))
        at += count * PAGE
    image = save_guest(folder / "a", guest, ranges)
    read = ReadOptions(channels=2, depth=2, block_size=64 << 10, engine=engine)  # type: ignore[arg-type]
    convert_image(image, folder / "out", to=to, read=read, write=read.like(type(OPTIONS)))
    assert_placed(folder / "out", to, guest, ranges)


def test_adjacent_ranges_are_one_segment(tmp_path: Path) -> None:
    """Rule: as few segments as QEMU has: what goes on for the guest and in the block is joined."""
    ranges: Ranges = (
        (0, MIB, "pc.ram", 0),
        (MIB, MIB, "pc.ram", MIB),
        (2 * MIB, MIB, "pc.ram", 4 * MIB),
        (3 * MIB, PAGE, None, 0),
    )
    image = save_guest(tmp_path / "a", make_guest(), ranges)
    done = convert_image(image, tmp_path / "out.elf")
    segments = [(start, size) for start, _, size in read_core(tmp_path / "out.elf").segments]
    assert segments == [(0, 2 * MIB), (2 * MIB, MIB)]
    assert any("not in the image" in note for note in done.notes)


@pytest.mark.parametrize("first", ["mapped-ram", "stream"])
@pytest.mark.parametrize("second", ["mapped-ram", "stream"])
def test_there_and_back(tmp_path: Path, first: TargetFormat, second: TargetFormat) -> None:
    """Rule: between what QEMU loads nothing is lost: memory, devices, machine."""
    devices = (Device(), Device(idstr="cpu", section_id=3))
    guest = make_guest(3)
    image = save_guest(tmp_path / "a.mig", guest, devices=devices)
    with open_contents(image) as contents:
        tail = contents.device_state()
    convert_image(image, tmp_path / "b", to=first, read=READ, write=OPTIONS)
    convert_image(tmp_path / "b", tmp_path / "c", to=second, read=READ, write=OPTIONS)
    with open_contents(tmp_path / "c") as contents:
        assert contents.kind == ("plain" if second == "stream" else "mapped-ram")
        assert collect(contents) == copy_of(guest)
        assert contents.device_state() == tail
    if second == "mapped-ram":
        check_image(tmp_path / "c", copy_of(guest))
        assert not verify(tmp_path / "c").mismatches


def test_every_source_gives_the_same_guest(tmp_path: Path) -> None:
    """Rule: what holds the guest does not matter: the very same file is made of it."""
    guest = make_guest(ram_bytes=9 * MIB)
    image = save_guest(tmp_path / "a.mig", guest)
    sources: list[str | Path] = [image, write_plain(image, tmp_path / "a.plain")]
    with Archive.open(tmp_path / "archive", write=True) as archive:
        for add, name in ((add_entry, "hot"), (add_cold_entry, "cold")):
            entry = add(archive, name, ram_bytes=9 * MIB)
            sources += [f"{tmp_path}/archive#{name}", entry.image]
    for source in sources:
        done = convert_image(source, tmp_path / "out.mig", read=READ, write=OPTIONS)
        check_image(tmp_path / "out.mig", copy_of(guest))
        assert done.memory_bytes == sum(map(len, guest.values()))
    assert uringmig("convert", f"{tmp_path}/archive#none", tmp_path / "x.mig").code == 2


@pytest.mark.parametrize("base", [PAGE, 12345])
def test_image_at_an_offset(tmp_path: Path, base: int) -> None:
    """Rule: an image is found where it is said to begin, QEMU's ``offset=``, and only there."""
    pages = {0: b"a" * PAGE, 700: b"b" * PAGE}
    blocks = [Block(idstr="pc.ram", used_length=4 * MIB, pages=pages)]
    build_image(blocks=blocks, base=base, before=b"x" * base).write(tmp_path / "a")
    expected = bytearray(4 * MIB)
    for number, page in pages.items():
        expected[number * PAGE : (number + 1) * PAGE] = page
    convert_image(tmp_path / "a", tmp_path / "b", to="mapped-ram", offset=base)
    check_image(tmp_path / "b", {"pc.ram": bytes(expected)})
    convert_image(tmp_path / "b", tmp_path / "plain", to="stream")
    (tmp_path / "c").write_bytes(b"y" * base + (tmp_path / "plain").read_bytes())
    done = convert_image(tmp_path / "c", tmp_path / "d.elf", offset=base)
    assert done.derived_map
    assert read_core(tmp_path / "d.elf").read(0, 4 * MIB) == expected
    assert uringmig("convert", tmp_path / "c", tmp_path / "e.mig").code == 3


def test_the_name_says_what_it_is_to_be(tmp_path: Path) -> None:
    image = save_guest(tmp_path / "a.mig", make_guest(), RANGES)
    for suffix in ("elf", "core", "vmcore", "raw", "lime", "mig", "stream"):
        ended = uringmig("convert", image, tmp_path / f"out.{suffix}", "--json")
        assert ended.code == 0, ended.err
    unknown = uringmig("convert", image, tmp_path / "out.bin")
    assert unknown.code == 2
    assert ".elf" in unknown.err
    assert not (tmp_path / "out.bin").exists()


def test_former_file_and_its_manifest_are_replaced(tmp_path: Path) -> None:
    """Rule: the name has the new file, and no manifest of the file that was there."""
    image = save_guest(tmp_path / "a.mig", make_guest(), RANGES)
    former = save_guest(tmp_path / "out", make_guest(1))
    convert_image(image, former, to="elf")
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json", "out"]
    assert_placed(former, "elf", make_guest(), RANGES)


def test_it_does_not_write_over_its_source(tmp_path: Path) -> None:
    image = save_guest(tmp_path / "a.mig", make_guest(), RANGES)
    (tmp_path / "link").symlink_to(image)
    before = image.read_bytes()
    for out in (image, tmp_path / "link", Path(f"{image}.manifest.json")):
        with pytest.raises(StateError, match="is the image itself"):
            convert_image(image, out, to="raw")
    assert image.read_bytes() == before
    with Archive.open(tmp_path / "archive", write=True) as archive:
        add_entry(archive, "hot")
    with pytest.raises(StateError, match="in the archive itself"):
        convert_image(f"{tmp_path}/archive#hot", tmp_path / "archive" / "x.mig")


@pytest.mark.parametrize("to", FORMATS)
def test_rot_is_not_carried_on(tmp_path: Path, to: TargetFormat) -> None:
    """Rule: a window that is not what its manifest says ends it: exit 3, and no file."""
    image = save_guest(tmp_path / "a.mig", make_guest(), RANGES)
    with open_contents(image) as contents:
        offset = contents.reader.image.blocks[0].pages_offset  # type: ignore[attr-defined]
    pages = make_guest()["pc.ram"].reshape(-1, PAGE).any(axis=1)
    flip(str(image), offset + int(np.flatnonzero(pages)[0]) * PAGE + 9)
    ended = uringmig("convert", image, tmp_path / "out", "--to", to)
    assert ended.code == 3
    assert f"{image}" in ended.err
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json"]


def test_a_manifest_of_another_image_is_refused(tmp_path: Path) -> None:
    """Rule: an image that its manifest contradicts is not converted as if nothing were."""
    image = save_guest(tmp_path / "a.mig", make_guest(), RANGES)
    other = save_guest(tmp_path / "b.mig", make_guest(1), RANGES)
    sidecar = Path(f"{image}.manifest.json")
    Path(f"{other}.manifest.json").replace(sidecar)
    assert uringmig("convert", image, tmp_path / "out.elf").code == 3
    sidecar.unlink()
    convert_image(image, tmp_path / "out.mig")


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 9 * MIB, "pc.ram", PAGE)],
        [(0, MIB, "no.such", 0)],
        [(0, MIB, "pc.ram", 0), (PAGE, MIB, "pc.ram", 0)],
        [(1 << 52, MIB, "pc.ram", 0)],
        [(number * 10 * MIB, 9 * MIB, "pc.ram", 0) for number in range(20)],
        [(0, 100, "pc.ram", 0)],
        [],
    ],
    ids=["past its block", "no block", "overlap", "address", "aliases", "part of a page", "empty"],
)
def test_a_map_that_lies_is_refused(tmp_path: Path, ranges: Ranges) -> None:
    """Rule: a map that does not fit its image is exit 3 before a byte is written."""
    image = save_guest(tmp_path / "a.mig", make_guest(), ranges)
    for to in ("raw", "elf", "lime"):
        ended = uringmig("convert", image, tmp_path / "out", "--to", to)
        assert ended.code == 3, ended.err
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json"]


def test_lime_says_that_it_cannot_be_direct(tmp_path: Path) -> None:
    """Rule: no silent fallback: where O_DIRECT is required and cannot be had, it fails."""
    image = save_guest(tmp_path / "a.mig", make_guest(), RANGES)
    ended = uringmig("convert", image, tmp_path / "out.lime", "--direct", "required")
    assert ended.code == 5
    assert "LiME" in ended.err
    for to in ("raw", "elf", "stream", "mapped-ram"):
        again = uringmig("convert", image, tmp_path / "out", "--to", to, "--direct", "required")
        assert again.code == 0, again.err
        assert resident_bytes(tmp_path / "out") < MIB


def test_unknown_machine_has_no_map(tmp_path: Path) -> None:
    """Rule: where nothing says where memory lies, nothing is guessed."""
    image = save_guest(tmp_path / "a.mig", make_guest())
    with pytest.raises(FormatError, match="no map of the guest's memory"):
        convert_image(image, tmp_path / "out.elf")
    edit_manifest(image, guest=facts(RANGES) | {"memory_map": None}, version=2)
    with pytest.raises(FormatError, match="no map of the guest's memory"):
        convert_image(image, tmp_path / "out.elf")
    with pytest.raises(StorageError):
        convert_image(tmp_path / "none", tmp_path / "out.elf")
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json"]


def test_save_images_of_libvirt(tmp_path: Path) -> None:
    """Rule: a save image of libvirt's is a source in both its forms; its XML is not taken over."""
    pages = {0: b"a" * PAGE, 700: b"b" * PAGE}
    blocks = [Block(idstr="pc.ram", used_length=4 * MIB, pages=pages)]

    def header(form: int) -> bytes:
        fields = struct.pack("<5I", 2, 200, 1, form, 0)
        return (b"LibvirtQemudSave" + fields + bytes(56) + b"<domain/>\0").ljust(292, b"\0")

    build_image(blocks=blocks, base=292, before=header(6)).write(tmp_path / "sparse")
    convert_image(tmp_path / "sparse", tmp_path / "plain", to="stream")
    (tmp_path / "raw").write_bytes(header(0) + (tmp_path / "plain").read_bytes())
    for source in ("sparse", "raw"):
        done = convert_image(tmp_path / source, tmp_path / "out.elf")
        assert (done.source_kind, done.derived_map) == ("libvirt", True)
        assert any("XML" in note for note in done.notes)
        core = read_core(tmp_path / "out.elf")
        assert core.read(0, PAGE) == pages[0]
        assert core.read(700 * PAGE, PAGE) == pages[700]
        assert not any(core.read(PAGE, 699 * PAGE))
