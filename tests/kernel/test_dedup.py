"""Images that share blocks with an earlier one, on real file systems with and without reflink."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from loopdisk import mounted
from smallguests import (
    MIB,
    OPTIONS,
    PAGE,
    Memories,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import MappedRamWriter, StorageError, verify
from uringmig.archive.hot import write_hot
from uringmig.archive.tier import TierResult
from uringmig.contents.mappedram import MappedRamContents

DISK_BYTES = 512 * MIB
REFLINK = pytest.mark.parametrize("kind", ["xfs", "btrfs"])


def dense_guest(*, ram_bytes: int) -> Memories:
    guest = make_guest(ram_bytes=ram_bytes)
    for memory in guest.values():
        memory[memory == 0] = 7
    return guest


def change(guest: Memories, share: float) -> int:
    """Write other bytes to a share of the pages of RAM, spread at random; how many pages."""
    source = np.random.default_rng(5)
    pages = guest["pc.ram"].reshape(-1, PAGE)
    chosen = source.permutation(len(pages))[: round(share * len(pages))]
    pages[chosen] ^= 0xFF
    return len(chosen)


def save(path: Path, guest: Memories) -> None:
    with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()


def archive(source: Path, out: Path, previous: Path | None) -> TierResult:
    with MappedRamContents(source) as contents:
        return write_hot(contents, out, options=OPTIONS, previous=previous)


def used(folder: Path) -> int:
    """Bytes of the file system that are taken, all its metadata included."""
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@REFLINK
def test_five_percent_changed_take_five_percent(tmp_path: Path, kind: str) -> None:
    guest = dense_guest(ram_bytes=96 * MIB)
    save(tmp_path / "first", guest)
    changed = change(guest, 0.05)
    save(tmp_path / "second", guest)
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        before = used(disk)
        result = archive(tmp_path / "second", disk / "2.mig", disk / "1.mig")
        taken = used(disk) - before
        check_image(disk / "2.mig", copy_of(guest))
        assert not verify(disk / "2.mig").mismatches
        assert not verify(disk / "1.mig").mismatches
        # Written: the pages that differ and nothing else.
        assert result.written_bytes == changed * PAGE
        stored = result.stored_bytes
        assert stored - result.shared_bytes < changed * PAGE + 4 * MIB
        assert result.shared_bytes <= stored - changed * PAGE
        # And what the disk says of it, extent maps and all.
        assert taken < changed * PAGE + 8 * MIB
        # The new image stands alone: the first may go.
        (disk / "1.mig").unlink()
        check_image(disk / "2.mig", copy_of(guest))


@REFLINK
def test_pages_that_became_zero_or_came_to_be(tmp_path: Path, kind: str) -> None:
    guest = make_guest(0)
    save(tmp_path / "first", guest)
    other = make_guest(1)  # has pages where the first has none, and the reverse
    other["vga.vram"][:] = guest["vga.vram"]
    other["pc.rom"][: PAGE * 3] = 0
    save(tmp_path / "second", other)
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        result = archive(tmp_path / "second", disk / "2.mig", disk / "1.mig")
        image = check_image(disk / "2.mig", copy_of(other))
        assert not verify(disk / "2.mig").mismatches
        check_image(disk / "1.mig", copy_of(guest))
        assert [len(block.bits) for block in image.blocks if block.idstr == "pc.rom"] == [32]
        assert result.shared_bytes >= PAGE * int(
            guest["vga.vram"].reshape(-1, PAGE).any(axis=1).sum()
        )


@REFLINK
def test_earlier_image_of_another_shape_shares_what_it_can(tmp_path: Path, kind: str) -> None:
    guest = dense_guest(ram_bytes=9 * MIB)
    save(tmp_path / "first", {"other": guest["vga.vram"], "pc.ram": guest["pc.ram"]})
    bigger = dense_guest(ram_bytes=13 * MIB)
    bigger["pc.ram"][: 9 * MIB] = guest["pc.ram"]
    save(tmp_path / "second", bigger)
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        result = archive(tmp_path / "second", disk / "2.mig", disk / "1.mig")
        check_image(disk / "2.mig", copy_of(bigger))
        assert result.shared_bytes == 9 * MIB


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_file_system_without_reflink_is_refused(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "first", make_guest(0))
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        with pytest.raises(StorageError, match=r"has no reflink.*; archive to xfs or btrfs"):
            archive(tmp_path / "first", disk / "2.mig", disk / "1.mig")
        assert {"1.mig", "1.mig.manifest.json"} == set(left_in(disk)) - {"lost+found"}


def test_earlier_image_on_another_file_system_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "first", make_guest(0))
    with (
        mounted("xfs", tmp_path, size=DISK_BYTES) as disk,
        pytest.raises(StorageError, match="is on another file system"),
    ):
        archive(tmp_path / "first", disk / "2.mig", tmp_path / "first")
