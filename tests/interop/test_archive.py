"""A real guest from an archive into a real QEMU: it remembers, or it does not start."""

from __future__ import annotations

from pathlib import Path

import pytest
from archiveentries import flip
from commandline import uringmig
from realguest import GUEST_BYTES, SavedGuest, StartMachine

from uringmig import MappedRamReader
from uringmig.archive.cold import write_cold
from uringmig.archive.copied import EntryLabel
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.archive.hot import write_hot
from uringmig.contents.opening import open_contents
from uringmig.image.manifest import Tier

TIERS = pytest.mark.parametrize("tier", ["hot", "cold"])


@pytest.fixture(scope="module")
def archived(
    saved_guest: SavedGuest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Tier, Entry]:
    """The guest that QEMU saved, in both tiers of one archive."""
    with Archive.open(tmp_path_factory.mktemp("archive"), write=True) as archive:
        entries: dict[Tier, Entry] = {}
        tiers: tuple[Tier, ...] = ("hot", "cold")
        for tier in tiers:
            image = archive.place(tier, tier).image
            label = EntryLabel(name=tier, vm="guest", host="here")
            with open_contents(saved_guest.image) as contents:
                (write_hot if tier == "hot" else write_cold)(contents, image, label=label)
            entries[tier] = archive.add(image)
    return entries


def test_both_tiers_are_of_one_guest(archived: dict[Tier, Entry]) -> None:
    assert archived["hot"].content_digest == archived["cold"].content_digest
    assert archived["cold"].file_bytes < archived["hot"].file_bytes


@TIERS
def test_guest_remembers_and_goes_on(
    archived: dict[Tier, Entry], saved_guest: SavedGuest, start_machine: StartMachine, tier: Tier
) -> None:
    machine = start_machine(memory_bytes=GUEST_BYTES, guest=saved_guest.guest, incoming=True)
    folder = Path(archived[tier].image).parent
    done = uringmig(
        "archive", "restore", folder, tier, "--qmp", machine.qmp_path, "--then", "cont", "--json"
    )
    assert done.code == 0, done.err
    assert done.result()["run_state"] == "running"
    assert done.result()["digests_checked"] > 0
    assert machine.console.digest() == saved_guest.digest
    assert machine.console.count() >= saved_guest.count


@TIERS
def test_damaged_entry_starts_no_guest(
    archived: dict[Tier, Entry], saved_guest: SavedGuest, start_machine: StartMachine, tier: Tier
) -> None:
    machine = start_machine(memory_bytes=GUEST_BYTES, guest=saved_guest.guest, incoming=True)
    entry = archived[tier]
    # Somewhere in the middle of what is stored: the guest's random bytes lie around it.
    offset = entry.file_bytes // 2 if tier == "cold" else _stored_offset(entry)
    flip(entry.image, offset)
    try:
        done = uringmig(
            "archive", "restore", Path(entry.image).parent, tier, "--qmp", machine.qmp_path,
            "--then", "cont",
        )  # fmt: skip
    finally:
        flip(entry.image, offset)
    assert (done.code, done.out) == (3, "")
    assert "ramblock 'pc.ram'" in done.err
    assert machine.monitor.run_state() == "inmigrate"


def _stored_offset(entry: Entry) -> int:
    """Offset of a page in the middle of a hot image's RAM whose bit is set."""
    with MappedRamReader(entry.image) as reader:
        block = next(block for block in reader.blocks if block.idstr == "pc.ram")
        packed = reader.bitmap("pc.ram")
        middle = next(at for at in range(len(packed) // 2, len(packed)) if packed[at] == 0xFF)
        return block.layout.pages_offset + middle * 8 * 4096 + 5
