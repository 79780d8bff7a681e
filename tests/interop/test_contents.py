"""What a real QEMU saved, opened as contents: every kind of file gives the guest's very memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contentsreading import collect
from qemuprocess import BINARY, QemuProcess
from realguest import shared_path

from uringmig import MappedRamWriter, RamBlock
from uringmig.contents.memoryfiles import MemoryFileBlock, open_memory
from uringmig.contents.opening import open_contents
from uringmig.contents.source import Contents
from uringmig.contents.streaming import plain_pieces
from uringmig.errors import FormatError, MismatchError
from uringmig.units import MiB

PAGE = 4096
RAM_BYTES = 64 * MiB
#: Where the stream begins in the libvirt images made here: header, XML, and room to spare.
XML = b"<domain type='qemu'><name>web1</name></domain>\0"
DATA_BYTES = 0x10000 + 1

#: Real mode: adds 1 to a byte of each page from 64 KiB to 512 KiB, again and again.
CODE = bytes.fromhex("b80010 8ed8 fe060000 050001 3d0080 72f2 ebed")

pytestmark = pytest.mark.skipif(BINARY is None, reason="qemu-system-x86_64 is not installed")


def libvirt_header(form: int, *, magic: bytes = b"LibvirtQemudSave") -> bytes:
    fields = struct.pack("<5I", 2, DATA_BYTES, 1, form, 0)
    return (magic + fields + bytes(56) + XML).ljust(92 + DATA_BYTES, b"\0")


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("firmware") / "bios.bin"
    # The reset vector, 16 bytes below the end, jumps to F000:0000.
    path.write_bytes(CODE.ljust(0xFFF0, b"\xf4") + bytes.fromhex("ea000000f0").ljust(16, b"\xf4"))
    return path


@pytest.fixture(scope="module")
def ram() -> Iterator[Path]:
    """The guest's memory: pages of words, some zero, in a file in /dev/shm with holes."""
    path = shared_path()
    words = np.zeros((RAM_BYTES // PAGE, PAGE // 8), np.uint64)
    numbers = np.arange(len(words), dtype=np.uint64)
    chosen = (numbers % 3 == 1) | (numbers % 1000 < 400)
    words[chosen] = numbers[chosen, None] + np.arange(PAGE // 8, dtype=np.uint64)
    words[5000:9000] = 0
    with path.open("wb") as file:
        file.truncate(RAM_BYTES)
        for page in np.flatnonzero(words.any(axis=1)).tolist():
            file.seek(page * PAGE)
            file.write(words[page].tobytes())
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def saved(ram: Path, firmware: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One guest that never ran, saved by QEMU in every form."""
    folder = tmp_path_factory.mktemp("saved")
    offset = 92 + DATA_BYTES
    sparse = ["mapped-ram", "multifd"]
    forms: list[tuple[str, str, list[str]]] = [
        ("plain", f"file:{folder}/plain", []),
        ("mapped", f"file:{folder}/mapped", ["mapped-ram"]),
        ("offset", f"file:{folder}/offset,offset=0x3001", sparse),
        ("sparse", f"file:{folder}/sparse,offset={offset}", sparse),
        ("state", f"file:{folder}/state", ["x-ignore-shared"]),
    ]
    for _, uri, capabilities in forms:
        with QemuProcess(folder, ram=ram, arguments=["-bios", str(firmware)]) as qemu:
            qemu.save(uri, capabilities=capabilities, max_bandwidth=0)
    with (folder / "sparse").open("r+b") as file:
        file.write(libvirt_header(6))
    (folder / "raw").write_bytes(libvirt_header(0) + (folder / "plain").read_bytes())
    return {name: folder / name for name in ["plain", "mapped", "offset", "sparse", "raw", "state"]}


def opened(saved: dict[str, Path], ram: Path, name: str) -> Contents:
    if name == "memory":
        return open_memory([MemoryFileBlock("pc.ram", ram)], saved["state"])
    return open_contents(saved[name], offset=0x3001 if name == "offset" else None)


KINDS = {
    "plain": "plain",
    "mapped": "mapped-ram",
    "offset": "mapped-ram",
    "raw": "libvirt",
    "sparse": "libvirt",
    "memory": "memory",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_form_gives_the_same_guest(
    saved: dict[str, Path], ram: Path, name: str, tmp_path: Path
) -> None:
    with opened(saved, ram, "mapped") as source:
        expected = collect(source)
    assert expected["pc.ram"] == ram.read_bytes()
    with opened(saved, ram, name) as source:
        assert source.kind == KINDS[name]
        assert source.configuration.machine.startswith("pc-q35-")
        found = collect(source)
        # QEMU lists blocks alike in every form.
        assert found.keys() == expected.keys()
        for idstr, memory in found.items():
            assert memory == expected[idstr], idstr
        # And what is made of it is an image that the reader, and so QEMU's rules, accept.
        blocks = [RamBlock(idstr, bytearray(memory)) for idstr, memory in found.items()]
        with MappedRamWriter(
            tmp_path / "again.mig",
            blocks,
            configuration=source.configuration,
            section_id=source.section_id,
        ) as writer:
            writer.write_all()
            writer.finish(source.device_state())
    with open_contents(tmp_path / "again.mig") as again:
        assert collect(again) == found


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_made_of_it_is_the_same_guest(
    saved: dict[str, Path], ram: Path, name: str, tmp_path: Path
) -> None:
    """Memory and, byte for byte, device state: so it has the same digest in an archive."""
    with opened(saved, ram, name) as source:
        with (tmp_path / "stream").open("wb") as file:
            file.writelines(plain_pieces(source))
        with open_contents(tmp_path / "stream") as stream:
            assert stream.kind == "plain"
            assert stream.device_state() == source.device_state()
            assert stream.configuration == source.configuration
            assert collect(stream) == collect(source)


def test_looking_at_memory_files_allocates_nothing(saved: dict[str, Path], ram: Path) -> None:
    """On a file whose zero pages are holes again: QEMU's own scan has allocated the guest's."""
    sparse = shared_path()
    try:
        with sparse.open("wb") as file:
            file.truncate(RAM_BYTES)
            pages = np.fromfile(ram, np.uint64).reshape(-1, PAGE // 8)
            for page in np.flatnonzero(pages.any(axis=1)).tolist():
                file.seek(page * PAGE)
                file.write(pages[page].tobytes())
        before = sparse.stat().st_blocks
        assert before * 512 < RAM_BYTES
        with opened(saved, sparse, "memory") as source:
            assert collect(source)["pc.ram"] == ram.read_bytes()
            # Besides the RAM that is no hole there are the ROMs and video memory of the state.
            assert before * 512 < source.stored_bytes() < RAM_BYTES
        assert sparse.stat().st_blocks == before
    finally:
        sparse.unlink()


def test_memory_and_device_state_must_go_together(
    saved: dict[str, Path], ram: Path, tmp_path: Path
) -> None:
    state = saved["state"]
    with pytest.raises(MismatchError, match=r"not in the device state .*pc\.ram"):
        open_memory([MemoryFileBlock("pc.ram", ram), MemoryFileBlock("other", ram)], state)
    with pytest.raises(MismatchError, match="67108864 bytes in the stream, but its backend has"):
        open_memory([MemoryFileBlock("pc.ram", ram, length=RAM_BYTES // 2)], state)
    with pytest.raises(FormatError, match="without x-ignore-shared"):
        open_memory([MemoryFileBlock("pc.ram", ram)], saved["plain"])
    cut = tmp_path / "cut"
    cut.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(FormatError, match="vmdescription"):
        open_memory([MemoryFileBlock("pc.ram", ram)], cut)


def test_a_guest_that_ran_while_it_was_saved(firmware: Path, tmp_path: Path) -> None:
    """Its pages come again and again; the last one is what the guest has in memory in the end."""
    ram = shared_path()
    with ram.open("wb") as file:
        file.truncate(RAM_BYTES)
    try:
        with QemuProcess(tmp_path, ram=ram, arguments=["-bios", str(firmware)]) as qemu:
            qemu.command("cont")
            # Slow enough for several rounds, and an end that the guest cannot put off.
            qemu.save(
                f"file:{tmp_path}/live", capabilities=[], max_bandwidth=4 << 20, downtime_limit=2000
            )
            memory = ram.read_bytes()
    finally:
        ram.unlink()
    with open_contents(tmp_path / "live") as source:
        assert collect(source)["pc.ram"] == memory
        # The bytes count modulo 256, so that some pages may be zero in the end. More came than are.
        assert np.frombuffer(memory, np.uint8).reshape(-1, PAGE).any(axis=1).sum() >= 50
        assert (tmp_path / "live").stat().st_size > source.stored_bytes() + 50 * PAGE


def test_an_unfinished_libvirt_image_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "part"
    image = saved["raw"].read_bytes()
    path.write_bytes(libvirt_header(0, magic=b"LibvirtQemudPart") + image[92 + DATA_BYTES :])
    with pytest.raises(FormatError, match="never completed"):
        open_contents(path)
    path.write_bytes(libvirt_header(5) + image[92 + DATA_BYTES :])
    with pytest.raises(FormatError, match="zstd"):
        open_contents(path)
