"""``save --profile`` of a real QEMU: what is asked for, then the profile, then the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import uringmig
from realguest import StartMachine, shared_path

from uringmig.bench.profile import Measured, ProfileEntry, ProfileSettings, store_entry
from uringmig.options import WriteOptions
from uringmig.storage.devices import Place, place_of
from uringmig.testing.machine import Machine
from uringmig.units import KiB, MiB

NAMES = ("channels", "depth", "block_size", "bridge")
PROFILE = ProfileSettings(
    channels=3, depth=16, block_size=256 * KiB, bridge=12 * KiB, engine="pwrite", direct="off"
)


@pytest.fixture
def machine(start_machine: StartMachine) -> Machine:
    return start_machine(memory_bytes=64 * MiB, shared=shared_path())


def profile_of(place: Place, file: Path) -> Path:
    measured = Measured(ceiling=1.0, rate=1.0, spread=0.0, request_seconds=0.0)
    store_entry(ProfileEntry(place=place, created="now", settings=PROFILE, measured=measured), file)
    return file


def save(machine: Machine, image: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """Save; returns the settings that the manifest says really ran, and standard error."""
    done = uringmig("save", "--qmp", machine.qmp_path, image, *arguments)
    assert done.code == 0, done
    settings: dict[str, Any] = json.loads(Path(f"{image}.manifest.json").read_text())["settings"]
    return settings, done.err


def test_asked_for_before_profile_before_default(
    machine: Machine,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path_factory.mktemp("config")
    file = profile_of(place_of(str(tmp_path)), config / "uringmig" / "profiles.json")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
    default = WriteOptions()

    plain, _ = save(machine, tmp_path / "a.mig")
    assert [plain[name] for name in NAMES] == [getattr(default, name) for name in NAMES]

    for number, arguments in enumerate([("--profile",), ("--profile-file", file)]):
        tuned, said = save(machine, tmp_path / f"b{number}.mig", *arguments)
        assert [tuned[name] for name in NAMES] == [getattr(PROFILE, name) for name in NAMES]
        assert (tuned["engine"], tuned["direct"], said) == ("pwrite", False, "")

    # Given outright, though two of them are the defaults.
    asked, _ = save(
        machine,
        *(tmp_path / "c.mig", "--profile", "--channels", default.channels),
        *("--engine", "auto", "--block-size", "8K"),
    )
    assert (asked["channels"], asked["engine"], asked["block_size"]) == (2, "io_uring", 8 * KiB)
    assert (asked["depth"], asked["direct"], asked["bridge"]) == (16, False, 8 * KiB)


def test_a_place_without_a_profile_is_told(machine: Machine, tmp_path: Path) -> None:
    elsewhere = Place(filesystem="xfs", device="99:1", source="/dev/none", identity="none")
    file = profile_of(elsewhere, tmp_path / "p.json")
    settings, said = save(machine, tmp_path / "a.mig", "--profile-file", file)
    assert settings["channels"] == WriteOptions().channels
    assert said.count("\n") == 1
    assert said.startswith(f"uringmig: note: {file} has no profile")


@pytest.mark.parametrize(("content", "code"), [("{}", 3), ('{"profiles": [1]}', 3), (None, 5)])
def test_a_bad_or_missing_file_is_refused_before_the_guest_is_touched(
    machine: Machine, tmp_path: Path, content: str | None, code: int
) -> None:
    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(content.replace("{}", '{"profiles": {}}'))
    done = uringmig(
        "save", "--qmp", machine.qmp_path, tmp_path / "a.mig", "--profile-file", file, "--json"
    )
    assert done.code == code
    assert done.err.count("\n") == 1
    if content is not None:
        assert "$.profiles" in done.err
    assert machine.monitor.run_state() == "running"
    assert not (tmp_path / "a.mig").exists()
