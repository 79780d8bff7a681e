"""The order of system calls of whole runs: what has a final name was synced before it got it.

A file's content cannot tell whether it was ever synced; the calls can (`systemcalls`). The program
runs as a user starts it, with the pwrite engine, whose writes strace sees.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from batchjobs import job, write_jobs
from durableorder import unsafe_names, unsettled
from smallprogram import COMMAND, save_guest
from systemcalls import Call, Recording, record

from uringmig.archive import copyjournal
from uringmig.archive.directory import Archive
from uringmig.image.parse import ParsedImage, parse_image
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.storage.mainfile import open_for_reading
from uringmig.units import MiB

#: Files that grow under their final names.
LOGS = (".run",)
#: SQLite keeps an order of its own; what it has committed is looked at where success is told.
CATALOGUE = "catalogue.sqlite"


def run(*arguments: object, root: Path) -> Recording:
    """Record the program, which must end well."""
    recording = record([*COMMAND, *map(str, arguments)], root, trace=root.parent / "trace")
    assert recording.code == 0, recording.err
    return recording


def without_catalogue(calls: list[Call]) -> list[Call]:
    return [call for call in calls if CATALOGUE not in call.path]


def last_word(calls: list[Call]) -> int:
    """The number of the call that tells how it went, which is the last line."""
    return next(
        call.number for call in reversed(calls) if call.kind == "tell" and call.data.strip()
    )


def make_root(folder: Path) -> Path:
    root = folder / "root"
    root.mkdir()
    return root


def names_given(calls: list[Call]) -> set[str]:
    """Final names that files were given."""
    targets = {call.target for call in calls if call.kind in ("rename", "link")}
    return {Path(name).name for name in targets if not name.endswith(".partial")}


@pytest.mark.parametrize("former", [True, False])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_save(tmp_path: Path, former: bool, with_manifest: bool) -> None:
    """Whole, synced, named, the folder synced: then it is said."""
    root = make_root(tmp_path)
    if former:
        save_guest(root / "vm", 0)
    calls = run("save-guest", root / "vm", 1, with_manifest, root=root).calls
    assert names_given(calls) >= ({"vm", "vm.manifest.json"} if with_manifest else {"vm"})
    assert unsafe_names(calls) == []
    assert unsettled(calls, at=last_word(calls)) == []


@dataclass(frozen=True)
class ArchiveRun:
    """A recorded `archive run` of a hot and a cold copy, with checkpoints, metrics and a report."""

    root: Path
    calls: list[Call]

    def done(self, name: str) -> int:
        """The number of the call that says that a job is done."""
        for call in self.calls:
            if call.kind == "tell" and call.data.strip():
                event = json.loads(call.data)
                if event["event"] == "job" and (event["job"], event["stage"]) == (name, "done"):
                    return call.number
        raise AssertionError(f"job {name} was not done")

    def image(self, name: str) -> Path:
        (image,) = [
            path for path in (self.root / "archive").glob(f"{name}-*") if path.suffix != ".json"
        ]
        return image


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> ArchiveRun:
    folder = tmp_path_factory.mktemp("order")
    root = make_root(folder)
    save_guest(folder / "source.mig", 1, ram_bytes=14 * MiB)
    jobs = write_jobs(
        folder,
        *(
            job(
                tier, f"image = '{folder}/source.mig'", tier=tier, engine="pwrite", channels=1,
                archive=str(root / "archive"), rate="1M",
            )
            for tier in ("hot", "cold")
        ),
    )  # fmt: skip
    recording = run(
        "archive", "run", jobs, "--json", "--workers", 1,
        "--metrics-file", root / "metrics.prom", "--report", root / "report", root=root,
    )  # fmt: skip
    return ArchiveRun(root, recording.calls)


def test_archive_run(archived: ArchiveRun) -> None:
    """Images, manifests, journals, report and metrics: nothing has its name before it is whole."""
    calls = without_catalogue(archived.calls)
    given = names_given(calls)
    for image in (archived.image("hot"), archived.image("cold")):
        assert {image.name, f"{image.name}.manifest.json"} <= given
    assert {"metrics.prom"} <= given
    assert {Path(name).suffix for name in given} >= {".run", ".md", ".json"}
    assert unsafe_names(calls, logs=LOGS) == []


@pytest.mark.parametrize("name", ["hot", "cold"])
def test_a_job_is_done_when_all_of_it_is_durable(archived: ArchiveRun, name: str) -> None:
    """The entry, the run journal's word on it, and the catalogue's row."""
    at = archived.done(name)
    image = archived.image(name).name
    assert names_given([call for call in archived.calls if call.number < at]) >= {image, CATALOGUE}
    endings = (image, f"{image}.manifest.json", *LOGS, CATALOGUE)
    assert unsettled(archived.calls, at=at, endings=endings) == []


def test_a_run_has_ended_when_all_of_it_is_durable(archived: ArchiveRun) -> None:
    """When the summary is told."""
    assert unsettled(archived.calls, at=last_word(archived.calls)) == []


@pytest.mark.parametrize("name", ["hot", "cold"])
def test_a_journal_announces_only_what_is_durable(archived: ArchiveRun, name: str) -> None:
    """Each record comes after a sync that began when all writes of its windows had ended.

    And it is itself synced before the next, or it might be there without it.
    """
    image = archived.image(name)
    path = f"{archived.root}/archive/{image.name}"
    calls = [call for call in archived.calls if call.path in (f"{path}.partial", f"{path}.journal")]
    records = [call for call in calls if call.path.endswith("journal") and call.kind == "write"]
    assert len(records) > 1
    announced = 0
    for call in records:
        log = b"".join(one.data for one in records if one.number <= call.number)
        chunks = copyjournal.decode(log).chunks
        syncs = [
            one
            for one in calls
            if one.kind == "sync" and one.path.endswith(".partial") and one.number < call.begun
        ]
        assert syncs, "a record before any sync of the image"
        for chunk in chunks[announced:]:
            start, length = place_of(image, chunk)
            writes = [
                one
                for one in calls
                if one.kind == "write"
                and one.path.endswith(".partial")
                and one.offset is not None
                and start < one.offset + one.length
                and one.offset < start + length
            ]
            assert all(one.number < syncs[-1].begun for one in writes), chunk
        announced = len(chunks)
    assert announced >= 3
    ends = [call for call in calls if call.path.endswith("journal")]
    for call, following in pairwise(ends):
        assert call.kind != "write" or following.kind == "sync"


def place_of(image: Path, chunk: copyjournal.Chunk) -> tuple[int, int]:
    """Where a journal's chunk lies in its image: offset and length."""
    if image.suffix == ".cold":
        return chunk.frame_offset, chunk.frame_length
    block = parse_of(image).blocks[chunk.block_index]
    start = chunk.row * WINDOW_BYTES
    return block.pages_offset + start, min(WINDOW_BYTES, block.used_length - start)


