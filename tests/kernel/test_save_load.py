"""Whole saves and loads on a real file system, judged by a reader that shares no code."""

from __future__ import annotations

import json
import mmap
import os
from contextlib import closing
from pathlib import Path

import imagewriter
import numpy as np
import pytest
import xxhash
from imagereader import read_image
from smallguests import (
    MIB,
    OPTIONS,
    PAGE,
    PWRITE,
    RING,
    Memories,
    aligned,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import (
    Configuration,
    DeviceState,
    FileMemory,
    FormatError,
    MappedRamReader,
    MappedRamWriter,
    RamBlock,
    ReadOptions,
    SaveResult,
    Snapshot,
    StateError,
    WriteOptions,
    verify,
)
from uringmig.memory.mapping import create_memfd
from uringmig.storage.enginechoice import EngineChoice
from uringmig.testing.faults import RequestLog, recorded

ENGINES = pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)


def save(
    path: Path,
    guest: Memories,
    *,
    engine: EngineChoice = PWRITE,
    options: WriteOptions = OPTIONS,
    state: DeviceState | None = None,
) -> SaveResult:
    with MappedRamWriter(path, ramblocks_of(guest), options=options, engine=engine) as writer:
        writer.write_all()
        return writer.finish(state)


def test_array_goes_through_pwrite_into_a_file_the_oracle_accepts(tmp_path: Path) -> None:
    memory = np.random.default_rng(1).integers(0, 256, 2 * MIB, dtype=np.uint8)
    memory[PAGE : 5 * PAGE] = 0
    with MappedRamWriter(
        tmp_path / "vm.mig",
        [RamBlock("ram", memory, dense=False)],
        options=WriteOptions(channels=1, engine="pwrite", direct="off"),
    ) as writer:
        writer.write_all()
        result = writer.finish()
    image = check_image(tmp_path / "vm.mig", {"ram": memory.tobytes()})
    assert image.machine == "none"
    assert image.blocks[0].bits == (0, *range(5, 512))
    assert (result.pages_set, result.engine, result.direct) == (508, "pwrite", False)
    assert left_in(tmp_path) == ["vm.mig", "vm.mig.manifest.json"]


@ENGINES
@pytest.mark.parametrize("direct", ["required", "off"])
@pytest.mark.parametrize("channels", [1, 3])
def test_guest_is_saved_and_read_back(
    tmp_path: Path, engine: EngineChoice, direct: str, channels: int
) -> None:
    guest = make_guest()
    options = WriteOptions(
        channels=channels, depth=4, block_size=64 << 10, direct=direct, dense_up_to=256 << 10  # type: ignore[arg-type]
    )  # fmt: skip
    result = save(tmp_path / "vm", guest, engine=engine, options=options)
    image = check_image(tmp_path / "vm", copy_of(guest))
    ram, vram, rom = image.blocks
    for block in (ram, vram):
        pages = guest[block.idstr].reshape(-1, PAGE)
        assert block.bits == tuple(np.flatnonzero(pages.any(axis=1)).tolist())
    assert len(rom.bits) == 32, "a small block is dense"
    assert result.pages_set == sum(len(block.bits) for block in image.blocks)
    assert result.direct == (direct == "required")
    assert not result.bounced
    assert result.file_size == (tmp_path / "vm").stat().st_size
    assert result.memory_bytes == sum(memory.size for memory in guest.values())
    assert not verify(tmp_path / "vm", engine=engine).mismatches
    with MappedRamReader(
        tmp_path / "vm", engine=engine, options=ReadOptions(direct=direct)  # type: ignore[arg-type]
    ) as reader:  # fmt: skip
        for idstr, memory in guest.items():
            loaded = aligned(memory.size)
            loaded[:] = 0xEE
            reader.read_into(idstr, loaded)
            assert np.array_equal(loaded, memory), idstr


@ENGINES
def test_unaligned_memory_is_bounced_for_direct_io(tmp_path: Path, engine: EngineChoice) -> None:
    """Both ways, and the result says so."""
    source = np.random.default_rng(2).integers(0, 256, 5 * MIB + 16, dtype=np.uint8)
    start = 16 - source.ctypes.data % 16 + 1
    memory = source[start : start + 4 * MIB + 64 * PAGE]
    options = WriteOptions(direct="required", depth=3, block_size=128 << 10)
    result = save(tmp_path / "vm", {"ram": memory}, engine=engine, options=options)
    assert result.bounced
    check_image(tmp_path / "vm", {"ram": memory.tobytes()})
    target = np.zeros(5 * MIB, np.uint8)[3 : 3 + memory.size]
    with MappedRamReader(
        tmp_path / "vm", engine=engine, options=ReadOptions(direct="required")
    ) as reader:
        reader.read_into("ram", target)
    assert np.array_equal(target, memory)


