"""However a copy ends early, what it has made durable is kept; what is of no use is not."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from smallguests import (
    MIB,
    OPTIONS,
    aligned,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import MappedRamWriter, RamBlock
from uringmig.archive import copyrun
from uringmig.archive.cold import write_cold
from uringmig.archive.copied import TierResult
from uringmig.archive.copyjournal import Chunk, JournalHeader, decode, encode_start
from uringmig.archive.hot import write_hot
from uringmig.archive.partialcopy import PartialCopy
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import Row, WindowRead
from uringmig.errors import FormatError, MismatchError, PeerError, StateError, StorageError
from uringmig.options import ReadOptions
from uringmig.progress import Snapshot
from uringmig.signals import Interrupted

TIERS = pytest.mark.parametrize("tier", ["hot", "cold"])
PASSING = [
    Interrupted(signal.SIGTERM),
    StorageError("write failed", errno=errno.ENOSPC),
    PeerError("QEMU has gone away"),
    MemoryError(),
]
HOPELESS = [FormatError("hostile"), MismatchError("damaged"), StateError("a mistake")]


class Copies:
    """Copies of one small image, with a checkpoint at every opportunity."""

    def __init__(self, folder: Path, tier: Literal["hot", "cold"]) -> None:
        guest = make_guest(ram_bytes=40 * MIB)
        self._write = write_hot if tier == "hot" else write_cold
        self._source = folder / "source.mig"
        with MappedRamWriter(self._source, ramblocks_of(guest), options=OPTIONS) as writer:
            writer.write_all()
            writer.finish()
        self.guest = copy_of(guest)
        self.archive = folder / "archive"
        self.archive.mkdir()
        self.journal = self.archive / "vm.journal"
        self.notes: tuple[str, ...] = ()

    def copy(
        self, failure: BaseException | None = None, *, early: bool = False, slowly: bool = False
    ) -> int:
        """Copy, or fail when something is durable; return the bytes that were gone on with.

        Slowly is with time for checkpoints.
        """

        def tell(snapshot: Snapshot) -> None:
            durable = self.journal.exists() and self.journal.stat().st_size > 1000
            if failure is not None and (early or durable):
                raise failure

        slowly = slowly or failure is not None
        options = replace(OPTIONS, rate=16 * MIB if slowly else 0)
        with MappedRamContents(self._source) as contents:
            result = self._write(
                contents, self.archive / "vm", options=options, resume=self.journal, progress=tell
            )
        self.notes = result.notes
        return result.resumed_bytes


@pytest.fixture(autouse=True)
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copyrun, "CHECKPOINT_BYTES", 1)


@TIERS
@pytest.mark.parametrize("failure", PASSING, ids=lambda error: type(error).__name__)
def test_next_copy_goes_on(
    tmp_path: Path, tier: Literal["hot", "cold"], failure: BaseException
) -> None:
    """A signal, a full disk, a peer that left: twice, and the copy is right in the end."""
    copies = Copies(tmp_path, tier)
    for _ in range(2):
        with pytest.raises(type(failure)):
            copies.copy(failure)
        assert left_in(copies.archive) == ["vm.journal", "vm.partial"]
    assert copies.copy() > 0
    assert left_in(copies.archive) == ["vm", "vm.manifest.json"]
    if tier == "hot":
        check_image(copies.archive / "vm", copies.guest)


@TIERS
@pytest.mark.parametrize("failure", HOPELESS, ids=lambda error: type(error).__name__)
def test_wrong_contents_leave_nothing(
    tmp_path: Path, tier: Literal["hot", "cold"], failure: BaseException
) -> None:
    copies = Copies(tmp_path, tier)
    with pytest.raises(type(failure)):
        copies.copy(failure)
    assert left_in(copies.archive) == []
    assert copies.copy() == 0


@TIERS
@pytest.mark.parametrize("failure", PASSING, ids=lambda error: type(error).__name__)
def test_without_a_checkpoint_nothing_is_left(
    tmp_path: Path, tier: Literal["hot", "cold"], failure: BaseException
) -> None:
    copies = Copies(tmp_path, tier)
    with pytest.raises(type(failure)):
        copies.copy(failure, early=True)
    assert left_in(copies.archive) == []


#: The beginning of a journal as it should be; whose it is shows in the fingerprint of the source.
BEGINNING = encode_start(JournalHeader(tier="hot", source="other", shape="other", token="0" * 32))
DAMAGED = [b"", b"of something else", BEGINNING[:30], BEGINNING[:-1] + b"\xff", None]


@pytest.mark.parametrize("content", DAMAGED, ids=["empty", "other", "cut", "changed", "folder"])
def test_a_journal_that_cannot_be_used_is_told_and_costs_no_copy(
    tmp_path: Path, content: bytes | None
) -> None:
    """It begins anew, and says so; a journal that cannot even be written to is told as well."""
    copies = Copies(tmp_path, "hot")
    if content is None:
        copies.journal.mkdir()
    else:
        copies.journal.write_bytes(content)
    assert copies.copy(slowly=content is None) == 0
    told = [note for note in copies.notes if str(copies.journal) in note]
    assert "begins anew" in told[0]
    assert len(told) == 1 + (content is None)
    left = [name for name in left_in(copies.archive) if name != "vm.journal" or content is not None]
    assert left == ["vm", "vm.manifest.json"]
    check_image(copies.archive / "vm", copies.guest)


def test_a_journal_of_another_copy_is_no_damage(tmp_path: Path) -> None:
    """The source has changed, say: that is every night's business, and no note."""
    copies = Copies(tmp_path, "hot")
    copies.journal.write_bytes(BEGINNING)
    assert copies.copy() == 0
    assert not [note for note in copies.notes if "journal" in note]


