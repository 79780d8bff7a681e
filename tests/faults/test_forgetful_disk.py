"""The power goes at any moment, and the disk forgets what was not synced: the promises hold.

kill -9 cannot show a missing sync, since the page cache outlives the process. Here a real run is
recorded under strace, cut anywhere, and `forgetfuldisk` leaves what a disk may leave then.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from archiveentries import add_cold_entry, add_entry, flip
from batchjobs import check_archive, job, memory_of, write_jobs
from forgetting import Run
from hereruns import run_here
from smallguests import check_image, copy_of, left_in
from smallprogram import COMMAND, be_small, save_guest, small_guest
from systemcalls import Call

from uringmig import verify
from uringmig.archive.checking import verify_archive
from uringmig.archive.cold import open_cold
from uringmig.archive.directory import Archive
from uringmig.archive.restoring import restore_file
from uringmig.contents.opening import open_contents
from uringmig.image.parse import parse_image, read_bitmap
from uringmig.options import PAGE_SIZE
from uringmig.storage.mainfile import open_for_reading
from uringmig.storage.publication import FORMER, PARTIAL
from uringmig.units import MiB

#: Three windows and a bit: room for checkpoints in between.
COPIED_BYTES = 9 * MiB
GUESTS = [copy_of(small_guest(number)) for number in range(3)]


def number_of_image(path: Path) -> int:
    """Which guest an image is of, whole; a manifest beside it is its own."""
    found = [number for number, guest in enumerate(GUESTS) if is_of(path, guest)]
    assert found, f"{path} is no guest that was ever saved"
    if Path(f"{path}.manifest.json").exists():
        result = verify(path)
        assert not result.mismatches
        assert result.manifest_path is not None
    return found[0]


def is_of(path: Path, guest: dict[str, bytes]) -> bool:
    try:
        check_image(path, guest)
    except AssertionError:
        return False
    return True


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory: a recovery syncs a lot, and what is lost is lost by us, not by a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path).resolve()


@pytest.mark.parametrize(("former", "with_manifest"), [(True, True), (True, False), (False, True)])
def test_save(folder: Path, former: bool, with_manifest: bool) -> None:
    """Under the name is the former image or the new one, whole, with its own manifest or none.

    Success told: it is the new one. The next save of this name is as any other.
    """
    root = folder / "root"
    root.mkdir()
    path = root / "vm"
    if former:
        save_guest(path, 0)
    run = Run.of([*COMMAND, "save-guest", str(path), "1", str(with_manifest)], root)

    def check(cut: int) -> None:
        told = b"saved" in run.told(cut)
        if former or told or path.exists():
            assert number_of_image(path) in ([0, 1] if former and not told else [1])
        if told:
            assert Path(f"{path}.manifest.json").exists() == with_manifest
        save_guest(path, 2)
        assert number_of_image(path) == 2
        assert left_in(root) == ["vm", "vm.manifest.json"]

    run.cut_by(0.1, check)


def test_archive_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are whole or not there, done ones are there; the next run ends what was begun.

    It resumes from journal and checkpoints, and what comes of that is the right memory.
    """
    be_small(monkeypatch.setattr)
    root = folder / "archive"
    source = folder / "source.mig"
    save_guest(source, 1, ram_bytes=COPIED_BYTES)
    with open_contents(source) as contents:
        guest = memory_of(contents)
    with Archive.open(root, write=True) as archive:
        add_entry(archive, "kept")
    jobs = write_jobs(
        folder,
        *(
            job(tier, f"image = '{source}'", tier=tier, engine="pwrite", channels=1, rate="1M")
            for tier in ("hot", "cold")
        ),
    )
    run = Run.of([*COMMAND, "archive", "run", str(jobs), "--json", "--workers", "1"], root)

    def check(cut: int) -> None:
        entries = done_entries(run.told(cut))
        check_names(root, guest)
        with Archive.open(root, write=True) as archive:
            assert {entry.name for entry in archive.entries()} >= {"kept", *entries}
            assert not archive.healed.problems
        check_names(root, guest)
        summary = run_here(jobs)
        failed = [state for state in summary.jobs if state.stage not in ("done", "skipped")]
        assert not failed, [(state.job.name, state.stage, state.error) for state in failed]
        names = check_archive(root).keys()
        assert names >= {"kept", *entries, *(state.entry for state in summary.jobs)}
        check_names(root, guest)

    run.cut_by(0.15, check)
    run.cut_by(0.15, check, among=calls_between_checkpoints(run))


