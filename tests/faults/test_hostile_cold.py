"""Cold images that were damaged or made to do harm: refused with a place, or read as they were.

Fatal must be every change of a byte that anybody reads. Nothing else may happen: no traceback, no
hang, no memory larger than the file warrants, and never other memory than was saved.
"""

from __future__ import annotations

import random
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from coldreader import PAGE, Frame, digest, mend, read_cold
from smallguests import MIB, OPTIONS, copy_of, left_in, make_guest, ramblocks_of

from uringmig import FormatError, MappedRamWriter, MismatchError, ReadOptions, StorageError
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.hot import write_hot
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import all_rows

READ = ReadOptions(depth=2, block_size=256 << 10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A cold image, and what is in it."""
    folder = tmp_path_factory.mktemp("cold")
    guest = make_guest(3, ram_bytes=13 * MIB)
    guest["pc.ram"][4 * MIB : 8 * MIB] = 0
    with MappedRamWriter(folder / "a.mig", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    with MappedRamContents(folder / "a.mig") as contents:
        write_cold(contents, folder / "a.cold", options=OPTIONS)
    return folder / "a.cold", copy_of(guest)


def read_all(path: Path) -> dict[str, bytes]:
    """Everything of a cold image, by our reader."""
    with open_cold(path, options=READ) as contents:
        memory = {block.idstr: np.zeros(block.used_length, np.uint8) for block in contents.blocks}
        for window in contents.windows(all_rows(contents.blocks)):
            block = contents.blocks[window.block_index]
            start = window.row * 4 * MIB
            memory[block.idstr][start : start + len(window.memory)] = window.memory
        contents.device_state()
        return {idstr: bytes(held) for idstr, held in memory.items()}


def test_the_oracle_reads_what_was_saved(made: tuple[Path, dict[str, bytes]]) -> None:
    path, guest = made
    image = read_cold(path)
    assert image.contents == guest
    assert (image.level, image.section_id) == (3, 1)
    assert [idstr for idstr, _ in image.blocks] == list(guest)
    # The window of zeros has no frame.
    assert [(frame.block, frame.row) for frame in image.frames] == [
        (0, 0), (0, 2), (0, 3), (1, 0), (2, 0),
    ]  # fmt: skip
    assert read_all(path) == guest


def test_random_flips(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, guest = made
    whole = path.read_bytes()
    frames = read_cold(path).frames
    padding = set()
    for frame in frames:
        end = frame.offset + frame.length
        padding |= set(range(end, (end + PAGE - 1) // PAGE * PAGE))
    source = random.Random(11)
    index_at = struct.unpack_from(">Q", whole, 32)[0]
    regions = [(0, PAGE), (PAGE, index_at), (index_at, len(whole))]
    bent = tmp_path / "bent.cold"
    for number in range(150):
        place = source.randrange(*regions[number % 3])
        data = bytearray(whole)
        data[place] ^= 1 << source.randrange(8)
        bent.write_bytes(data)
        if place in padding:
            assert read_all(bent) == guest
            continue
        with pytest.raises((FormatError, MismatchError)) as caught:
            read_all(bent)
        if PAGE <= place < index_at:
            [hit] = [
                frame for frame in frames if frame.offset <= place < frame.offset + frame.length
            ]
            assert isinstance(caught.value, MismatchError)
            assert caught.value.offset == hit.offset
            assert caught.value.block == list(guest)[hit.block]
            assert f"chunk {hit.row} " in str(caught.value)


def test_cut_anywhere(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    path, _ = made
    whole = path.read_bytes()
    source = random.Random(12)
    bent = tmp_path / "bent.cold"
    for length in [0, 1, 79, PAGE - 1, PAGE, len(whole) - 1] + [
        source.randrange(len(whole)) for _ in range(20)
    ]:
        bent.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_all(bent)
    bent.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="end of the index"):
        read_all(bent)


def replace_frame(path: Path, out: Path, number: int, frame: bytes) -> Frame:
    """Put other bytes in the place of a frame, all digests but the memory's made to fit."""
    data = bytearray(path.read_bytes())
    image = read_cold(path)
    old = image.frames[number]
    room = (old.length + PAGE - 1) // PAGE * PAGE
    assert len(frame) <= room
    data[old.offset : old.offset + room] = frame.ljust(room, b"\0")
    index_at = struct.unpack_from(">Q", data, 32)[0]
    # The columns end the file, so they are found from there.
    count = len(image.frames)
    digests_at = len(data) - count * (16 + 16 + 128)
    lengths_at = digests_at - 4 * count
    assert lengths_at > index_at
    struct.pack_into(">I", data, lengths_at + 4 * number, len(frame))
    data[digests_at + 16 * number : digests_at + 16 * number + 16] = digest(frame)
    mend(data)
    out.write_bytes(data)
    return old


def test_frames_that_lie(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """What a frame's header claims is never believed, nor allocated."""
    path, _ = made
    bent = tmp_path / "bent.cold"
    compress = zstandard.ZstdCompressor(level=3).compress
    bomb = compress(bytes(512 * MIB))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 * MIB))
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27)
    ).compressobj()
    wide_frame = wide.compress(bytes(4 * MIB)) + wide.flush()
    for frame in (
        bomb, unsized, wide_frame, compress(b""), compress(bytes(PAGE)), compress(bytes(4 * MIB)),
        b"\0" * 100, b"\x28\xb5\x2f\xfd", compress(bytes(MIB))[:-3], bytes(4),
        b"\x50\x2a\x4d\x18\xff\xff\xff\x7f", b"x" * 5000,
    ):  # fmt: skip
        old = replace_frame(path, bent, 1, frame)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(MismatchError, match="a frame") as caught:
            read_all(bent)
        assert caught.value.offset == old.offset
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("number", range(5))
def test_frame_of_other_memory(
    made: tuple[Path, dict[str, bytes]], tmp_path: Path, number: int
) -> None:
    """A sound frame in the place of another: its own digest fits, that of its memory does not.

    So it would be after frames were mixed up, or unpacked wrongly: each is digested twice, the
    second time as the memory that comes of it.
    """
    path, guest = made
    frame = read_cold(path).frames[number]
    with open_cold(path, options=READ) as contents:
        idstr = contents.blocks[frame.block].idstr
    window = guest[idstr][frame.row * 4 * MIB : (frame.row + 1) * 4 * MIB]
    pages = np.frombuffer(window, np.uint8).reshape(-1, PAGE)
    stored = pages[pages.any(axis=1)]
    stored[-1, -1] ^= 1
    bent = tmp_path / "bent.cold"
    packed = zstandard.ZstdCompressor(level=22).compress(stored.tobytes())
    replace_frame(path, bent, number, packed)
    with pytest.raises(MismatchError, match=f"contents differ in chunk {frame.row} ") as caught:
        read_all(bent)
    assert (caught.value.block, caught.value.offset) == (idstr, frame.offset)


def test_hostile_image_leaves_nothing_behind(
    made: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    path, _ = made
    replace_frame(path, tmp_path / "bent.cold", 2, b"nothing")
    archive = tmp_path / "archive"
    archive.mkdir()
    with open_cold(tmp_path / "bent.cold") as contents:
        for write, name in ((write_hot, "a.mig"), (write_cold, "a.cold")):
            with pytest.raises(MismatchError):
                write(contents, archive / name, options=OPTIONS, resume=archive / "journal")
    assert left_in(archive) == []


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_cold(tmp_path)
    with pytest.raises(StorageError):
        open_cold(tmp_path / "missing")
