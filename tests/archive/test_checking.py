"""Verification of an archive: rot by its place, passes that go on, a page cache left alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from archiveentries import add_cold_entry, add_entry, flip, place_of
from loopdisk import mounted, run
from pagecache import drop, resident_bytes
from smallguests import MIB

from uringmig import progress
from uringmig.archive import checking
from uringmig.archive.checking import ArchiveCheck, verify_archive
from uringmig.archive.damagenotes import STREAM_CHUNK
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.errors import StateError
from uringmig.options import EngineName, ReadOptions
from uringmig.progress import Snapshot
from uringmig.storage.engine import Engine
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import Completions, IoBatch

#: Three windows of RAM, then one of video memory and one of ROM.
RAM = 9 * MIB
CHUNKS = 5
TIERS = pytest.mark.parametrize("add", [add_entry, add_cold_entry], ids=["hot", "cold"])

Add = Callable[..., Entry]


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(tmp_path / "a", write=True) as archive:
        yield archive


@TIERS
def test_whole_entry_is_good(archive: Archive, add: Add) -> None:
    add(archive, "one", ram_bytes=RAM)
    report = verify_archive(archive)
    [check] = report.entries
    assert (check.chunks, check.checked_chunks, check.pass_ended) == (CHUNKS, CHUNKS, True)
    assert report.checked_bytes == RAM + MIB + (128 << 10)
    assert (report.damaged, report.not_reached, report.notes) == (0, (), ())
    assert archive.find("one").condition == "good"


@TIERS
@pytest.mark.parametrize("chunk", [0, 2, 3])
def test_flipped_bit_is_found_by_its_place(archive: Archive, add: Add, chunk: int) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    add(archive, "other")
    offset, told = place_of(entry, chunk)
    flip(entry.image, offset)
    report = verify_archive(archive)
    assert report.damaged == 1
    [damage] = next(check for check in report.entries if check.name == "one").damage
    assert damage.chunk == chunk
    idstr = ["pc.ram", "pc.ram", "pc.ram", "vga.vram", "pc.rom"][chunk]
    row = chunk if chunk < 3 else 0
    assert damage.text.startswith(f"ramblock {idstr!r}: ")
    assert f"chunk {row} (guest bytes from {row * 4 * MIB:#x}) at offset {told}" in damage.text
    assert archive.find("one").condition == "damaged"
    assert archive.find("other").condition == "good"
    assert archive.damage("one") == [damage]
    # What is put right again is good again.
    flip(entry.image, offset)
    assert verify_archive(archive).damaged == 0
    assert archive.find("one").condition == "good"
    assert archive.damage("one") == []


@TIERS
def test_every_damage_is_found(archive: Archive, add: Add) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    for chunk in (0, 2, 4):
        flip(entry.image, place_of(entry, chunk)[0])
    [check] = verify_archive(archive).entries
    assert sorted(damage.chunk for damage in check.damage) == [0, 2, 4]
    assert check.checked_chunks == CHUNKS


@TIERS
def test_damage_outside_the_memory_is_found(archive: Archive, add: Add) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    # The last byte belongs to the device state of a hot image, to the index of a cold one.
    flip(entry.image, entry.file_bytes - 1)
    report = verify_archive(archive)
    [damage] = report.entries[0].damage
    assert damage.chunk == STREAM_CHUNK
    assert archive.find("one").condition == "damaged"
    flip(entry.image, entry.file_bytes - 1)
    assert verify_archive(archive).damaged == 0
    assert archive.find("one").condition == "good"


@TIERS
def test_image_that_was_cut_or_is_gone_is_damaged(archive: Archive, add: Add) -> None:
    cut = add(archive, "cut", ram_bytes=RAM)
    add(archive, "whole", ram_bytes=RAM)
    os.truncate(cut.image, cut.file_bytes // 2)
    report = verify_archive(archive)
    assert report.damaged == 1
    assert archive.find("cut").condition == "damaged"
    assert archive.find("whole").condition == "good"


def test_manifest_that_rotted_is_damage(archive: Archive) -> None:
    entry = add_entry(archive, "one", ram_bytes=RAM)
    text = Path(entry.manifest).read_text()
    start = text.index('"digests": [') + len('"digests": [')
    first = text.index('"', start) + 1
    changed = text[:first] + ("0" if text[first] != "0" else "1") + text[first + 1 :]
    Path(entry.manifest).write_text(changed)
    [check] = verify_archive(archive).entries
    # One window differs from its digest, and the digests from that of the whole guest.
    assert sorted(damage.chunk for damage in check.damage) == [STREAM_CHUNK, 0]


class BadSectors:
    """An engine over a disk on which some bytes of the file cannot be read any more."""

    def __init__(self, inner: Engine, start: int, end: int) -> None:
        self.depth = inner.depth
        self._inner = inner
        self._range = start, end
        self._failed: list[int] = []

    def submit(self, batch: IoBatch) -> None:
        start, end = self._range
        bad = (batch.file_offset < end) & (batch.file_offset + batch.length > start)
        self._failed += batch.token[bad].tolist()
        good = ~bad
        if good.any():
            self._inner.submit(
                IoBatch(
                    batch.address[good],
                    batch.length[good],
                    batch.file_offset[good],
                    batch.token[good],
                )
            )

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        failed, self._failed = self._failed, []
        if failed:
            result = np.full(len(failed), -errno.EIO, np.int64)
            return Completions(np.array(failed, np.int64), result)
        return self._inner.reap(wait_count=wait_count, timeout_ns=timeout_ns)

    def close(self) -> None:
        self._inner.close()


@TIERS
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunk_that_cannot_be_read_is_damage_and_the_rest_is_looked_at(
    archive: Archive, add: Add, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    offset, _ = place_of(entry, chunk)

    def bad(_: EngineName) -> EngineChoice:
        return EngineChoice(
            "pwrite",
            lambda fd, operation, depth: BadSectors(
                PwriteEngine(fd, operation, depth), offset, offset + 512
            ),
        )

    for module in ("uringmig.reader", "uringmig.archive.coldread"):
        monkeypatch.setattr(f"{module}.choose_engine", bad)
    [check] = verify_archive(archive).entries
    assert check.checked_chunks == CHUNKS
    [damage] = check.damage
    assert damage.chunk == chunk
    assert "EIO" in damage.text


def test_archive_that_cannot_be_written_is_verified_all_the_same(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, size=32 * MIB) as disk:
        with Archive.open(disk / "a", write=True) as archive:
            entry = add_entry(archive, "one", ram_bytes=RAM)
            flip(entry.image, place_of(entry, 1)[0])
        run("mount", "-o", "remount,ro", str(disk))
        with Archive.open(disk / "a", write=False) as reader:
            report = verify_archive(reader)
            assert [damage.chunk for damage in report.entries[0].damage] == [1]
            [note] = report.notes
            assert "cannot all be kept" in note
            assert reader.find("one").condition == "unchecked"
            assert reader.damage("one") == []


# Passes that go on.


def checked(report: ArchiveCheck) -> list[tuple[str, int, bool]]:
    return [(check.name, check.checked_chunks, check.pass_ended) for check in report.entries]


@TIERS
def test_shares_add_up_to_a_pass(archive: Archive, add: Add) -> None:
    entry = add(archive, "one", ram_bytes=RAM)
    flip(entry.image, place_of(entry, 3)[0])
    assert checked(verify_archive(archive, share=0.4)) == [("one", 2, False)]
    assert (archive.find("one").condition, archive.find("one").verify_cursor) == ("unchecked", 2)
    report = verify_archive(archive, share=0.4)
    assert checked(report) == [("one", 2, False)]
    assert [damage.chunk for damage in report.entries[0].damage] == [3]
    assert checked(verify_archive(archive, share=0.4)) == [("one", 1, True)]
    assert archive.find("one").condition == "damaged"
    flip(entry.image, place_of(entry, 3)[0])
    for _ in range(2):
        verify_archive(archive, share=0.4)
    assert archive.find("one").condition == "unchecked", "the place is good, the pass goes on"
    verify_archive(archive, share=0.4)
    assert archive.find("one").condition == "good"


def test_time_limit_stops_and_goes_on_there(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is out of time after one slice of two chunks; nothing is looked at twice."""
    monkeypatch.setattr(checking, "_SLICE_CHUNKS", 2)
    for name, day in (("a", 1), ("b", 2)):
        add_entry(archive, name, ram_bytes=RAM, created=f"2026-01-0{day}T00:00:00+00:00")
    runs = [verify_archive(archive, seconds=1e-9) for _ in range(7)]
    assert [checked(run)[0] for run in runs] == [
        ("a", 2, False), ("a", 2, False), ("a", 1, True),
        ("b", 2, False), ("b", 2, False), ("b", 1, True),
        ("a", 2, False),
    ]  # fmt: skip
    assert runs[0].not_reached == ("b",)
    assert archive.find("b").condition == "good"
    # Without a limit all is looked at, from the first chunk.
    assert sorted(checked(verify_archive(archive))) == [("a", CHUNKS, True), ("b", CHUNKS, True)]