def calls_between_checkpoints(run: Run) -> list[Call]:
    """Those of a copy that could go on: from its journal's first sync to its file's last one."""
    found = []
    for tier in (".mig", ".cold"):
        calls = [call for call in run.recording.calls if Path(call.path).stem.endswith(tier)]
        noted = [c.number for c in calls if c.kind == "sync" and c.path.endswith(".journal")]
        synced = [c.number for c in calls if c.kind == "sync" and c.path.endswith(".partial")]
        found += [call for call in calls if noted[0] <= call.number < synced[-1]]
    assert found, "no copy made a checkpoint"
    return found


def done_entries(told: bytes) -> list[str]:
    """Entries of jobs that were said to be done."""
    events = [json.loads(line) for line in told.splitlines()]
    return [
        event["entry"]
        for event in events
        if event["event"] == "job" and event["stage"] in ("done", "skipped")
    ]


def check_names(archive: Path, guest: dict[str, bytes]) -> None:
    """What has a name in an archive is whole, if it is of this guest; and so is its manifest."""
    for path in archive.iterdir():
        if path.name.startswith("hot") and path.suffix == ".mig":
            check_image(path, guest)
            if Path(f"{path}.manifest.json").exists():
                assert not verify(path).mismatches
        if path.name.startswith("cold") and path.suffix == ".cold":
            with open_cold(path) as contents:
                assert memory_of(contents) == guest


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_remove(folder: Path, tier: str) -> None:
    """An entry that is removed is there whole, or nothing of it is; all others stay."""
    root = folder / "archive"
    with Archive.open(root, write=True) as archive:
        add_entry(archive, "kept")
        (add_entry if tier == "hot" else add_cold_entry)(archive, "gone")
    run = Run.of([*COMMAND, "remove-entry", str(root), "gone"], root)

    def check(cut: int) -> None:
        with Archive.open(root, write=True) as archive:
            names = {entry.name for entry in archive.entries()}
            assert not archive.healed.problems
        assert names in ({"kept"}, {"kept", "gone"})
        if b"removed" in run.told(cut):
            assert names == {"kept"}
        assert check_archive(root).keys() == names

    run.cut_by(0.1, check)


@pytest.mark.parametrize("output", ["hot", "plain"])
def test_restore(folder: Path, output: str) -> None:
    """A restored file is the entry's memory, or what was there before; told of, it is there."""
    root = folder / "root"
    root.mkdir()
    out = root / "vm"
    save_guest(out, 0)
    with Archive.open(folder / "archive", write=True) as archive:
        add_entry(archive, "entry", seed=3)
        with open_contents(archive.find("entry").image) as contents:
            entry = memory_of(contents)
    command = ["archive", "restore", str(folder / "archive"), "entry", str(out)]
    run = Run.of([*COMMAND, *command, "--as", output, "--engine", "pwrite", "--json"], root)

    def check(cut: int) -> None:
        with open_contents(out) as contents:
            found = memory_of(contents)
        assert found == entry or (found == GUESTS[0] and b"result" not in run.told(cut))
        if Path(f"{out}.manifest.json").exists():
            assert not verify(out).mismatches
        with Archive.open(folder / "archive", write=False) as archive:
            restore_file(archive, "entry", out, output=output)  # type: ignore[arg-type]
        with open_contents(out) as contents:
            assert memory_of(contents) == entry
        assert left_in(root) == (["vm", "vm.manifest.json"] if output == "hot" else ["vm"])

    run.cut_by(0.1, check)


def test_known_damage(folder: Path) -> None:
    """What was told to be damaged is known to be, and what was known before always is."""
    root = folder / "archive"
    with Archive.open(root, write=True) as archive:
        for name in ("known", "found"):
            flip_page(Path(add_entry(archive, name).image))
        verify_archive(archive, names=["known"])
        assert archive.damage("known")
        assert not archive.damage("found")
    command = ["archive", "verify", str(root), "--engine", "pwrite", "--json"]
    run = Run.of([*COMMAND, *command], root, code=3)

    def check(cut: int) -> None:
        told = b"result" in run.told(cut)
        for write in (False, True):
            with Archive.open(root, write=write) as archive:
                assert {entry.name for entry in archive.entries()} == {"known", "found"}
                assert archive.damage("known")
                if told:
                    assert archive.damage("found")
        assert {path.suffix for path in root.iterdir()}.isdisjoint({PARTIAL, FORMER})

    run.cut_by(0.1, check)


def flip_page(image: Path) -> None:
    """Let a byte of the memory rot."""
    with closing(open_for_reading(str(image))) as file:
        block = parse_image(file).blocks[0]
        bits = read_bitmap(file, block)
    page = int(np.flatnonzero(np.unpackbits(bits, bitorder="little"))[0])
    flip(str(image), block.pages_offset + page * PAGE_SIZE)