def test_range_is_read_and_nothing_beyond_it_is_touched(tmp_path: Path) -> None:
    guest = make_guest()
    save(tmp_path / "vm", guest)
    pages = guest["pc.ram"].size // PAGE
    with MappedRamReader(tmp_path / "vm") as reader:
        for first, count in [(0, 1), (1, 1), (pages - 1, 1), (1000, 100), (1023, 2), (5, 0)]:
            around = aligned((count + 2) * PAGE)
            around[:] = 0xEE
            inside = around[PAGE:-PAGE]
            reader.read_into("pc.ram", inside, start=first * PAGE, length=count * PAGE)
            expected = guest["pc.ram"][first * PAGE : (first + count) * PAGE]
            assert np.array_equal(inside, expected), (first, count)
            assert (around[:PAGE] == 0xEE).all()
            assert (around[-PAGE:] == 0xEE).all()


def test_range_that_does_not_fit_is_the_caller_s_fault(tmp_path: Path) -> None:
    guest = make_guest()
    save(tmp_path / "vm", guest)
    with MappedRamReader(tmp_path / "vm") as reader:
        size = guest["pc.ram"].size
        for start, length in [(1, PAGE), (0, 100), (-PAGE, PAGE), (size, PAGE), (0, size + PAGE)]:
            with pytest.raises(StateError):
                reader.read_into("pc.ram", aligned(PAGE), start=start, length=length)
        with pytest.raises(StateError, match=r"8192 bytes for 4096"):
            reader.read_into("pc.ram", aligned(2 * PAGE), length=PAGE)
        with pytest.raises(StateError, match="read-only"):
            reader.read_into("pc.ram", bytes(PAGE), length=PAGE)
        with pytest.raises(StateError, match=r"no ramblock 'ram'.*pc\.ram"):
            reader.read_into("ram", aligned(PAGE), length=PAGE)


def test_requests_are_runs_and_no_page_goes_twice(tmp_path: Path) -> None:
    """Adjacent pages are one request of at most a block; short gaps go along, their bits clear."""
    memory = aligned(4 * MIB)
    pages = memory.reshape(-1, PAGE)
    for first, count in [(0, 40), (42, 2), (50, 1), (1000, 24)]:
        pages[first : first + count] = 7
    log = RequestLog()
    engine = EngineChoice("pwrite", recorded(PWRITE.factory, log))
    options = WriteOptions(channels=1, block_size=64 << 10, bridge=4 * PAGE)
    with MappedRamWriter(
        tmp_path / "vm", [RamBlock("ram", memory, dense=False)], options=options, engine=engine
    ) as writer:
        writer.write_all()
        result = writer.finish()
    start = 1 << 20
    assert sorted(log.requests) == [
        (start + page * PAGE, count * PAGE)
        for page, count in [(0, 16), (16, 16), (32, 12), (50, 1), (1000, 16), (1016, 8)]
    ]
    assert result.requests == len(log.requests)
    assert result.written_bytes == sum(length for _, length in log.requests)
    assert result.pages_set == 67
    assert result.zero_bytes == (1024 - 67) * PAGE
    check_image(tmp_path / "vm", {"ram": memory.tobytes()})


def test_all_windows_are_covered_once_by_many_channels(tmp_path: Path) -> None:
    memory = np.random.default_rng(3).integers(1, 256, 33 * MIB, dtype=np.uint8)
    log = RequestLog()
    engine = EngineChoice("io_uring", recorded(RING.factory, log))
    save(tmp_path / "vm", {"ram": memory}, engine=engine, options=WriteOptions(channels=4))
    assert log.overlaps == []
    ends = [MIB]
    for offset, length in sorted(log.requests):
        assert offset == ends[-1]
        ends.append(offset + length)
    assert ends[-1] == MIB + memory.size
    check_image(tmp_path / "vm", {"ram": memory.tobytes()})


def test_guest_of_zeros_has_one_page_set(tmp_path: Path) -> None:
    """An image without a single bit is taken for QEMU's background-snapshot fault."""
    guest = {"ram": aligned(2 * MIB)}
    options = WriteOptions(dense_up_to=0)
    assert save(tmp_path / "vm", guest, options=options).pages_set == 1
    assert check_image(tmp_path / "vm", copy_of(guest)).blocks[0].bits == (0,)
    assert not verify(tmp_path / "vm").mismatches


def test_holes_of_the_guest_are_zero_and_stay_holes(tmp_path: Path) -> None:
    fd = create_memfd("ram", 64 * MIB)
    try:
        for page in (0, 5000, 16383):
            os.pwrite(fd, b"\x5a" * PAGE, page * PAGE)
        memory = FileMemory(fd)
        with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)]) as writer:
            writer.write_all()
            result = writer.finish()
        memory.close()
        assert os.fstat(fd).st_blocks * 512 == 3 * PAGE, "looking at a hole has allocated it"
    finally:
        os.close(fd)
    assert result.pages_set == 3
    assert read_image(tmp_path / "vm").blocks[0].bits == (0, 5000, 16383)
    assert (tmp_path / "vm").stat().st_blocks * 512 < MIB
    assert not verify(tmp_path / "vm").mismatches