def parse_of(image: Path) -> ParsedImage:
    with closing(open_for_reading(str(image))) as file:
        return parse_image(file)


def copy_archive(archived: ArchiveRun, root: Path) -> None:
    """An archive of the same content, to do something to."""
    (root / "archive").mkdir()
    for path in (archived.root / "archive").iterdir():
        (root / "archive" / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("output", ["hot", "plain"])
@pytest.mark.parametrize("entry", ["hot", "cold"])
def test_restore(archived: ArchiveRun, tmp_path: Path, output: str, entry: str) -> None:
    """A restored file is told of when it and its name are durable."""
    root = make_root(tmp_path)
    calls = run(
        "archive", "restore", archived.root / "archive", archived.image(entry).stem, root / "vm",
        "--as", output, "--engine", "pwrite", "--json", root=root,
    ).calls  # fmt: skip
    assert "vm" in names_given(calls)
    assert unsafe_names(calls) == []
    assert unsettled(calls, at=last_word(calls)) == []


def test_profile(tmp_path: Path) -> None:
    """A profile that was measured for half a minute is there after a power cut."""
    root = make_root(tmp_path)
    calls = run("store-profile", root / "profiles.json", root=root).calls
    assert names_given(calls) == {"profiles.json"}
    assert unsafe_names(calls) == []
    assert unsettled(calls, at=last_word(calls)) == []


def test_removal(archived: ArchiveRun, tmp_path: Path) -> None:
    """The manifest's removal is durable before the image goes: never an image gone alone."""
    root = make_root(tmp_path)
    copy_archive(archived, root)
    image = archived.image("hot")
    calls = run("remove-entry", root / "archive", image.stem, root=root).calls
    with Archive.open(root / "archive", write=False) as archive:
        assert [entry.tier for entry in archive.entries()] == ["cold"]
    steps = [
        (call.kind, Path(call.path).name)
        for call in calls
        if CATALOGUE not in call.path and call.kind in ("unlink", "sync")
    ]
    marked = [(call.kind, Path(call.path).name) for call in calls if call.kind != "write"]
    committed = marked.index(("unlink", f"{CATALOGUE}-journal"))
    # Otherwise the mark may be rolled back where the removal is kept: an entry that is missing.
    assert marked[committed + 1] == ("sync", "archive")
    assert committed < marked.index(("unlink", f"{image.name}.manifest.json"))
    manifest_gone = steps.index(("unlink", f"{image.name}.manifest.json"))
    image_gone = steps.index(("unlink", image.name))
    assert ("sync", "archive") in steps[manifest_gone:image_gone]
    assert ("sync", "archive") in steps[image_gone:]


def test_known_damage_is_durable(archived: ArchiveRun, tmp_path: Path) -> None:
    """What a verification found against an entry is kept when it is told."""
    root = make_root(tmp_path)
    copy_archive(archived, root)
    image = root / "archive" / archived.image("hot").name
    with image.open("r+b") as file:
        file.seek(parse_of(image).blocks[0].pages_offset + PAGE_SIZE)
        file.write(b"another page's beginning")
    trace = tmp_path / "trace"
    command = [*COMMAND, "archive", "verify", str(root / "archive"), "--engine", "pwrite", "--json"]
    recording = record(command, root, trace=trace)
    assert recording.code == 3, recording.err
    calls = without_catalogue(recording.calls)
    assert any(name.startswith(f"{image.name}.") for name in names_given(calls))
    assert unsafe_names(calls) == []
    assert unsettled(calls, at=last_word(calls)) == []


def test_healing_ends_a_publication_durably(archived: ArchiveRun, tmp_path: Path) -> None:
    """A manifest that healing gives its name has it for good before anything is told of it."""
    root = make_root(tmp_path)
    copy_archive(archived, root)
    manifest = root / "archive" / f"{archived.image('hot').name}.manifest.json"
    manifest.rename(f"{manifest}.partial")
    calls = without_catalogue(run("heal", root / "archive", root=root).calls)
    assert manifest.exists()
    step = next(at for at, call in enumerate(calls) if call.target == str(manifest))
    assert (calls[step + 1].kind, calls[step + 1].path) == ("sync", str(root / "archive"))
