"""Small guests for whole saves, and the oracle's word on what came of them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from imagereader import ReadImage, read_image
from numpy.typing import NDArray

from uringmig import RamBlock, WriteOptions
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.ring import RingEngine

PAGE = 4096
MIB = 1 << 20

Memories = dict[str, NDArray[np.uint8]]

PWRITE = EngineChoice("pwrite", PwriteEngine)
RING = EngineChoice("io_uring", RingEngine)
#: Many small requests, so that a small guest has enough of them to go wrong.
OPTIONS = WriteOptions(channels=2, depth=4, block_size=64 << 10, dense_up_to=256 << 10)


def aligned(length: int) -> NDArray[np.uint8]:
    """Zeroed memory at a page's beginning."""
    return np.frombuffer(mmap.mmap(-1, length), np.uint8)


def make_guest(seed: int = 0, *, ram_bytes: int = 9 * MIB) -> Memories:
    """Three blocks: RAM with runs and gaps over several windows, video memory, and a dense ROM."""
    source = np.random.default_rng(seed)
    guest = {"pc.ram": aligned(ram_bytes), "vga.vram": aligned(MIB), "pc.rom": aligned(128 << 10)}
    for memory in guest.values():
        pages = memory.reshape(-1, PAGE)
        lengths = source.integers(1, 24, len(pages))
        bits = np.repeat(np.arange(len(lengths)) % 2 == seed % 2, lengths)[: len(pages)]
        pages[bits] = source.integers(1, 256, (int(bits.sum()), PAGE), dtype=np.uint8)
    return guest


def ramblocks_of(guest: Mapping[str, object]) -> list[RamBlock]:
    return [RamBlock(idstr, memory) for idstr, memory in guest.items()]


def copy_of(guest: Memories) -> dict[str, bytes]:
    return {idstr: memory.tobytes() for idstr, memory in guest.items()}


def check_image(path: Path, contents: Mapping[str, bytes]) -> ReadImage:
    """Let the oracle read the file: strictly as QEMU lays it out, and equal page for page."""
    image = read_image(path)
    assert [block.idstr for block in image.blocks] == list(contents)
    for idstr, expected in contents.items():
        assert image.contents[idstr] == expected, f"{idstr} differs"
    return image


def left_in(folder: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in folder.iterdir())
