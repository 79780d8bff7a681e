"""kill -9 of a copy into an archive: no half image has a name, and the next copy goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from copyserver import CopyServer
from loopdisk import mounted
from smallguests import MIB, OPTIONS, PAGE, check_image, copy_of, left_in, make_guest, ramblocks_of

from uringmig import MappedRamWriter, verify
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.copied import TierResult
from uringmig.archive.copyjournal import decode
from uringmig.archive.hot import write_hot
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import Row, WindowRead, all_rows, row_length
from uringmig.options import WINDOW_BYTES

Tier = Literal["hot", "cold"]
TIERS = pytest.mark.parametrize("tier", ["hot", "cold"])


class Counted(MappedRamContents):
    """Contents that remember what they were asked for."""

    asked: Sequence[Row] = ()

    def windows(self, rows: Sequence[Row]) -> Generator[WindowRead, None, None]:
        self.asked = list(rows)
        return super().windows(rows)


@pytest.fixture(scope="module")
def server() -> Iterator[CopyServer]:
    with CopyServer() as running:
        yield running


class Place:
    """A source image, and where it is archived."""

    def __init__(self, folder: Path, tier: Tier, *, ram_bytes: int, dense: bool) -> None:
        self.tier: Tier = tier
        self.source = folder / "source.mig"
        self.archive = folder / "archive"
        self.out = self.archive / "vm"
        self.journal = self.archive / "vm.journal"
        self.archive.mkdir()
        guest = make_guest(ram_bytes=ram_bytes)
        if dense:  # fewer and longer requests
            for memory in guest.values():
                memory[memory == 0] = 1
        else:  # a window that costs nothing to read
            guest["pc.ram"][8 * MIB : 12 * MIB] = 0
        with MappedRamWriter(self.source, ramblocks_of(guest), options=OPTIONS) as writer:
            writer.write_all()
            writer.finish()
        self.guest = copy_of(guest)

    def kill_after_a_checkpoint(self, server: CopyServer, **more: str | int) -> None:
        """Begin a slow copy, and kill it when its journal has chunks."""
        pid = server.start(**self.order(rate=24 * MIB), **more)
        while not (self.journal.exists() and self.journal.stat().st_size > 1000):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert server.end() == -signal.SIGKILL

    def order(self, **more: str | int) -> dict[str, str | int]:
        paths = {"source": str(self.source), "out": str(self.out), "journal": str(self.journal)}
        return {"tier": self.tier, **paths, **more}

    def copy(self) -> tuple[TierResult, Sequence[Row]]:
        """Copy to the end, in this process; also the rows that were read."""
        write = write_hot if self.tier == "hot" else write_cold
        with Counted(self.source) as contents:
            result = write(contents, self.out, options=OPTIONS, resume=self.journal)
            return result, contents.asked

    def check(self) -> None:
        """The image is whole, page for page."""
        path = self.out
        if self.tier == "cold":
            path = self.archive.parent / "back.mig"
            with open_cold(self.out) as contents:
                write_hot(contents, path, options=OPTIONS)
        check_image(path, self.guest)

    def length_of(self, rows: Sequence[Row]) -> int:
        """Bytes of guest memory in some rows."""
        with MappedRamContents(self.source) as contents:
            return sum(row_length(contents.blocks[block], row) for block, row in rows)

    def clear(self) -> None:
        for name in left_in(self.archive):
            (self.archive / name).unlink()


@TIERS
def test_killed_at_every_single_step(tmp_path: Path, server: CopyServer, tier: Tier) -> None:
    place = Place(tmp_path, tier, ram_bytes=6 * MIB, dense=True)
    steps, _, resumed = kill_at_every_step(place, server)
    assert steps > 20
    assert resumed, "never killed after a checkpoint"
    place.clear()
    _, published, _ = kill_at_every_step(place, server, since="rename")
    assert published, "never killed between the rename and the end"


def kill_at_every_step(place: Place, server: CopyServer, **since: str) -> tuple[int, int, int]:
    """Kill a copy at its first call, another at its second, until one comes to its end.

    Returns:
        How many were killed, how many of them when the image had its name, and how many of the
        next copies went on where the killed one had been.
    """
    allowed = {"vm.partial", "vm.journal", "vm.manifest.json.partial"}
    step, published, resumed = 0, 0, 0
    while True:
        step += 1
        server.start(**place.order(step=step, **since))
        code = server.end()
        if code == 0:
            return step - 1, published, resumed
        assert code == -signal.SIGKILL
        if place.out.exists():
            published += 1
            place.check()
            assert set(left_in(place.archive)) <= {"vm", "vm.manifest.json"} | allowed
        else:
            assert set(left_in(place.archive)) <= allowed
        result, asked = place.copy()
        resumed += bool(result.resumed_bytes)
        assert result.resumed_bytes + place.length_of(asked) == result.memory_bytes
        assert left_in(place.archive) == ["vm", "vm.manifest.json"]
        place.check()
        place.clear()


@TIERS
def test_killed_at_random_times_and_resumed(tmp_path: Path, server: CopyServer, tier: Tier) -> None:
    """Killed again and again, each time going on, until one copy comes to its end."""
    place = Place(tmp_path, tier, ram_bytes=48 * MIB, dense=False)
    source = random.Random(7)
    whole, _ = place.copy()
    expected = place.out.stat().st_size
    place.clear()
    resumed = []
    for _ in range(4):
        kills = 0
        while True:
            pid = server.start(**place.order(rate=24 * MIB))
            time.sleep(source.uniform(0.1, 0.9))
            os.kill(pid, signal.SIGKILL)
            assert server.end() == -signal.SIGKILL
            assert not place.out.exists()
            kills += 1
            if kills == 2:
                break
        result, asked = place.copy()
        resumed.append(result.resumed_bytes)
        assert result.resumed_bytes + place.length_of(asked) == whole.memory_bytes
        # What was durable was neither read nor written again; it may have been holes alone.
        assert result.written_bytes <= whole.written_bytes
        if result.resumed_bytes > 4 * MIB:
            assert result.written_bytes < whole.written_bytes
        assert (place.out.stat().st_size == expected) or tier == "cold"
        place.check()
        place.clear()
    assert max(resumed) > 4 * MIB, "never killed after a checkpoint"
    assert len(set(resumed)) > 1


def start_anew_cases() -> dict[str, Callable[[Place], object]]:
    def overwrite(path: Path, at: int, data: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)

    def first_chunks(place: Place) -> int:
        return 16 + 4 + int.from_bytes(place.journal.read_bytes()[16:20], "big") + 16

    partial = "vm.partial"
    return {
        "source touched": lambda place: os.utime(place.source),
        "partial file gone": lambda place: (place.archive / partial).unlink(),
        "partial file of another copy": lambda place: overwrite(
            place.archive / partial, 16, bytes(16)
        ),
        "journal gone": lambda place: place.journal.unlink(),
        "journal of something else": lambda place: place.journal.write_bytes(b"anything"),
        "journal's header damaged": lambda place: overwrite(place.journal, 40, b"\xff"),
        "journal's first chunks damaged": lambda place: overwrite(
            place.journal, first_chunks(place) + 100, b"\xff"
        ),
    }


@TIERS
@pytest.mark.parametrize("case", start_anew_cases())
def test_what_does_not_fit_is_not_believed(
    tmp_path: Path, server: CopyServer, tier: Tier, case: str
) -> None:
    place = Place(tmp_path, tier, ram_bytes=24 * MIB, dense=False)
    place.kill_after_a_checkpoint(server)
    start_anew_cases()[case](place)
    result, _ = place.copy()
    assert result.resumed_bytes == 0
    place.check()
    assert left_in(place.archive) == ["vm", "vm.manifest.json"]


def test_other_level_starts_anew(tmp_path: Path, server: CopyServer) -> None:
    place = Place(tmp_path, "cold", ram_bytes=24 * MIB, dense=False)
    place.kill_after_a_checkpoint(server)
    with MappedRamContents(place.source) as contents:
        result = write_cold(contents, place.out, level=1, options=OPTIONS, resume=place.journal)
    assert result.resumed_bytes == 0
    place.check()


def test_journal_with_a_torn_end_goes_on_from_its_whole_records(
    tmp_path: Path, server: CopyServer
) -> None:
    place = Place(tmp_path, "hot", ram_bytes=24 * MIB, dense=False)
    place.kill_after_a_checkpoint(server)
    with place.journal.open("ab") as file:
        file.write(b"\0\0\0\xb8torn")
    result, _ = place.copy()
    assert result.resumed_bytes > 0
    place.check()


def test_killed_copy_with_shared_blocks_goes_on(tmp_path: Path, server: CopyServer) -> None:
    """Pages are compared with what lies in the new file, wherever the copy was killed."""
    with mounted("xfs", tmp_path, size=512 * MIB) as disk:
        place = Place(disk, "hot", ram_bytes=48 * MIB, dense=True)
        earlier = disk / "earlier.mig"
        other = {name: np.frombuffer(data, np.uint8).copy() for name, data in place.guest.items()}
        other["pc.ram"].reshape(-1, 4096)[::2] ^= 0xFF  # every second page is another one now
        with MappedRamWriter(earlier, ramblocks_of(other), options=OPTIONS) as writer:
            writer.write_all()
            writer.finish()
        place.kill_after_a_checkpoint(server, previous=str(earlier))
        with MappedRamContents(place.source) as contents:
            result = write_hot(
                contents, place.out, options=OPTIONS, resume=place.journal, previous=earlier
            )
        assert 0 < result.resumed_bytes < result.memory_bytes
        assert result.shared_bytes > 20 * MIB
        place.check()


def test_earlier_image_is_part_of_what_a_copy_is(tmp_path: Path, server: CopyServer) -> None:
    """Told to share with another image than the killed copy was, a copy begins anew.

    Going on it would be right page for page, but share nothing with the image it was told of.
    """
    with mounted("xfs", tmp_path, size=512 * MIB) as disk:
        place = Place(disk, "hot", ram_bytes=48 * MIB, dense=True)
        for name, flip in (("killed.mig", 0xFF), ("asked.mig", 0)):
            other = {
                idstr: np.frombuffer(data, np.uint8) ^ flip for idstr, data in place.guest.items()
            }
            with MappedRamWriter(disk / name, ramblocks_of(other), options=OPTIONS) as writer:
                writer.write_all()
                writer.finish()
        place.kill_after_a_checkpoint(server, previous=str(disk / "killed.mig"))
        with MappedRamContents(place.source) as contents:
            result = write_hot(
                contents,
                place.out,
                options=OPTIONS,
                resume=place.journal,
                previous=disk / "asked.mig",
            )
        assert result.resumed_bytes == 0
        assert result.written_bytes == 0
        assert result.shared_bytes == result.stored_bytes
        place.check()


@pytest.mark.parametrize("dense", [False, True])
def test_slots_outside_the_checkpoint_may_hold_anything(
    tmp_path: Path, server: CopyServer, dense: bool
) -> None:
    """Torn writes, gaps written through, older bytes: under a set bit lies what is copied now."""
    place = Place(tmp_path, "hot", ram_bytes=24 * MIB, dense=False)
    options = replace(OPTIONS, dense_up_to=64 * MIB if dense else OPTIONS.dense_up_to)
    more = {"dense_up_to": options.dense_up_to}
    place.kill_after_a_checkpoint(server, **more)
    durable = {
        (chunk.block_index, chunk.row) for chunk in decode(place.journal.read_bytes()).chunks
    }
    with MappedRamContents(place.source) as contents:
        areas = [block.pages_offset for block in contents.reader.image.blocks]
        others = [row for row in all_rows(contents.blocks) if row not in durable]
        with (place.archive / "vm.partial").open("r+b") as file:
            for number, row in others:
                file.seek(areas[number] + row * WINDOW_BYTES)
                file.write(b"\xee" * row_length(contents.blocks[number], row))
        result = write_hot(contents, place.out, options=options, resume=place.journal)
    assert others
    assert result.resumed_bytes > 0
    image = check_image(place.out, place.guest)
    if dense:
        assert all(len(block.bits) == block.used_length // PAGE for block in image.blocks)
    assert not verify(place.out).mismatches
