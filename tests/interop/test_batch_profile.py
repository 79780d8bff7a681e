"""``archive run --profile``: what a job gives, then the profile of the place, then defaults."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from batchjobs import job, make_image, run_jobs, write_jobs
from commandline import uringmig
from msgspec import structs

from uringmig.bench.profile import Measured, ProfileEntry, ProfileSettings, store_entry
from uringmig.options import WriteOptions
from uringmig.storage.devices import place_of
from uringmig.units import KiB

PROFILE = ProfileSettings(
    channels=3, depth=16, block_size=256 * KiB, bridge=12 * KiB, engine="pwrite", direct="off"
)


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """What the manifest of a job's entry says really ran."""
    [manifest] = (folder / "archive").rglob(f"{name}-*.manifest.json")
    settings: dict[str, Any] = json.loads(manifest.read_text())["settings"]
    return settings


def test_given_before_profile_before_default(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    profiles = tmp_path / "profiles.json"
    measured = Measured(ceiling=1.0, rate=1.0, spread=0.0, request_seconds=0.0)
    place = place_of(str(tmp_path))
    store_entry(
        ProfileEntry(place=place, created="now", settings=PROFILE, measured=measured), profiles
    )
    source = f'image = "{tmp_path}/vm.mig"'
    path = write_jobs(
        tmp_path,
        job("plain", source),
        job("own", source, channels=1, block_size="64K"),
        job("cold", source, tier="cold"),
        head='[devices."."]\ndepth = 256\n',  # more than any of them asks for
    )
    ended = run_jobs(path, "--profile-file", profiles)
    assert ended.code == 0, ended
    names = ("channels", "depth", "block_size", "bridge", "engine", "direct")
    plain = settings_of(tmp_path, "plain")
    assert [plain[name] for name in names] == [3, 16, 256 * KiB, 12 * KiB, "pwrite", False]
    own = settings_of(tmp_path, "own")
    assert [own[name] for name in names] == [1, 16, 64 * KiB, 12 * KiB, "pwrite", False]
    cold = settings_of(tmp_path, "cold")
    assert cold["channels"] == WriteOptions().channels, "those of a cold job compress"
    assert cold["depth"] == 16


def test_a_place_without_a_profile_gives_a_note(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", f'image = "{tmp_path}/vm.mig"'))
    empty = tmp_path / "none.json"
    empty.write_text('{"format": "uringmig-profiles", "version": 1, "profiles": []}')
    ended = run_jobs(path, "--profile-file", empty)
    assert ended.code == 0, ended
    assert "has no profile of the place of" in ended.err
    assert settings_of(tmp_path, "a")["depth"] == WriteOptions().depth


@pytest.mark.parametrize("content", [None, "", "{}", '{"profiles": [1]}', "a folder"])
def test_a_lost_or_damaged_profile_costs_no_image(tmp_path: Path, content: str | None) -> None:
    """A profile is for speed: the jobs run with the defaults, and the run ends with a warning."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", f'image = "{tmp_path}/vm.mig"'))
    profiles = tmp_path / "profiles.json"
    if content == "a folder":
        profiles.mkdir()
    elif content is not None:
        profiles.write_text(content.replace("{}", '{"profiles": {}}'))
    ended = run_jobs(path, "--profile-file", profiles)
    assert ended.code == 1, ended
    assert "warning: the defaults are used: " in ended.err
    assert settings_of(tmp_path, "a")["depth"] == WriteOptions().depth


def test_a_profile_does_not_require_what_may_be_gone(tmp_path: Path) -> None:
    """``bench --engine io_uring --direct required`` was asked of the bench, not of every night."""
    make_image(tmp_path / "vm.mig")
    profiles = tmp_path / "profiles.json"
    measured = Measured(ceiling=1.0, rate=1.0, spread=0.0, request_seconds=0.0)
    settings = structs.replace(PROFILE, engine="io_uring", direct="required")
    place = place_of(str(tmp_path))
    store_entry(
        ProfileEntry(place=place, created="now", settings=settings, measured=measured), profiles
    )
    path = write_jobs(tmp_path, job("a", f'image = "{tmp_path}/vm.mig"'))
    ended = uringmig(
        *("archive", "run", path, "--profile-file", profiles, "--json"), refuse_ring=errno.EPERM
    )
    assert ended.code == 0, ended
    assert settings_of(tmp_path, "a")["engine"] == "pwrite"
