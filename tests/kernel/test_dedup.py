"""Images that share blocks with an earlier one, on real file systems with and without reflink."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from loopdisk import mounted, run
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

from uringmig import MappedRamWriter, RamBlock, StorageError, WriteOptions, verify
from uringmig.archive import dedup
from uringmig.archive.copied import TierResult
from uringmig.archive.dedup import sharing_trouble
from uringmig.archive.hot import write_hot
from uringmig.contents.mappedram import MappedRamContents
from uringmig.storage.mainfile import MainFile

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


@REFLINK
@pytest.mark.parametrize("dense", [False, True])
def test_guest_that_became_all_zero_is_zero_in_the_image(
    tmp_path: Path, kind: str, dense: bool
) -> None:
    """A set bit never stands over bytes of the earlier image that differ from the guest's.

    Neither in the one page that says that an empty guest's image is whole, nor in dense blocks,
    whose zero pages keep their bits.
    """
    options = WriteOptions(dense_up_to=9 * MIB if dense else 0)
    for name, value in (("first", 0x5A), ("second", 0)):
        ram = np.full(9 * MIB, value, np.uint8)
        with MappedRamWriter(tmp_path / name, [RamBlock("ram", ram, dense=False)]) as writer:
            writer.write_all()
            writer.finish()
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        for source, out, previous in (
            ("first", "1.mig", None), ("second", "2.mig", disk / "1.mig"),
        ):  # fmt: skip
            with MappedRamContents(tmp_path / source) as contents:
                write_hot(contents, disk / out, options=options, previous=previous)
        image = check_image(disk / "2.mig", {"ram": bytes(9 * MIB)})
        assert len(image.blocks[0].bits) == (9 * MIB // PAGE if dense else 1)
        assert not verify(disk / "2.mig").mismatches
        assert not verify(disk / "1.mig").mismatches


def check_whole(result: TierResult, guest: Memories, why: str) -> None:
    """A good image that shares nothing, and one warning that says why."""
    check_image(Path(result.path), copy_of(guest))
    assert not verify(result.path).mismatches
    assert result.shared_bytes == 0
    [warning] = result.warnings
    assert warning.startswith("the image is written whole, sharing nothing: ")
    assert why in warning
    assert "\n" not in warning


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_without_reflink_the_image_is_written_whole(tmp_path: Path, kind: str) -> None:
    """A missing backup is worse than a large one: dedup is an optimisation, and fails no copy."""
    guest = make_guest(0)
    save(tmp_path / "first", guest)
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        assert "has no reflink" in str(sharing_trouble(disk, None))
        archive(tmp_path / "first", disk / "1.mig", None)
        assert "has no reflink" in str(sharing_trouble(disk, disk / "1.mig"))
        result = archive(tmp_path / "first", disk / "2.mig", disk / "1.mig")
        check_whole(result, guest, "this file system has no reflink")
        assert set(left_in(disk)) - {"lost+found"} == {
            f"{name}{suffix}" for name in ("1.mig", "2.mig") for suffix in ("", ".manifest.json")
        }


@REFLINK
def test_an_earlier_image_of_no_use_is_left_alone(tmp_path: Path, kind: str) -> None:
    """On another file system, cut short, no image at all, or pruned meanwhile."""
    guest = make_guest(0)
    save(tmp_path / "first", guest)
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        assert sharing_trouble(disk, None) is None
        assert "another file system" in str(sharing_trouble(disk, tmp_path / "first"))
        result = archive(tmp_path / "first", disk / "2.mig", tmp_path / "first")
        check_whole(result, guest, "the earlier image is on another file system")
        assert sharing_trouble(disk, disk / "2.mig") is None
        (disk / "cut").write_bytes((disk / "2.mig").read_bytes()[:70000])
        (disk / "text").write_text("no image\n")
        for number, name in enumerate(["cut", "text", "gone"]):
            result = archive(tmp_path / "first", disk / f"o{number}.mig", disk / name)
            check_whole(result, guest, "")


def test_an_earlier_image_with_another_attribute_is_left_alone(tmp_path: Path) -> None:
    """After ``chattr +C`` of the folder new files are nodatacow, which the earlier one is not."""
    guest = make_guest(0)
    save(tmp_path / "first", guest)
    with mounted("btrfs", tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        run("chattr", "+C", str(disk))
        assert "chattr" in str(sharing_trouble(disk, disk / "1.mig"))
        result = archive(tmp_path / "first", disk / "2.mig", disk / "1.mig")
        check_whole(result, guest, "chattr +C")
        # These two are alike again.
        third = archive(tmp_path / "first", disk / "3.mig", disk / "2.mig")
        assert (third.warnings, third.shared_bytes > 0) == ((), True)


def test_areas_cloned_before_the_failure_are_holes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses the second of three areas: nothing of the first stays behind."""
    guest = dense_guest(ram_bytes=9 * MIB)
    save(tmp_path / "first", guest)
    other = {idstr: np.zeros_like(memory) for idstr, memory in guest.items()}
    other["pc.ram"][5 * MIB] = 1
    save(tmp_path / "second", other)
    really, asked = dedup._clone, []

    def clone_once(source: MainFile, offset: int, length: int, main: MainFile, to: int) -> None:
        asked.append(length)
        if len(asked) == 2:
            raise StorageError("cannot share blocks", errno=errno.ENOSPC, path=main.path)
        really(source, offset, length, main, to)

    with mounted("xfs", tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        monkeypatch.setattr(dedup, "_clone", clone_once)
        result = archive(tmp_path / "second", disk / "2.mig", disk / "1.mig")
        check_whole(result, other, "ENOSPC")
        assert asked[0] == 9 * MIB
        assert result.allocated_bytes < 2 * MIB


def rot(disk_file: Path, *pages: bytes) -> None:
    """Overwrite the only place of a disk at which each of these pages lies."""
    with disk_file.open("r+b") as image, mmap.mmap(image.fileno(), 0) as raw:
        for page in pages:
            at = raw.find(page)
            assert at > 0
            raw[at : at + PAGE] = bytes(PAGE)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def test_blocks_of_the_earlier_image_that_rotted_are_written_anew(tmp_path: Path) -> None:
    """What cannot be read cannot be compared either; that costs room, and no backup.

    Nor does rot come along under pages that are zero by now: the new image can be read from its
    first byte to its last, whichever way, and the next one shares all of it.
    """
    guest = dense_guest(ram_bytes=9 * MIB)
    save(tmp_path / "first", guest)
    starts = (MIB // 2, 3 * MIB // 2, 5 * MIB)
    rotten = [guest["pc.ram"][start:][:PAGE].tobytes() for start in starts]
    other = {idstr: memory.copy() for idstr, memory in guest.items()}
    other["pc.ram"][MIB // 2 :][:PAGE] = 0  # a page of a window, ...
    other["pc.ram"][MIB : 3 * MIB] = 0  # ... and whole windows
    save(tmp_path / "second", other)
    with mounted("btrfs", tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        os.sync()
        rot(tmp_path / "btrfs.disk", *rotten)
        with pytest.raises(OSError, match="Input/output error"):
            (disk / "1.mig").read_bytes()
        result = archive(tmp_path / "second", disk / "2.mig", disk / "1.mig")
        check_image(disk / "2.mig", copy_of(other))
        assert not verify(disk / "2.mig").mismatches
        assert result.shared_bytes > MIB
        [warning] = result.warnings
        assert "written anew where the earlier image cannot be read" in warning
        (disk / "2.mig").read_bytes()
        third = archive(tmp_path / "second", disk / "3.mig", disk / "2.mig")
        assert (third.warnings, third.written_bytes) == ((), 0)


@REFLINK
def test_nothing_of_the_earlier_image_stays_under_clear_bits(tmp_path: Path, kind: str) -> None:
    """A page that became zero takes no room, and keeps no blocks of an image that is pruned."""
    guest = make_guest(0)
    save(tmp_path / "first", guest)
    other = {idstr: memory.copy() for idstr, memory in guest.items()}
    other["pc.ram"].reshape(-1, PAGE)[::3] = 0
    other["pc.ram"][4 * MIB : 7 * MIB] = 0
    save(tmp_path / "second", other)
    with mounted(kind, tmp_path, size=DISK_BYTES) as disk:
        archive(tmp_path / "first", disk / "1.mig", None)
        result = archive(tmp_path / "second", disk / "2.mig", disk / "1.mig")
        assert (result.warnings, result.written_bytes) == ((), 0)
        data = (disk / "2.mig").read_bytes()
        for block in check_image(disk / "2.mig", copy_of(other)).blocks:
            length = len(other[block.idstr])
            # Byte for byte, whatever the bits say.
            assert data[block.pages_offset :][:length] == other[block.idstr].tobytes()
        sparse = archive(tmp_path / "second", disk / "alone.mig", None)
        assert result.allocated_bytes <= sparse.allocated_bytes + MIB
