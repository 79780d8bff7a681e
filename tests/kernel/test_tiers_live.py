"""Both tiers of memory that is mapped: written from where it lies, its holes not touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from realguest import shared_path
from smallguests import MIB, OPTIONS, PAGE, aligned, check_image, left_in

from uringmig import Configuration, FileMemory
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.hot import write_hot
from uringmig.contents.devicestream import DeviceStream, PrivateBlock
from uringmig.contents.memoryfiles import MemoryContents
from uringmig.testing.guests import fill_pages

RAM_BYTES = 64 * MIB


@pytest.fixture
def ram() -> Iterator[Path]:
    """A file of shared memory with data here and there, holes elsewhere, and pages of zeros."""
    path = shared_path()
    memory = np.zeros(RAM_BYTES, np.uint8)
    bits = np.zeros(RAM_BYTES // PAGE, np.bool_)
    bits[np.random.default_rng(2).integers(0, len(bits), 300)] = True
    bits[: 5 * MIB // PAGE] = True
    fill_pages(memory, bits)
    try:
        with path.open("wb") as file:
            file.truncate(RAM_BYTES)
            for page in np.flatnonzero(bits).tolist():
                file.seek(page * PAGE)
                file.write(memory[page * PAGE : (page + 1) * PAGE].data)
            file.seek(RAM_BYTES - 2 * PAGE)
            file.write(bytes(PAGE))  # allocated, and zero
        yield path
    finally:
        path.unlink()


@contextmanager
def live(ram: Path, video: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Iterator[MemoryContents]:
    stream = DeviceStream()
    stream.configuration = Configuration("pc-q35-10.0", ("x-ignore-shared",))
    stream.section_id = 3
    stream.blocks = [("pc.ram", RAM_BYTES), ("vga.vram", len(video))]
    stream.private = {"vga.vram": PrivateBlock(video, np.ones(len(video) // PAGE, np.bool_))}
    stream.vmdescription = b'{"page_size": 4096, "devices": []}'
    with MemoryContents("memory", stream, {"pc.ram": FileMemory(ram)}) as contents:
        yield contents


@pytest.mark.parametrize("video_bytes", [MIB // 4, 2 * MIB])
def test_live_memory(tmp_path: Path, ram: Path, video_bytes: int) -> None:
    """Video memory below and above what is written whole."""
    video = aligned(video_bytes)
    video[PAGE * 3 :: 5000] = 7
    guest = {"pc.ram": ram.read_bytes(), "vga.vram": video.tobytes()}
    allocated = ram.stat().st_blocks
    (tmp_path / "journal").write_bytes(b"of something else")
    with live(ram, video) as contents:
        hot = write_hot(contents, tmp_path / "a.mig", options=OPTIONS, resume=tmp_path / "journal")
        cold = write_cold(contents, tmp_path / "a.cold", options=OPTIONS)
    assert ram.stat().st_blocks == allocated, "a hole was looked at"
    image = check_image(tmp_path / "a.mig", guest)
    assert image.section_id == 3
    assert len(image.blocks[0].bits) < 300 + 5 * MIB // PAGE + 1
    with open_cold(tmp_path / "a.cold") as contents:
        again = write_hot(contents, tmp_path / "b.mig", options=OPTIONS)
    check_image(tmp_path / "b.mig", guest)
    digests = {
        result.manifest.archive.content_digest  # type: ignore[union-attr]
        for result in (hot, cold, again)
    }
    assert len(digests) == 1
    assert left_in(tmp_path) == [
        f"{name}{suffix}"
        for name in ("a.cold", "a.mig", "b.mig")
        for suffix in ("", ".manifest.json")
    ]
