"""Files of real QEMU, both ways: what it wrote is read page for page, and rebuilt byte for byte.

The guest never runs. Its memory is a shared file that the test fills, so that the host knows every
page of it without asking the guest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imagewriter
import numpy as np
import pytest
from imagereader import PAGE, ReadImage, read_image
from imagewriter import Block, Image, build_image
from numpy.typing import NDArray
from qemuprocess import BINARY, QemuProcess

from uringmig.memory.mapping import FileMemory
from uringmig.options import ReadOptions, WriteOptions
from uringmig.reader import MappedRamReader
from uringmig.writer import MappedRamWriter, RamBlock

pytestmark = pytest.mark.skipif(BINARY is None, reason="qemu-system-x86_64 is not installed")

MIB = 1 << 20
RAM_BYTES = 64 * MIB
MULTIFD = ["mapped-ram", "multifd"]


@dataclass(frozen=True)
class Saved:
    """A file of QEMU's, the memory it was made of, and what the oracle says is in it."""

    path: Path
    base: int
    ram: Path
    image: ReadImage


def fill(path: Path, *, seed: int) -> None:
    """Guest memory with runs of every sort: single pages, long runs, gaps, both ends used."""
    rng = np.random.default_rng(seed)
    memory: NDArray[np.uint8] = np.zeros(RAM_BYTES, np.uint8)
    pages = memory.reshape(-1, PAGE)
    for length in (1, 1, 2, 3, 5, 8, 63, 64, 65, 300, 1024):
        first = int(rng.integers(0, len(pages) - length))
        pages[first : first + length] = rng.integers(0, 256, (length, PAGE), np.uint8)
    # One byte makes a page: the first, the last, and the last byte of one.
    pages[0, 0] = pages[-1, -1] = pages[4096, 17] = 1
    with path.open("wb") as file:
        file.truncate(RAM_BYTES)
        for index in np.flatnonzero(pages.any(axis=1)).tolist():
            file.seek(index * PAGE)
            file.write(pages[index].tobytes())


VARIANTS: dict[str, tuple[list[str], dict[str, object], int]] = {
    "mapped-ram": (["mapped-ram"], {}, 0),
    "multifd": (MULTIFD, {"multifd_channels": 3}, 0),
    "direct-io": (MULTIFD, {"direct_io": True}, 0),
    "offset": (MULTIFD, {"direct_io": True}, 0x3001),
    "every-bit-set": (MULTIFD, {"zero_page_detection": "none"}, 0),
}


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    capabilities, parameters, base = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("saved")
    ram, path = folder / "ram", folder / "qemu.mig"
    fill(ram, seed=len(request.param))
    with QemuProcess(folder, ram=ram) as qemu:
        uri = f"file:{path}" + (f",offset={base:#x}" if base else "")
        qemu.save(uri, capabilities=capabilities, **parameters)
    return Saved(path, base, ram, read_image(path, base=base))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    """Memory of a guest that has never run: one hole."""
    path = tmp_path / "fresh"
    with path.open("wb") as file:
        file.truncate(RAM_BYTES)
    yield path
    path.unlink()


def test_oracle_reads_what_qemu_saved(saved: Saved) -> None:
    """Without this the other tests would compare with nothing."""
    assert saved.image.contents["pc.ram"] == saved.ram.read_bytes()
    assert {"pc.bios", "/rom@etc/acpi/tables"} < set(saved.image.contents)


def blocks_of(image: ReadImage) -> list[Block]:
    """The blocks for the oracle's writer, each stored page included."""
    return [
        Block(
            idstr=block.idstr,
            used_length=block.used_length,
            pages={
                bit: image.contents[block.idstr][bit * PAGE : (bit + 1) * PAGE]
                for bit in block.bits
            },
        )
        for block in image.blocks
    ]


def legal_variants(image: ReadImage) -> dict[str, Image]:
    """The same guest in files that QEMU would not write and must load."""
    machine = imagewriter.configuration(machine=image.machine)
    blocks = blocks_of(image)
    tail = image.tail
    no_parts = b"".join(section.raw for section in image.sections if section.kind == 4)
    no_parts += imagewriter.EOF_BYTE + imagewriter.description(image.description)
    ids = random.Random(1).sample(range(len(blocks)), len(blocks))
    # Page areas 4 KiB aligned and in another order than the headers; the last block's area stays
    # last, since the trailer follows it.
    places: dict[int, int] = {}
    position = 0x41000
    for index in [*[one for one in ids if one != len(blocks) - 1], len(blocks) - 1]:
        places[index] = position
        position += blocks[index].used_length + 3 * PAGE
    shuffled = [
        Block(
            idstr=block.idstr,
            used_length=block.used_length,
            pages=block.pages,
            pages_offset=places[index],
            bitmap_offset=0x1000 * (index + 1),
        )
        for index, block in enumerate(blocks)
    ]
    return {
        "without PART and END": build_image(config=machine, blocks=blocks, tail=no_parts),
        "another section id": build_image(
            config=machine, blocks=blocks, tail=no_parts, section_id=77
        ),
        "any placement": build_image(
            config=machine, blocks=shuffled, tail=tail, section_id=image.section_id
        ),
        "blocks in another order": build_image(
            config=machine, blocks=blocks[::-1], tail=tail, section_id=image.section_id
        ),
    }