class Counted(MappedRamContents):
    """Contents that count the windows which they have given."""

    given = 0

    def windows(self, rows: Sequence[Row]) -> Generator[WindowRead, None, None]:
        for window in super().windows(rows):
            self.given += 1
            yield window


@pytest.mark.parametrize("write", [write_hot, write_cold])
def test_a_stop_waits_for_no_window(tmp_path: Path, write: Callable[..., TierResult]) -> None:
    """However slowly the source may be read: what is being read ahead just then is given up."""
    memory = aligned(12 * MIB)
    memory[0] = 1
    memory[4 * MIB :] = np.random.default_rng(1).integers(1, 256, 8 * MIB, np.uint8)
    with MappedRamWriter(tmp_path / "source.mig", [RamBlock("pc.ram", memory)]) as writer:
        writer.write_all()
        writer.finish()
    given = 0

    def tell(snapshot: Snapshot) -> None:
        nonlocal given
        given = contents.given
        if given:
            raise Interrupted(signal.SIGTERM)

    # The first window, of one page, comes at once, and the next one a minute later.
    options = ReadOptions(rate=64 << 10, channels=1)
    with Counted(tmp_path / "source.mig", options=options) as contents:
        with pytest.raises(Interrupted):
            write(contents, tmp_path / "vm", options=OPTIONS, progress=tell)
        assert contents.given == given
    assert left_in(tmp_path) == ["source.mig", "source.mig.manifest.json"]


def test_a_checkpoint_syncs_the_image_before_the_journal_speaks_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image synced, record written, journal synced; only then may the caller go on."""
    steps: list[str] = []
    sync, write = os.fdatasync, os.pwrite

    def name_of(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().name

    def noted_sync(fd: int) -> None:
        sync(fd)
        steps.append(f"sync {name_of(fd)}")

    def noted_write(fd: int, data: bytes, offset: int) -> int:
        steps.append(f"write {name_of(fd)}")
        return write(fd, data, offset)

    journal = tmp_path / "vm.journal"
    partial = PartialCopy(
        tmp_path / "vm", tier="hot", source="same", shape="same", direct="off", journal=journal
    )
    with partial:
        monkeypatch.setattr(os, "fdatasync", noted_sync)
        monkeypatch.setattr(os, "pwrite", noted_write)
        for row in range(2):
            steps.clear()
            partial.checkpoint([Chunk(0, row, bytes(128), bytes(16))])
            assert steps == ["sync vm.partial", "write vm.journal", "sync vm.journal"]
            assert [chunk.row for chunk in decode(journal.read_bytes()).chunks][-1] == row
