"""What killed writers leave in an archive is healed by whoever opens it for writing next."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from archiveentries import add_entry
from smallguests import left_in

from uringmig import verify
from uringmig.archive.directory import Archive
from uringmig.image import manifest
from uringmig.storage.publication import FORMER, PARTIAL


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An entry's image, in an archive of its own."""
    with Archive.open(tmp_path / "archive", write=True) as archive:
        return Path(add_entry(archive, "web").image)


def heal(image: Path) -> list[str]:
    """Open the archive for writing; names of what is there, but for hidden files and catalogue."""
    with Archive.open(image.parent, write=True) as archive:
        assert [entry.name for entry in archive.entries()] == ["web"]
    assert not verify(image).mismatches
    return [name for name in left_in(image.parent) if not name.startswith(("catalogue", ".lock"))]


def beside(image: Path) -> Path:
    return Path(f"{image}{manifest.SUFFIX}")


def whole(image: Path) -> list[str]:
    return sorted([image.name, beside(image).name])


def test_replacement_that_had_not_begun_is_undone(image: Path) -> None:
    """The image has two names, its manifest only the second: both are as before afterwards."""
    os.link(image, f"{image}{FORMER}")
    beside(image).rename(f"{beside(image)}{FORMER}")
    Path(f"{image}{PARTIAL}").write_bytes(b"half")
    assert heal(image) == whole(image)


def test_replacement_without_links_that_had_not_begun_is_undone(image: Path) -> None:
    image.rename(f"{image}{FORMER}")
    beside(image).rename(f"{beside(image)}{FORMER}")
    assert heal(image) == whole(image)


def test_replacement_that_had_its_name_is_finished(image: Path) -> None:
    """The new image lacked its manifest's name only; what was before it goes."""
    Path(f"{image}{FORMER}").write_bytes(b"the former image")
    Path(f"{beside(image)}{FORMER}").write_bytes(b"{}")
    beside(image).rename(f"{beside(image)}{PARTIAL}")
    assert heal(image) == whole(image)


@pytest.mark.parametrize("suffix", [FORMER, manifest.SUFFIX + FORMER])
def test_last_step_that_was_left_out_is_done(image: Path, suffix: str) -> None:
    shutil.copy(image, f"{image}{suffix}")
    assert heal(image) == whole(image)


@pytest.mark.parametrize("name", [".depth-x1y2z3", ".uringmig-0123456789abcdef"])
def test_scratch_files_are_cleared(image: Path, name: str) -> None:
    """Those of earlier releases, and those that were about to lose their names."""
    (image.parent / name).write_bytes(bytes(4096))
    assert heal(image) == whole(image)


def test_files_of_others_stay(image: Path) -> None:
    for name in ("notes.former", ".depths", "README"):
        (image.parent / name).write_text("mine")
    assert heal(image) == sorted([*whole(image), "notes.former", ".depths", "README"])


def test_catalogue_is_its_owner_s_only(tmp_path: Path) -> None:
    """It names guests; in a folder that is open to all, and whatever the umask."""
    folder = tmp_path / "archive"
    folder.mkdir()
    folder.chmod(0o777)
    mask = os.umask(0)
    try:
        with Archive.open(folder, write=True) as archive:
            add_entry(archive, "web")
            modes = {path.name: path.stat().st_mode & 0o077 for path in folder.iterdir()}
    finally:
        os.umask(mask)
    assert modes
    assert not any(modes.values()), modes