@pytest.mark.parametrize("saved", ["direct-io"], indirect=True)
@pytest.mark.parametrize("direct_io", [False, True])
def test_qemu_loads_the_legal_variants(saved: Saved, tmp_path: Path, direct_io: bool) -> None:
    """What our reader must not refuse, since QEMU takes it."""
    for name, image in legal_variants(saved.image).items():
        path = image.write(tmp_path / "variant")
        ram = tmp_path / "ram"
        with ram.open("wb") as file:
            file.truncate(RAM_BYTES)
        found = read_image(path, placement="any")
        assert found.contents == saved.image.contents, name
        with QemuProcess(tmp_path, ram=ram, arguments=["-incoming", "defer"]) as qemu:
            status = qemu.load(
                f"file:{path}",
                capabilities=MULTIFD if direct_io else ["mapped-ram"],
                direct_io=direct_io,
            )
        assert (name, status) == (name, "completed")
        assert ram.read_bytes() == saved.ram.read_bytes(), name


READ_OPTIONS = [
    ReadOptions(channels=1, depth=1, engine="pwrite", direct="off", bridge=0),
    ReadOptions(channels=2, depth=8, engine="auto", direct="preferred"),
    ReadOptions(channels=3, depth=2, block_size=8192, direct="required", bridge=8192),
]


@pytest.mark.parametrize("options", READ_OPTIONS)
def test_reader_reads_qemus_file_page_for_page(saved: Saved, options: ReadOptions) -> None:
    """The memory file is the truth for main RAM, the oracle for the other blocks."""
    with MappedRamReader(saved.path, offset=saved.base, options=options) as reader:
        assert reader.configuration.machine == saved.image.machine
        assert reader.configuration.capabilities == ("mapped-ram",)
        assert reader.section_id == saved.image.section_id
        assert reader.device_state().tail == saved.image.tail
        truth = {**saved.image.contents, "pc.ram": saved.ram.read_bytes()}
        assert [block.idstr for block in reader.blocks] == list(truth)
        for info, block in zip(reader.blocks, saved.image.blocks, strict=True):
            # What is not stored must be zeroed too: the buffer is not fresh.
            memory = np.full(info.used_length, 0xA5, np.uint8)
            reader.read_into(info.idstr, memory)
            assert memory.tobytes() == truth[info.idstr], info.idstr
            bits = np.unpackbits(reader.bitmap(info.idstr), bitorder="little")
            assert tuple(np.flatnonzero(bits).tolist()) == block.bits
            assert info.pages_set == len(block.bits)
            assert info.layout.pages_offset == block.pages_offset


def test_reader_reads_ranges_of_qemus_file(saved: Saved) -> None:
    """A range is the same bytes as in the whole, wherever it begins and ends."""
    truth = saved.ram.read_bytes()
    rng = random.Random(7)
    with MappedRamReader(saved.path, offset=saved.base) as reader:
        for _ in range(20):
            first, last = sorted(rng.sample(range(RAM_BYTES // PAGE + 1), 2))
            memory = bytearray((last - first) * PAGE)
            reader.read_into("pc.ram", memory, start=first * PAGE, length=len(memory))
            assert memory == truth[first * PAGE : last * PAGE], (first, last)


WRITE_OPTIONS = [
    WriteOptions(channels=1, depth=1, engine="pwrite", direct="off", bridge=0),
    WriteOptions(channels=2, depth=8, direct="required"),
    WriteOptions(channels=3, depth=4, block_size=16384, direct="required", bridge=16384),
]


@pytest.mark.parametrize("options", WRITE_OPTIONS)
def test_writer_rebuilds_qemus_file_byte_for_byte(
    saved: Saved, tmp_path: Path, options: WriteOptions
) -> None:
    """From QEMU's own parts, and main RAM from its file, the very same file."""
    with MappedRamReader(saved.path, offset=saved.base) as reader:
        configuration, section_id = reader.configuration, reader.section_id
        device_state = reader.device_state()
        every_bit = all(info.pages_set == info.layout.page_count for info in reader.blocks)
        memory: dict[str, object] = {}
        for info in reader.blocks:
            buffer = bytearray(info.used_length)
            reader.read_into(info.idstr, buffer)
            memory[info.idstr] = buffer
    memory["pc.ram"] = FileMemory(saved.ram)
    path = tmp_path / "rebuilt"
    blocks = [RamBlock(idstr, part, dense=every_bit) for idstr, part in memory.items()]
    with MappedRamWriter(
        path, blocks, options=options, configuration=configuration, section_id=section_id,
        base=saved.base,
    ) as writer:  # fmt: skip
        writer.write_all()
        writer.finish(device_state)
    assert path.stat().st_size == saved.path.stat().st_size
    assert path.read_bytes() == saved.path.read_bytes()