def test_run_that_is_killed_goes_on_where_the_catalogue_says(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_SLICE_CHUNKS", 1)
    monkeypatch.setattr(checking, "_KEEP_SECONDS", 0)
    monkeypatch.setattr(progress, "_INTERVAL_SECONDS", 0)
    add_entry(archive, "one", ram_bytes=RAM)

    def die(snapshot: Snapshot) -> None:
        if snapshot.finished_bytes > 5 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_archive(archive, progress=die)
    assert archive.find("one").verify_cursor == 1
    assert checked(verify_archive(archive, share=1)) == [("one", CHUNKS - 1, True)]


def test_entries_by_name_and_wrong_arguments(archive: Archive) -> None:
    for name in ("a", "b"):
        add_entry(archive, name)
    assert [check.name for check in verify_archive(archive, names=["b"]).entries] == ["b"]
    with pytest.raises(StateError, match="no entry 'c'"):
        verify_archive(archive, names=["c"])
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(StateError, match="share"):
            verify_archive(archive, share=share)
    with pytest.raises(StateError, match="time limit"):
        verify_archive(archive, seconds=0)


def test_progress_counts_what_was_compared(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_SECONDS", 0)
    entry = add_entry(archive, "one", ram_bytes=RAM)
    seen: list[Snapshot] = []
    verify_archive(archive, progress=seen.append)
    finished = [snapshot.finished_bytes for snapshot in seen]
    assert finished == sorted(finished)
    assert (finished[-1], seen[-1].total_bytes) == (entry.memory_bytes, entry.memory_bytes)
    assert seen[-1].share == 1.0


def test_entry_removed_meanwhile_is_no_damage(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_SECONDS", 0)
    for name, day in (("a", 1), ("b", 2)):
        add_entry(archive, name, created=f"2026-01-0{day}T00:00:00+00:00")

    def prune(_: Snapshot) -> None:
        if archive.has("b"):
            archive.remove("b")

    with Archive.open(archive.path, write=False) as reader:
        report = verify_archive(reader, progress=prune)
    assert [check.name for check in report.entries] == ["a"]
    assert report.damaged == 0
    assert [entry.name for entry in archive.entries()] == ["a"]


# The page cache.


@TIERS
def test_page_cache_stays_clean(archive: Archive, add: Add) -> None:
    entry = add(archive, "one", ram_bytes=24 * MIB)
    drop(entry.image)
    report = verify_archive(archive, options=ReadOptions(direct="required"))
    assert report.damaged == 0
    assert resident_bytes(entry.image) < MIB
    Path(entry.image).read_bytes()
    assert resident_bytes(entry.image) > 8 * MIB, "the measure sees what is cached"
