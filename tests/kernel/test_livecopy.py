"""A guest that runs while it is archived: both tiers hold what it was when it stood still."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from loopdisk import mounted
from numpy.typing import NDArray
from smallguests import MIB, OPTIONS, PAGE, aligned, check_image, left_in

from uringmig import Configuration, FileMemory, WriteOptions
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.copied import TierResult
from uringmig.archive.hot import write_hot
from uringmig.contents.devicestream import DeviceStream, PrivateBlock
from uringmig.contents.memoryfiles import MemoryContents
from uringmig.errors import PeerError
from uringmig.progress import Snapshot
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import Completions

RAM_BYTES = 40 * MIB
VIDEO_BYTES = MIB
ROM_BYTES = 128 << 10
BOTH = pytest.mark.parametrize("tier", ["hot", "cold"])
#: linux/falloc.h: FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE.
PUNCH = 0x3


class Running(MemoryContents):
    """Memory of a guest that does something until it stands still.

    Attributes:
        fd: of its RAM.
        video: its video memory; ``rom`` likewise, of which every page is stored.
        at_last: what the guest does before it stands still.
        meddle: what happens once its memory has been looked at again.
        stood_still: for so long, in seconds.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, RAM_BYTES)
        self.video, self.rom = aligned(VIDEO_BYTES), aligned(ROM_BYTES)
        self.at_last: Callable[[], object] = int
        self.meddle: Callable[[], object] = int
        self.stood_still = 0.0
        self.ran = True
        stream = DeviceStream()
        stream.configuration = Configuration("pc-q35-10.0", ("x-ignore-shared",))
        stream.section_id = 3
        stream.blocks = [("pc.ram", RAM_BYTES), ("vga", VIDEO_BYTES), ("rom", ROM_BYTES)]
        stream.private = {
            name: PrivateBlock(memory, np.ones(len(memory) // PAGE, np.bool_))
            for name, memory in (("vga", self.video), ("rom", self.rom))
        }
        stream.vmdescription = b'{"page_size": 4096, "devices": []}'
        super().__init__("memory", stream, {"pc.ram": FileMemory(self.fd)})

    def runs(self) -> bool:
        return self.ran

    @contextmanager
    def standstill(self) -> Iterator[None]:
        self.at_last()
        began = time.monotonic()
        yield
        self.stood_still = time.monotonic() - began
        self.meddle()

    def put(self, page: int, data: bytes) -> None:
        os.pwrite(self.fd, data, page * PAGE)

    def punch(self, page: int, count: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        length = ctypes.c_long(count * PAGE)
        assert libc.fallocate(self.fd, PUNCH, ctypes.c_long(page * PAGE), length) == 0

    def now(self) -> dict[str, bytes]:
        ram = os.pread(self.fd, RAM_BYTES, 0)
        return {"pc.ram": ram, "vga": self.video.tobytes(), "rom": self.rom.tobytes()}

    def close(self) -> None:
        super().close()
        os.close(self.fd)


@pytest.fixture
def guest() -> Iterator[Running]:
    """Dense, fragmented and empty windows of RAM; some video memory and a ROM."""
    source = np.random.default_rng(7)
    with Running() as guest:
        guest.put(0, source.bytes(8 * MIB))
        for page in source.integers(3000, 5000, 200).tolist():
            guest.put(page, source.bytes(PAGE))
        guest.put(5000, bytes(PAGE))  # there, and zero
        guest.video[PAGE * 3 :: 5000] = 7
        guest.rom[: 9 * PAGE] = 5
        yield guest


def archive(
    guest: Running, tier: str, folder: Path, *, options: WriteOptions = OPTIONS
) -> TierResult:
    if tier == "hot":
        return write_hot(guest, folder / "a.mig", options=options)
    return write_cold(guest, folder / "a.cold", options=options, level=1)


def check(tier: str, folder: Path, expected: dict[str, bytes]) -> None:
    """The oracle's word; of a cold image after it was made hot."""
    if tier == "cold":
        with open_cold(folder / "a.cold") as contents:
            write_hot(contents, folder / "a.mig", options=OPTIONS)
    check_image(folder / "a.mig", expected)


def change_everything(guest: Running) -> None:
    """One of each: other bytes, zeros, holes, and data where there were holes."""
    guest.put(7, b"\1" * PAGE)
    guest.put(100, bytes(20 * PAGE))
    guest.punch(1024, 1024)
    guest.punch(4000, 3)
    guest.put(5000, b"\2" * PAGE)
    guest.put(9000, b"\3" * PAGE)
    guest.put(RAM_BYTES // PAGE - 1, b"\4" * PAGE)
    guest.video[:] = 0
    guest.video[-1] = 9
    guest.rom[PAGE:] = 0


@BOTH
def test_what_changed_meanwhile_is_copied_again(guest: Running, tmp_path: Path, tier: str) -> None:
    guest.at_last = lambda: change_everything(guest)
    result = archive(guest, tier, tmp_path)
    assert left_in(tmp_path) == [Path(result.path).name, f"{Path(result.path).name}.manifest.json"]
    check(tier, tmp_path, guest.now())


@BOTH
@pytest.mark.parametrize("left", [0, 1])
def test_a_guest_that_became_all_zero(guest: Running, tmp_path: Path, tier: str, left: int) -> None:
    """And one that was all zero, and is not any more."""

    def wipe() -> None:
        guest.punch(0, RAM_BYTES // PAGE)
        guest.video[:] = 0
        guest.rom[:] = 0
        guest.rom[:left] = 1

    if left:
        before = guest.now()
        wipe()

        def come_back() -> None:
            guest.put(0, before["pc.ram"])
            guest.video[:] = np.frombuffer(before["vga"], np.uint8)

        guest.at_last = come_back
    else:
        guest.at_last = wipe
    archive(guest, tier, tmp_path)
    check(tier, tmp_path, guest.now())


def test_only_pieces_that_changed_are_written_again(guest: Running, tmp_path: Path) -> None:
    """Of 40 MiB one page changed: 64 KiB more are written, not a window."""
    before = archive(guest, "hot", tmp_path).written_bytes
    guest.at_last = lambda: guest.put(7, b"\1" * PAGE)
    assert archive(guest, "hot", tmp_path).written_bytes - before == 64 << 10
    check("hot", tmp_path, guest.now())


def test_frames_that_are_given_up_take_no_room(guest: Running, tmp_path: Path) -> None:
    """Every window changed: the first frames' places are holes, and no frame lies there."""

    def touch() -> None:
        for page in range(0, 2048, 512):
            guest.put(page, b"\1")

    guest.at_last = touch
    result = archive(guest, "cold", tmp_path)
    index_bytes = 64 << 10
    frames = result.manifest.frame_bytes  # type: ignore[union-attr]
    assert result.file_bytes > 2 * 8 * MIB, "the guest's data does not compress"
    assert result.allocated_bytes < frames + index_bytes
    check("cold", tmp_path, guest.now())


class Meddler(PwriteEngine):
    """While it writes, the guest's memory is another; afterwards it is what it was."""

    meddled = 0

    def __init__(self, memory: NDArray[np.uint8], fd: int, operation: Operation, depth: int):
        super().__init__(fd, operation, depth)
        self._memory = memory

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        Meddler.meddled += 1
        self._memory ^= 0xFF
        try:
            return super().reap(wait_count=wait_count, timeout_ns=timeout_ns)
        finally:
            self._memory ^= 0xFF


def test_memory_that_changes_and_changes_back_while_it_is_written(
    guest: Running, tmp_path: Path
) -> None:
    """A-B-A: the digest is of the bytes that go to the disk, not of those that are there again."""
    theirs = np.frombuffer(mmap.mmap(guest.fd, RAM_BYTES), np.uint8)[: 8 * MIB]
    choice = EngineChoice("meddling", lambda *its: Meddler(theirs, *its))
    options = WriteOptions(channels=1, depth=4, block_size=MIB, dense_up_to=256 << 10)
    before = Meddler.meddled
    write_hot(guest, tmp_path / "a.mig", options=options, engine=choice)
    assert Meddler.meddled > before
    check("hot", tmp_path, guest.now())


@BOTH
def test_the_rate_holds_for_the_first_pass_only(guest: Running, tmp_path: Path, tier: str) -> None:
    """Everything changes, and is copied again as fast as it goes while the guest stands still."""
    source = np.random.default_rng(8)
    guest.at_last = lambda: guest.put(0, source.bytes(8 * MIB))
    options = WriteOptions(rate=4 * MIB, dense_up_to=256 << 10)
    result = archive(guest, tier, tmp_path, options=options)
    assert 0 < guest.stood_still < result.seconds / 2
    check(tier, tmp_path, guest.now())


def test_the_level_holds_while_the_guest_runs(guest: Running, tmp_path: Path) -> None:
    """Compressed again while it stands still, everything takes a small part of the time."""
    source = np.random.default_rng(8)
    guest.at_last = lambda: guest.put(0, source.bytes(8 * MIB))
    result = write_cold(guest, tmp_path / "a.cold", options=OPTIONS, level=19)
    assert 0 < guest.stood_still < result.seconds / 2
    check("cold", tmp_path, guest.now())


@BOTH
def test_a_long_copy_is_followed_by_a_round_while_the_guest_runs(
    guest: Running, tmp_path: Path, tier: str
) -> None:
    """What changed during the first round is copied before the guest stands still."""
    source = np.random.default_rng(9)
    written: list[int] = []
    changed: list[bool] = []

    def watch(snapshot: Snapshot) -> None:
        if not changed and snapshot.completed_bytes > 6 * MIB:
            guest.put(0, source.bytes(2 * MIB))
            changed.append(True)
        written.append(snapshot.completed_bytes)

    guest.at_last = lambda: written.append(-1)
    options = WriteOptions(channels=1, rate=8 * MIB, block_size=MIB, dense_up_to=256 << 10)
    write = write_hot if tier == "hot" else write_cold
    path = tmp_path / ("a.mig" if tier == "hot" else "a.cold")
    result = write(guest, path, options=options, progress=watch)
    running, standing = written[: written.index(-1)], written[written.index(-1) + 1 :]
    assert running[-1] >= 8 * MIB + (2 if tier == "hot" else 4) * MIB
    assert standing[-1] == running[-1] == result.written_bytes
    check(tier, tmp_path, guest.now())


@BOTH
def test_one_that_stands_still_is_copied_once(guest: Running, tmp_path: Path, tier: str) -> None:
    guest.ran = False
    archive(guest, tier, tmp_path)
    once = guest.now()
    check(tier, tmp_path, once)


@BOTH
def test_somebody_let_the_guest_go_on(guest: Running, tmp_path: Path, tier: str) -> None:
    """What the contents say at the end of the standstill counts: nothing is published."""

    def refuse() -> None:
        raise PeerError("it ran")

    guest.meddle = refuse
    with pytest.raises(PeerError, match="it ran"):
        archive(guest, tier, tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_pages_shared_with_an_earlier_image(guest: Running, tmp_path: Path, kind: str) -> None:
    """What changed gets blocks of its own, in both passes; the rest stays shared."""
    with mounted(kind, tmp_path, size=512 * MIB) as disk:
        guest.ran = False
        first = write_hot(guest, disk / "first.mig", options=OPTIONS)
        before = guest.now()
        guest.ran = True
        guest.put(1500, b"\5" * PAGE)
        guest.at_last = lambda: change_everything(guest)
        result = write_hot(guest, disk / "a.mig", options=OPTIONS, previous=Path(first.path))
        assert not result.warnings
        assert 0 < result.allocated_bytes - result.shared_bytes < MIB
        check("hot", disk, guest.now())
        check_image(disk / "first.mig", before)