def test_each_window_of_a_span_has_its_own_digest(tmp_path: Path) -> None:
    """A channel takes four windows at a time here: full, hole, two that data and hole share."""
    length, window = 64 * MIB, 4 * MIB
    contents = np.zeros(length, np.uint8)
    fd = create_memfd("ram", length)
    try:
        for first, limit in [(0, window), (2 * window + 3 * PAGE, 3 * window + 5 * PAGE)]:
            contents[first:limit] = np.resize(np.arange(1, 252), limit - first)
            os.pwrite(fd, contents[first:limit].data, first)
        with (
            closing(FileMemory(fd)) as memory,
            MappedRamWriter(
                tmp_path / "vm", [RamBlock("ram", memory)], options=WriteOptions(channels=1)
            ) as writer,
        ):
            writer.write_all()
            writer.finish()
    finally:
        os.close(fd)
    said = json.loads((tmp_path / "vm.manifest.json").read_text())
    assert said["blocks"][0]["digests"] == [
        xxhash.xxh3_128_hexdigest(contents[at : at + window].data)
        for at in range(0, length, window)
    ]


def test_machine_and_devices_of_another_image_are_carried_over(tmp_path: Path) -> None:
    """Read what the oracle wrote, write it again: machine, sections and pages are the same."""
    stored = {3: b"\x33" * PAGE, 700: b"\x77" * PAGE}
    image = imagewriter.build_image(
        blocks=[imagewriter.Block(idstr="pc.ram", used_length=4 * MIB, pages=stored)],
        tail=imagewriter.trailer(
            devices=[imagewriter.Device(), imagewriter.Device(idstr="serial", section_id=3)]
        ),
    )
    source = image.write(tmp_path / "source")
    memory = aligned(4 * MIB)
    with MappedRamReader(source) as reader:
        reader.read_into("pc.ram", memory)
        with MappedRamWriter(
            tmp_path / "vm",
            [RamBlock("pc.ram", memory, dense=False)],
            configuration=reader.configuration,
            section_id=reader.section_id,
        ) as writer:
            writer.write_all()
            writer.finish(reader.device_state())
    before, after = read_image(source), read_image(tmp_path / "vm")
    assert (tmp_path / "vm").read_bytes() == source.read_bytes()
    assert after.machine == "pc-q35-10.0"
    assert after.sections == before.sections
    assert [section.idstr for section in after.sections if section.kind == 4] == ["timer", "serial"]


@pytest.mark.parametrize("base", [0, PAGE, 3 * MIB + 512])
def test_image_begins_where_it_was_told_to(tmp_path: Path, base: int) -> None:
    guest = make_guest()
    with MappedRamWriter(
        tmp_path / "vm", ramblocks_of(guest), options=OPTIONS, base=base, section_id=5
    ) as writer:
        writer.write_all()
        writer.finish(DeviceState.empty(5))
    image = read_image(tmp_path / "vm", base=base)
    assert image.section_id == 5
    assert image.contents == copy_of(guest)
    assert not verify(tmp_path / "vm", offset=base).mismatches
    if base:
        with pytest.raises(FormatError):
            verify(tmp_path / "vm")


