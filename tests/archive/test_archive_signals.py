"""Work on an archive that shows no progress ends at a signal all the same, and leaves it in order.

Healing, listing, pruning and a long look at a file go from one thing to the next: each looks first.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from archiveentries import add_entry
from smallguests import left_in
from strikes import sweep

from uringmig.archive.directory import Archive, reindex
from uringmig.archive.pruning import prune
from uringmig.image.parse import parse_image, stream_digest
from uringmig.signals import Interrupted, Signals
from uringmig.storage.mainfile import open_for_reading

ENTRIES = 4


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of some entries of one machine."""
    folder = tmp_path_factory.mktemp("signals") / "archive"
    with Archive.open(folder, write=True) as archive:
        for number in range(ENTRIES):
            add_entry(archive, f"web-{number}")
    return folder


def test_a_prune_struck_at_each_removal(filled: Path, tmp_path: Path) -> None:
    """What is left is whole entries; what was begun is ended by whoever opens the archive next."""
    folder = tmp_path / "archive"
    shutil.copytree(filled, folder)
    stopped, counts = [], set()
    arguments = ("archive", "prune", folder, "--keep-last", 1, "--delete")
    for struck in sweep(tmp_path, "unlink", *arguments, every=3):
        stopped.append(struck.stopped)
        assert struck.stopped or struck.code == 0, struck.err
        with Archive.open(folder, write=True) as archive:
            assert not archive.healed.problems
            entries = archive.entries()
        assert all(entry.condition == "unchecked" for entry in entries)
        images = [name for name in left_in(folder) if name.endswith(".mig")]
        assert images == sorted(f"{entry.name}.mig" for entry in entries)
        counts.add(len(entries))
        shutil.rmtree(folder)
        shutil.copytree(filled, folder)
    assert stopped[0]
    assert stopped == sorted(stopped, reverse=True), stopped
    assert ENTRIES in counts, "at first nothing was removed"


def digest(folder: Path) -> None:
    """Read an image as its end does, whatever size its device state has."""
    file = open_for_reading(str(folder / "web-0.mig"))
    try:
        image = parse_image(file)
        stream_digest(file, base=image.base, blocks=image.blocks)
    finally:
        file.close()


def delete(folder: Path) -> None:
    """Remove entries with nothing to heal before."""
    with Archive.open(folder, write=False) as archive:
        prune(archive, keep_last=1)


@pytest.mark.parametrize(
    "work", [lambda folder: Archive.open(folder, write=True).close(), reindex, delete, digest],
    ids=["heal", "reindex", "prune", "digest"],
)  # fmt: skip
def test_each_looks_before_it_goes_on(work: Callable[[Path], object], filled: Path) -> None:
    """A signal that came before is seen by the first step; without one all is done."""
    with Signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            work(filled)
    work(filled)
