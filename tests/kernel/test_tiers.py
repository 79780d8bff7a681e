"""Both tiers on a real disk: there and back again, each end judged by the independent reader."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from coldreader import read_cold
from pagecache import resident_bytes
from smallguests import (
    MIB,
    OPTIONS,
    PWRITE,
    RING,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import MappedRamWriter, MismatchError, StateError, verify
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.copied import EntryLabel, TierResult
from uringmig.archive.hot import write_hot
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.plainfile import PlainFileContents
from uringmig.contents.streaming import plain_pieces
from uringmig.image.manifest import ArchiveFields, ColdManifest, decode, decode_cold
from uringmig.storage.enginechoice import EngineChoice

ENGINES = pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)


def save(path: Path, seed: int = 0, *, ram_bytes: int = 21 * MIB) -> dict[str, bytes]:
    """An image by our writer, and what is in it."""
    guest = make_guest(seed, ram_bytes=ram_bytes)
    with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    return copy_of(guest)


def archive_fields(result: TierResult) -> ArchiveFields:
    """What makes a result's image an entry."""
    fields = result.manifest.archive
    assert isinstance(fields, ArchiveFields)
    return fields


@ENGINES
def test_hot_is_the_very_file_that_the_writer_makes(tmp_path: Path, engine: EngineChoice) -> None:
    guest = save(tmp_path / "a.mig")
    with MappedRamContents(tmp_path / "a.mig") as contents:
        result = write_hot(contents, tmp_path / "b.mig", options=OPTIONS, engine=engine)
    check_image(tmp_path / "b.mig", guest)
    assert (tmp_path / "a.mig").read_bytes() == (tmp_path / "b.mig").read_bytes()
    assert not verify(tmp_path / "b.mig").mismatches
    described = decode((tmp_path / "b.mig.manifest.json").read_bytes())
    assert described == result.manifest
    assert described.blocks == decode((tmp_path / "a.mig.manifest.json").read_bytes()).blocks
    assert result.stored_bytes == 4096 * sum(block.pages_set for block in described.blocks)
    assert (result.resumed_bytes, result.shared_bytes) == (0, 0)


@ENGINES
def test_cold_and_back(tmp_path: Path, engine: EngineChoice) -> None:
    guest = save(tmp_path / "a.mig")
    label = EntryLabel(name="a-1", vm="a", host="here", source_kind="qmp", source_path="/run/a")
    with MappedRamContents(tmp_path / "a.mig") as contents:
        cold = write_cold(
            contents, tmp_path / "a.cold", options=OPTIONS, label=label, engine=engine
        )
        hot = write_hot(contents, tmp_path / "b.mig", options=OPTIONS, engine=engine)
    with open_cold(tmp_path / "a.cold") as contents:
        assert contents.kind == "cold"
        assert contents.stored_bytes() == cold.stored_bytes
        back = write_hot(contents, tmp_path / "back.mig", options=OPTIONS, engine=engine)
    check_image(tmp_path / "back.mig", guest)
    assert (tmp_path / "back.mig").read_bytes() == (tmp_path / "a.mig").read_bytes()
    described = decode_cold((tmp_path / "a.cold.manifest.json").read_bytes())
    assert described == cold.manifest
    assert described.file_size == (tmp_path / "a.cold").stat().st_size
    fields = described.archive
    assert (fields.name, fields.vm, fields.host, fields.tier) == ("a-1", "a", "here", "cold")
    assert (fields.source_kind, fields.source_path) == ("qmp", "/run/a")
    for result in (hot, back):
        assert archive_fields(result).content_digest == fields.content_digest