def test_damage_to_any_page_is_found_and_named(tmp_path: Path) -> None:
    guest = make_guest()
    save(tmp_path / "vm", guest)
    block = read_image(tmp_path / "vm").blocks[0]
    page = block.bits[len(block.bits) // 2]
    with (tmp_path / "vm").open("r+b") as file:
        file.seek(block.pages_offset + page * PAGE + 100)
        file.write(bytes([guest["pc.ram"][page * PAGE + 100] ^ 1]))
    (mismatch,) = verify(tmp_path / "vm").mismatches
    assert mismatch.block == "pc.ram"
    assert mismatch.offset is not None
    assert mismatch.offset <= block.pages_offset + page * PAGE < mismatch.offset + 4 * MIB


def test_window_without_a_bit_is_compared_too(tmp_path: Path) -> None:
    """A window whose pages were lost, bits and all, reads as zeros: only its digest tells."""
    guest = make_guest(ram_bytes=13 * MIB)
    guest["pc.ram"][4 * MIB : 8 * MIB] = 0
    save(tmp_path / "vm", guest)
    sidecar = tmp_path / "vm.manifest.json"
    said = json.loads(sidecar.read_text())
    digests = said["blocks"][0]["digests"]
    zero, digests[1] = digests[1], digests[2]
    sidecar.write_text(json.dumps(said))
    (mismatch,) = verify(tmp_path / "vm").mismatches
    block = read_image(tmp_path / "vm").blocks[0]
    assert (mismatch.block, mismatch.offset) == ("pc.ram", block.pages_offset + 4 * MIB)
    assert (mismatch.expected, mismatch.found) == (digests[2], zero)
    assert "chunk 1 (guest bytes from 0x400000)" in str(mismatch)


def test_progress_counts_completions_through_the_phases(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    guest = make_guest(ram_bytes=40 * MIB)
    with MappedRamWriter(
        tmp_path / "vm", ramblocks_of(guest), options=OPTIONS, progress=seen.append
    ) as writer:
        for snapshot in writer.iter_write_all():
            assert snapshot.phase == "write"
        result = writer.finish()
    phases = list(dict.fromkeys(snapshot.phase for snapshot in seen))
    assert phases == ["write", "bitmaps", "devices", "sync", "publish"]
    for name in ("scanned_bytes", "finished_bytes", "completed_bytes", "zero_bytes", "seconds"):
        values = [getattr(snapshot, name) for snapshot in seen]
        assert values == sorted(values), name
    last = seen[-1]
    assert last.share == 1.0
    assert last.in_flight_bytes == 0
    assert last.completed_bytes == sum(last.channels) == result.written_bytes
    assert len(last.channels) == OPTIONS.channels


def test_manifest_says_what_ran(tmp_path: Path) -> None:
    result = save(tmp_path / "vm", make_guest(), engine=RING)
    assert result.manifest_path == str(tmp_path / "vm.manifest.json")
    said = json.loads((tmp_path / "vm.manifest.json").read_text())
    assert said["settings"]["engine"] == result.engine == "io_uring"
    assert said["settings"]["direct"] == result.direct
    assert said["file_size"] == result.file_size
    assert sum(block["pages_set"] for block in said["blocks"]) == result.pages_set


def test_manifest_may_be_left_out_and_an_old_one_goes(tmp_path: Path) -> None:
    save(tmp_path / "vm", make_guest(0))
    options = WriteOptions(manifest=False)
    result = save(tmp_path / "vm", make_guest(1), options=options)
    assert result.manifest_path is None
    assert left_in(tmp_path) == ["vm"]
    report = verify(tmp_path / "vm")
    assert report.manifest_path is None
    assert not report.mismatches
    assert report.notes


@pytest.mark.parametrize(
    "memory",
    [bytearray(8 * PAGE), np.ones((4, PAGE), np.uint8), np.ones(1024, np.int64), b"x" * PAGE],
    ids=["bytearray", "two dimensions", "words", "read-only"],
)
def test_any_contiguous_buffer_is_memory(tmp_path: Path, memory: object) -> None:
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", memory)]) as writer:
        writer.write_all()
        writer.finish()
    check_image(tmp_path / "vm", {"ram": bytes(memory)})  # type: ignore[call-overload]


def test_mapping_can_be_closed_after_the_save(tmp_path: Path) -> None:
    """The writer lets go of the buffer: an mmap with a view on it refuses to close."""
    mapping = mmap.mmap(-1, MIB)
    mapping[:5] = b"guest"
    with MappedRamWriter(tmp_path / "vm", [RamBlock("ram", mapping)]) as writer:
        writer.write_all()
        writer.finish()
        mapping.close()
    assert read_image(tmp_path / "vm").contents["ram"].startswith(b"guest\0")


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [RamBlock("ram", b"")],
        [RamBlock("ram", bytes(100))],
        [RamBlock("", bytes(PAGE))],
        [RamBlock("x" * 256, bytes(PAGE))],
        [RamBlock("ram", bytes(PAGE)), RamBlock("ram", bytes(PAGE))],
        [RamBlock("ram", 7)],
        [RamBlock("ram", np.ones((2, 2 * PAGE), np.uint8)[:, ::2])],
    ],
)
def test_blocks_no_image_can_be_made_of_are_refused_before_anything(
    tmp_path: Path, blocks: list[RamBlock]
) -> None:
    with pytest.raises(StateError):
        MappedRamWriter(tmp_path / "vm", blocks)
    assert left_in(tmp_path) == []


def test_capability_other_than_mapped_ram_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError):
        MappedRamWriter(
            tmp_path / "vm", [RamBlock("ram", bytes(PAGE))], configuration=Configuration("pc")
        )
    assert left_in(tmp_path) == []


def test_device_state_that_makes_no_stream_publishes_nothing(tmp_path: Path) -> None:
    for tail in (b"", b"\x00", b"garbage" * 100, DeviceState.empty(2).tail):
        with pytest.raises(FormatError):
            save(tmp_path / "vm", make_guest(), state=DeviceState(tail))
        assert left_in(tmp_path) == []
