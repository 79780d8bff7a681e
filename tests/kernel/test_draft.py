"""The end of an image: in which order, over whatever the file held, and never a name too early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from imagereader import read_image
from smallguests import MIB, PAGE

from uringmig import FileMemory, MappedRamWriter, RamBlock, StorageError, WriteOptions
from uringmig.format.device_state import DeviceState
from uringmig.format.layout import plan_layout
from uringmig.image.draft import ImageDraft, make_durable
from uringmig.memory.mapping import create_memfd
from uringmig.storage.mainfile import MainFile
from uringmig.writer import MACHINE_NONE

LAYOUT = plan_layout(MACHINE_NONE, [("ram", MIB), ("rom", 2 * PAGE)], section_id=1)
TAIL = DeviceState.empty().tail


class Recorded(MainFile):
    """A real file that remembers what was done to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT), str(path))
        self.steps: list[str] = []
        self.sync_fails = False

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        super().write_at(offset, data)
        self.steps.append(f"write {offset}")

    def set_size(self, size: int) -> None:
        super().set_size(size)
        self.steps.append(f"size {size}")

    def sync(self) -> None:
        if self.sync_fails:
            raise StorageError("fdatasync failed", path=self.path)
        super().sync()
        self.steps.append("sync")

    def publish(self, sidecar: bytes | None) -> str | None:
        self.steps.append("publish")
        return None

    def tell(self, phase: str) -> None:
        self.steps.append(f"tell {phase}")


@pytest.fixture
def main(tmp_path: Path) -> Iterator[Recorded]:
    file = Recorded(tmp_path / "vm")
    yield file
    file.close()


def draft_of(main: MainFile) -> ImageDraft:
    return ImageDraft(main, MACHINE_NONE, LAYOUT, section_id=1)


def bitmaps(*, first: int = 0) -> list[np.ndarray]:
    made = [np.zeros(block.bitmap_bytes, np.uint8) for block in LAYOUT.blocks]
    made[0][0] = first
    return made


def test_everything_is_written_before_the_sync_and_nothing_after_it(main: Recorded) -> None:
    """A name promises what the disk has: bitmaps and device state too, which come last of all.

    Synced before them, a power cut would leave a whole file whose pages nobody can find.
    """
    draft = draft_of(main)
    draft.begin()
    main.steps.clear()
    finished = draft.finish(bitmaps(first=1), TAIL, tell=main.tell, publish=main.publish)
    finished.durable.publish(None)
    told = [step for step in main.steps if step.startswith("tell")]
    assert told == ["tell bitmaps", "tell devices", "tell sync", "tell publish"]
    ends = [main.steps.index(step) for step in ("tell sync", "sync", "tell publish", "publish")]
    assert ends == sorted(ends)
    writes = [number for number, step in enumerate(main.steps) if step.startswith("write")]
    assert max(writes) < ends[0]
    for block in LAYOUT.blocks:
        assert f"write {block.bitmap_offset}" in main.steps
    # The stream names the bitmaps and makes the file an image: so not before they are there.
    assert main.steps.index("write 0") > main.steps.index("tell devices")
    assert read_image(Path(main.path)).blocks[0].bits == (0,)


@pytest.mark.parametrize("phase", ["bitmaps", "devices", "sync", "publish"])
def test_who_looks_on_may_end_it_in_every_phase(main: Recorded, phase: str) -> None:
    def tell(now: str) -> None:
        if now == phase:
            raise RuntimeError(now)

    draft = draft_of(main)
    draft.begin()
    with pytest.raises(RuntimeError, match=phase):
        draft.finish(bitmaps(first=1), TAIL, tell=tell, publish=main.publish)
    assert "publish" not in main.steps


def test_what_cannot_be_synced_gets_no_name(main: Recorded) -> None:
    main.sync_fails = True
    with pytest.raises(StorageError, match="fdatasync"):
        make_durable(main, main.tell, main.publish)
    assert main.steps == ["tell sync"]


def test_any_file_is_durable_before_it_can_have_a_name(main: Recorded) -> None:
    """As a cold image or a plain stream ends: there is no way to a name but through the sync."""
    main.write_at(0, b"frames and index")
    make_durable(main, main.tell, main.publish).publish(None)
    assert main.steps == ["write 0", "tell sync", "sync", "tell publish", "publish"]


def test_empty_guest_is_zero_over_whatever_the_slots_hold(main: Recorded) -> None:
    """The one bit that an empty guest's image has stands over a page of zeros, written for it.

    In the slots may lie an earlier round, an interrupted copy, or an earlier image's pages.
    """
    main.write_at(0, b"\xee" * LAYOUT.trailer_offset)
    main.write_at(0, bytes(LAYOUT.blocks[0].pages_offset))
    draft = draft_of(main)
    draft.begin(keep=True)
    bits = bitmaps()
    finished = draft.finish(bits, TAIL, tell=main.tell, publish=main.publish)
    assert finished.pages_set == (1, 0)
    assert bits[0][0] == 1
    with Path(main.path).open("rb") as file:
        file.seek(LAYOUT.blocks[0].pages_offset)
        assert file.read(2 * PAGE) == bytes(PAGE) + b"\xee" * PAGE


def test_fresh_draft_keeps_nothing_but_what_lies_before_it(tmp_path: Path) -> None:
    """Every slot reads as zeros, also where the file was longer and full before."""
    base = 3 * MIB + 512
    layout = plan_layout(MACHINE_NONE, [("ram", MIB)], section_id=1, base=base)
    main = MainFile(os.open(tmp_path / "vm", os.O_RDWR | os.O_CREAT), "vm")
    main.write_at(0, b"\xee" * (8 * MIB))
    ImageDraft(main, MACHINE_NONE, layout, section_id=1).begin()
    assert main.size == layout.trailer_offset
    assert main.read_at(0, base) == b"\xee" * base
    assert not any(main.read_at(base, main.size))
    main.close()


@pytest.mark.parametrize("base", [0, 3 * MIB + 512])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", ["zeros", "holes", "one page"])
def test_file_that_was_full_before_shows_through_nowhere(
    tmp_path: Path, base: int, dense: bool, kind: str
) -> None:
    """Descriptors may be of a file with other bytes: holes of dense memory are written nowhere."""
    path = tmp_path / "vm"
    path.write_bytes(b"\xee" * (base + 4 * MIB))
    memfd = create_memfd("ram", MIB)
    memory = FileMemory(memfd, writable=True)
    if kind == "zeros":
        memory.view[:] = 0
    if kind == "one page":
        memory.view[5 * PAGE] = 1
    direct, main = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDWR)
    with MappedRamWriter.on_descriptors(
        direct,
        main,
        [RamBlock("ram", memory, dense=dense)],
        options=WriteOptions(channels=1),
        base=base,
    ) as writer:
        writer.write_all()
        writer.finish()
    image = read_image(path, base=base)
    assert image.contents["ram"] == memory.view.tobytes()
    assert path.read_bytes()[:base] == b"\xee" * base
    memory.close()
    for fd in (direct, main, memfd):
        os.close(fd)