def test_zeros_cost_nothing_in_a_cold_image(tmp_path: Path) -> None:
    guest = make_guest(ram_bytes=64 * MIB)
    guest["pc.ram"][5 * MIB :] = 0
    with MappedRamWriter(tmp_path / "a.mig", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    with MappedRamContents(tmp_path / "a.mig") as contents:
        result = write_cold(contents, tmp_path / "a.cold", options=OPTIONS)
    assert isinstance(result.manifest, ColdManifest)
    assert result.manifest.frames == 4  # two windows of RAM, video memory and ROM
    assert result.file_bytes < result.stored_bytes + MIB // 8


@pytest.mark.parametrize("level", [1, 3, 22])
def test_level(tmp_path: Path, level: int) -> None:
    guest = save(tmp_path / "a.mig", ram_bytes=5 * MIB)
    with MappedRamContents(tmp_path / "a.mig") as contents:
        write_cold(contents, tmp_path / "a.cold", level=level, workers=3, options=OPTIONS)
    with open_cold(tmp_path / "a.cold") as contents:
        assert contents.header.level == level
        write_hot(contents, tmp_path / "b.mig", options=OPTIONS)
    check_image(tmp_path / "b.mig", guest)


@pytest.mark.parametrize("level", [0, 23])
def test_level_out_of_range(tmp_path: Path, level: int) -> None:
    save(tmp_path / "a.mig", ram_bytes=MIB)
    with (
        MappedRamContents(tmp_path / "a.mig") as contents,
        pytest.raises(StateError, match="from 1 to 22"),
    ):
        write_cold(contents, tmp_path / "a.cold", level=level)
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json"]


def test_flipped_frame_is_named_by_its_place(tmp_path: Path) -> None:
    save(tmp_path / "a.mig")
    with MappedRamContents(tmp_path / "a.mig") as contents:
        write_cold(contents, tmp_path / "a.cold", options=OPTIONS)
    with open_cold(tmp_path / "a.cold") as contents:
        frames = contents.index.frames
        number = 3
        row, offset = int(frames.row[number]), int(frames.offset[number])
    with (tmp_path / "a.cold").open("r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)[0]
        file.seek(offset + 100)
        file.write(bytes([byte ^ 1]))
    with open_cold(tmp_path / "a.cold") as contents:
        with pytest.raises(MismatchError, match=rf"'pc.ram'.*chunk {row} ") as caught:
            write_hot(contents, tmp_path / "b.mig", options=OPTIONS)
        assert caught.value.offset == offset
    assert left_in(tmp_path) == [
        "a.cold",
        "a.cold.manifest.json",
        "a.mig",
        "a.mig.manifest.json",
    ]


def test_source_that_changes_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.mig")
    with MappedRamContents(tmp_path / "a.mig") as contents:
        with (tmp_path / "a.mig").open("r+b") as file:
            file.seek(2 * MIB)
            file.write(b"changed")
        with pytest.raises(MismatchError, match="changed while it was read"):
            write_hot(contents, tmp_path / "b.mig", options=OPTIONS, resume=tmp_path / "journal")
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json"]


def test_errno_of_a_missing_folder(tmp_path: Path) -> None:
    save(tmp_path / "a.mig", ram_bytes=MIB)
    with MappedRamContents(tmp_path / "a.mig") as contents:
        with pytest.raises(Exception, match="missing") as caught:
            write_hot(contents, tmp_path / "missing" / "b.mig", options=OPTIONS)
        assert getattr(caught.value, "errno", None) == errno.ENOENT


def test_page_cache_stays_clean(tmp_path: Path) -> None:
    """Neither end of a copy is in the page cache afterwards, nor what a checkpoint needed."""
    guest = save(tmp_path / "a.mig", ram_bytes=64 * MIB)
    copies = [("a.mig", "b.mig"), ("b.mig", "b.cold"), ("b.cold", "c.mig")]
    for source, out in copies:
        contents = (open_cold if source.endswith("cold") else MappedRamContents)(tmp_path / source)
        write = write_cold if out.endswith("cold") else write_hot
        with contents:
            write(contents, tmp_path / out, options=OPTIONS, resume=tmp_path / "journal")
    for name in {name for copy in copies for name in copy}:
        assert resident_bytes(tmp_path / name) < MIB // 2, name
    check_image(tmp_path / "c.mig", guest)


def test_hot_cold_stream_and_back(tmp_path: Path) -> None:
    """Through every form there is: equal memory, device state and digest of the whole guest."""
    guest = save(tmp_path / "a.mig")
    with MappedRamContents(tmp_path / "a.mig") as contents:
        tail = contents.device_state().tail
        first = write_cold(contents, tmp_path / "a.cold", options=OPTIONS)
    assert read_cold(tmp_path / "a.cold").contents == guest
    with open_cold(tmp_path / "a.cold") as contents, (tmp_path / "a.stream").open("wb") as file:
        for piece in plain_pieces(contents):
            file.write(piece)
    with PlainFileContents(tmp_path / "a.stream") as contents:
        hot = write_hot(contents, tmp_path / "b.mig", options=OPTIONS)
        cold = write_cold(contents, tmp_path / "b.cold", options=OPTIONS)
    assert check_image(tmp_path / "b.mig", guest).tail == tail
    image = read_cold(tmp_path / "b.cold")
    assert (image.contents, image.tail) == (guest, tail)
    digests = [archive_fields(result).content_digest for result in (first, hot, cold)]
    assert len(set(digests)) == 1


def test_copies_leave_nothing_open(tmp_path: Path) -> None:
    save(tmp_path / "a.mig", ram_bytes=5 * MIB)

    def copies() -> None:
        with MappedRamContents(tmp_path / "a.mig") as contents:
            write_cold(contents, tmp_path / "a.cold", options=OPTIONS, resume=tmp_path / "j")
        with open_cold(tmp_path / "a.cold") as contents:
            write_hot(contents, tmp_path / "b.mig", options=OPTIONS, resume=tmp_path / "j")

    copies()
    descriptors, threads = len(left_in(Path("/proc/self/fd"))), threading.active_count()
    for _ in range(5):
        copies()
    assert len(left_in(Path("/proc/self/fd"))) == descriptors
    assert threading.active_count() == threads
