"""What is known against an entry is never forgotten: not by a copy, a run, a reindex or a loss."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from archiveentries import add_entry, flip, place_of
from commandline import uringmig
from loopdisk import needs
from smallguests import MIB

from uringmig.archive.checking import verify_archive
from uringmig.archive.damagenotes import note_path
from uringmig.archive.directory import Archive, reindex
from uringmig.archive.entry import Entry

RAM = 9 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An archive with an older entry that is good and a newer one that is known to be damaged."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        for number in (1, 2):
            add_entry(archive, f"e{number}", created=f"2026-01-0{number}T00:00:00+00:00",
                      seed=number, ram_bytes=RAM)  # fmt: skip
        verify_archive(archive)
        newer = archive.find("e2")
        flip(newer.image, place_of(newer, 1)[0])
        assert verify_archive(archive).damaged == 1
    return tmp_path / "a"


def conditions(folder: Path) -> dict[str, str]:
    """What a reader finds."""
    with Archive.open(folder, write=False) as archive:
        return {entry.name: entry.condition for entry in archive.entries()}


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.parent / "moved"))


def copied_with_cp(folder: Path) -> Path:
    subprocess.run(["cp", "-a", folder, folder.parent / "moved"], check=True)
    return folder.parent / "moved"


def touched(folder: Path) -> Path:
    for path in folder.iterdir():
        os.utime(path, ns=(1, 2))
    return folder


def rewritten(folder: Path) -> Path:
    for path in folder.glob("*.manifest.json"):
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text)
    return folder


def without_catalogue(folder: Path) -> Path:
    (folder / "catalogue.sqlite").unlink()
    return folder


def with_noise_for_a_catalogue(folder: Path) -> Path:
    (folder / "catalogue.sqlite").write_bytes(os.urandom(5000))
    return folder


def reindexed(folder: Path) -> Path:
    reindex(folder)
    return folder


def healed(folder: Path) -> Path:
    Archive.open(folder, write=True).close()
    return folder


CHANGES = [copied, copied_with_cp, touched, rewritten, without_catalogue,
           with_noise_for_a_catalogue, reindexed, healed]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_prune_does_what_it_said_and_never_takes_the_last_good_copy(
    folder: Path, change: Callable[[Path], Path]
) -> None:
    """Whatever numbers changed, damage stays damage; and plan and deed see the same archive."""
    place = change(folder)
    assert conditions(place)["e2"] == "damaged"
    said = uringmig("archive", "prune", place, "--keep-last", 1, "--json").result()["decisions"]
    done = uringmig("archive", "prune", place, "--keep-last", 1, "--delete", "--json")
    assert done.result()["decisions"] == said
    assert conditions(place)["e2"] == "damaged"
    assert set(conditions(place)) == {"e1", "e2"}
    ended = uringmig("archive", "verify", place)
    assert ended.code == 3
    assert "1 of 2 entries damaged" in ended.out


@pytest.mark.parametrize("change", [copied, copied_with_cp, touched, rewritten, reindexed, healed])
def test_how_far_verification_was_is_kept_with_the_same_bytes(
    folder: Path, change: Callable[[Path], Path]
) -> None:
    """An entry that was found good stays so, and a pass by shares goes on where it was."""
    with Archive.open(folder, write=False) as archive:
        verify_archive(archive, names=["e1"], share=0.4)
        before = archive.find("e1")
    assert before.verify_cursor == 2
    assert before.condition == "good"
    place = change(folder)
    for write in (False, True, False):
        with Archive.open(place, write=write) as archive:
            found = archive.find("e1")
        assert (found.verify_cursor, found.verified_at) == (2, before.verified_at)


def lose_both(entry: Entry) -> None:
    Path(entry.image).unlink()
    Path(entry.manifest).unlink()


LOSSES: dict[str, Callable[[Entry], object]] = {
    "image": lambda entry: Path(entry.image).unlink(),
    "manifest": lambda entry: Path(entry.manifest).unlink(),
    "both": lose_both,
    "cut image": lambda entry: os.truncate(entry.image, 5000),
    "empty manifest": lambda entry: os.truncate(entry.manifest, 0),
    "manifest of another": lambda entry: shutil.copy(
        entry.manifest.replace("e1", "e2"), entry.manifest
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_lost_entry_is_told_until_somebody_drops_it(folder: Path, loss: str) -> None:
    """Neither a writer nor a lost catalogue makes a checker green again; only a person does."""
    with Archive.open(folder, write=False) as archive:
        LOSSES[loss](archive.find("e1"))
    expected = "missing" if loss in ("image", "manifest", "both") else "damaged"
    jobs = folder.parent / "jobs.toml"
    jobs.write_text(
        f'[[jobs]]\nname = "n"\narchive = "{folder}"\nsource = {{ image = "{folder}/e2.mig" }}\n'
    )
    for step in ("list", "verify", "run", "list", "verify", "reindex", "loss", "list", "verify"):
        if step == "loss":
            (folder / "catalogue.sqlite").unlink()
            continue
        ended = uringmig("archive", step, jobs if step == "run" else folder)
        assert ended.code == (3 if step == "verify" else 1), (step, ended.err)
        assert "e1: " in ended.err + ended.out
        assert conditions(folder)["e1"] == expected
    shown = uringmig("archive", "show", folder, "e1", "--json").result()
    assert shown["entry"]["vm"] == "web1"
    assert shown["damage"]
    dry = uringmig("archive", "prune", folder, "--forget", "e1")
    assert "to remove" in dry.out
    assert conditions(folder)["e1"] == expected
    assert uringmig("archive", "prune", folder, "--forget", "e1", "--delete").code == 0
    assert "e1" not in conditions(folder)
    assert not list(folder.glob("e1*"))


def test_what_is_sound_is_not_forgotten_by_its_name(folder: Path) -> None:
    for name in ("e1", "nobody"):
        ended = uringmig("archive", "prune", folder, "--forget", name, "--delete")
        assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert set(conditions(folder)) == {"e1", "e2"}


def test_files_that_look_like_entries_and_are_none_are_told(folder: Path) -> None:
    """A line each, and exit code 1, also where nothing else is wrong."""
    uringmig("archive", "prune", folder, "--forget", "e2", "--delete")
    shutil.copy(folder / "e1.mig", folder / "copy.mig")
    shutil.copy(folder / "e1.mig.manifest.json", folder / "other.mig.manifest.json")
    (folder / "empty.cold.manifest.json").touch()
    for command in ("list", "verify"):
        ended = uringmig("archive", command, folder)
        assert ended.code == 1
        assert len(ended.err.splitlines()) == 3
        for name in ("copy.mig: an image without a manifest", "other.mig", "empty.cold"):
            assert name in ended.err


def test_files_that_come_back_are_damaged_until_they_are_verified(folder: Path) -> None:
    """What was missing and is there again is not what was found good, until it is."""
    image = folder / "e1.mig"
    image.rename(folder.parent / "away")
    Archive.open(folder, write=True).close()
    (folder.parent / "away").rename(image)
    assert conditions(folder)["e1"] == "damaged"
    assert uringmig("archive", "verify", folder, "e1").code == 0
    assert conditions(folder)["e1"] == "good"
    assert not note_path(image).exists()


def test_damage_that_was_not_looked_at_again_keeps_the_exit_code(folder: Path) -> None:
    """A partial run that came by no damage says what is known all the same."""
    with Archive.open(folder, write=False) as archive:
        damage = archive.damage("e2")
    ended = uringmig("archive", "verify", folder, "--share", "10%")
    assert ended.code == 3
    assert "e2: known to be damaged" in ended.out
    with Archive.open(folder, write=False) as archive:
        assert archive.damage("e2") == damage


@pytest.mark.parametrize("text", [b"", b"{}", b"noise", b'{"entry": {}}'])
def test_note_that_cannot_be_read_is_damage_until_all_is_found_good(
    folder: Path, text: bytes
) -> None:
    """It would not be there without; and nobody knows any more where the damage was."""
    with Archive.open(folder, write=False) as archive:
        entry = archive.find("e2")
        flip(entry.image, place_of(entry, 1)[0])  # whole again
    note_path(Path(entry.image)).write_bytes(text)
    assert conditions(folder)["e2"] == "damaged"
    assert uringmig("archive", "verify", folder, "--share", "50%").code == 3
    assert conditions(folder)["e2"] == "damaged"
    assert uringmig("archive", "verify", folder).code == 0
    assert conditions(folder) == {"e1": "good", "e2": "good"}


def test_manifest_with_other_bytes_is_damage_until_verified(folder: Path) -> None:
    """Known damage is not shaken off by a new manifest; what fits it wholly is good again."""
    path = folder / "e1.mig.manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    for write in (False, True):
        Archive.open(folder, write=write).close()
        assert conditions(folder)["e1"] == "damaged"
    assert uringmig("archive", "verify", folder, "e1").code == 0
    assert conditions(folder)["e1"] == "good"


def test_note_is_durable_before_the_catalogue_speaks(folder: Path, tmp_path: Path) -> None:
    """Written, synced, renamed, the folder synced; only then does the row change."""
    with Archive.open(folder, write=False) as archive:
        entry = archive.find("e1")
    flip(entry.image, place_of(entry, 0)[0])
    calls = tmp_path / "calls"
    subprocess.run(
        ["strace", "-f", "-y", "-o", calls, "-e",
         "trace=write,pwrite64,fsync,fdatasync,rename,renameat,renameat2",
         *("uringmig", "archive", "verify", folder, "e1", "-q", "--share", "40%")],
        check=False,
    )  # fmt: skip
    lines = [line for line in calls.read_text().splitlines() if str(folder) in line]

    def first(*parts: str) -> int:
        return next(n for n, line in enumerate(lines) if all(part in line for part in parts))

    partial, note = f"{note_path(Path(entry.image))}.partial", str(note_path(Path(entry.image)))
    steps = [
        first(" write(", partial),
        first("fsync(", partial),
        first("rename", note),
        first("fsync(", f"<{folder}>"),
        first("pwrite64(", f"<{folder}/catalogue.sqlite>"),
    ]
    assert steps == sorted(steps)


def test_removal_takes_the_manifest_first_and_the_note_last(folder: Path, tmp_path: Path) -> None:
    """Each is gone for good before the next goes: no half entry, and no damage without its note."""
    calls = tmp_path / "calls"
    subprocess.run(
        ["strace", "-f", "-y", "-o", calls, "-e", "trace=unlink,unlinkat,fsync",
         *("uringmig", "archive", "prune", folder, "--forget", "e2", "--delete", "-q")],
        check=True,
    )  # fmt: skip
    order = []
    for line in calls.read_text().splitlines():
        if "unlink" in line and f"{folder}/e2" in line and "= 0" in line:
            order.append(line.split('"')[1].removeprefix(f"{folder}/e2.mig"))
        elif "fsync(" in line and f"<{folder}>" in line:
            order.append("sync")
    assert order == [".manifest.json", "sync", "", "sync", ".damage.json", "sync"]


def test_manifest_that_cannot_be_removed_leaves_its_entry(folder: Path) -> None:
    """Nothing is hidden or lost by a removal whose first step fails."""
    needs("chattr")
    manifest = folder / "e1.mig.manifest.json"
    if subprocess.run(["chattr", "+i", manifest], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        with Archive.open(folder, write=True) as archive, pytest.raises(Exception, match="EPERM"):
            archive.remove("e2", "e1")
        found = conditions(folder)
    finally:
        subprocess.run(["chattr", "-i", manifest], check=True)
    assert found["e1"] == "good"
    assert conditions(folder)["e1"] == "good"
