"""Profile files: what is written is read, what is malformed is named, and who wins over whom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.bench.profile import (
    BYTES_MAX,
    Measured,
    ProfileEntry,
    ProfileSettings,
    check_writable,
    default_file,
    read_entries,
    settings_for,
    store_entry,
)
from uringmig.errors import FormatError, StateError, StorageError
from uringmig.options import PAGE_SIZE, ReadOptions, WriteOptions
from uringmig.storage.devices import Place, place_of

SETTINGS = ProfileSettings(
    channels=3, depth=16, block_size=4 << 20, bridge=8192, engine="auto", direct="preferred"
)


def entry_of(place: Place, settings: ProfileSettings = SETTINGS) -> ProfileEntry:
    return ProfileEntry(
        place=place,
        created="2026-01-01T00:00:00+00:00",
        settings=settings,
        measured=Measured(ceiling=2e9, rate=1.9e9, spread=0.03, request_seconds=8e-6),
    )


def other_place(number: int) -> Place:
    return Place(
        filesystem="xfs", device=f"99:{number}", source="/dev/none", identity=f"id{number}"
    )


def test_what_is_stored_is_found(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "profiles.json"
    entry = entry_of(place_of(str(tmp_path)))
    store_entry(entry, file)
    assert read_entries(file) == [entry]
    for path in (tmp_path, tmp_path / "new.mig", file):
        assert settings_for(path, file) == SETTINGS
    assert os.listdir(file.parent) == ["profiles.json"]  # noqa: PTH208 - no partial file is left


def test_a_place_has_one_entry_and_others_keep_theirs(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    here = place_of(str(tmp_path))
    newer = ProfileSettings(
        channels=1, depth=1, block_size=PAGE_SIZE, bridge=0, engine="pwrite", direct="off"
    )
    for number in range(3):
        store_entry(entry_of(other_place(number)), file)
    store_entry(entry_of(here), file)
    store_entry(entry_of(here, newer), file)
    entries = read_entries(file)
    assert [one.place for one in entries] == [*map(other_place, range(3)), here]
    assert settings_for(tmp_path, file) == newer


def test_a_place_without_entry(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    assert settings_for(tmp_path, file) is None
    store_entry(entry_of(other_place(1)), file)
    assert settings_for(tmp_path / "x.mig", file) is None


def test_places_are_told_apart_by_identity_then_by_number() -> None:
    disk = Place(filesystem="ext4", device="8:1", source="/dev/sda1", identity="ata-X", model="X")
    moved = Place(filesystem="ext4", device="8:17", source="/dev/sdb1", identity="ata-X", model="X")
    taken = Place(filesystem="ext4", device="8:1", source="/dev/sda1", identity="ata-Y", model="X")
    plain = Place(filesystem="ext4", device="8:1", source="/dev/sda1", model="X")
    assert disk.matches(moved)
    assert not disk.matches(taken)
    assert disk.matches(plain)
    assert not moved.matches(plain)
    assert not disk.matches(Place(filesystem="xfs", device="8:1", source="/dev/sda1"))


def text_of(**changes: Any) -> dict[str, Any]:
    """A valid profile file as plain values, with some settings changed."""
    return {
        "format": "uringmig-profiles",
        "version": 1,
        "profiles": [
            {
                "place": {"filesystem": "ext4", "device": "8:1", "source": "/dev/sda1"},
                "created": "2026-01-01T00:00:00+00:00",
                "settings": {
                    "channels": 2,
                    "depth": 8,
                    "block_size": 1 << 20,
                    "bridge": 0,
                    "engine": "auto",
                    "direct": "preferred",
                    **changes,
                },
                "measured": {"ceiling": 1, "rate": 1, "spread": 0, "request_seconds": 0},
            }
        ],
    }


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"channels": 0}, r"\$\.profiles\[0\]\.settings\.channels"),
        ({"channels": 256}, r"\$\.profiles\[0\]\.settings\.channels"),
        ({"depth": "8"}, r"\$\.profiles\[0\]\.settings\.depth"),
        ({"block_size": 5000}, r"\$\.profiles\[0\]\.settings\.block_size"),
        ({"block_size": 8 << 20}, r"\$\.profiles\[0\]\.settings\.block_size"),
        ({"bridge": -1}, r"\$\.profiles\[0\]\.settings\.bridge"),
        ({"bridge": 2 << 20}, r"bridge 2097152 .*\$\.profiles\[0\]\.settings"),
        ({"engine": "fast"}, r"\$\.profiles\[0\]\.settings\.engine"),
        ({"direct": True}, r"\$\.profiles\[0\]\.settings\.direct"),
        ({"speed": 1}, r"`speed` - at `\$\.profiles\[0\]\.settings"),
    ],
)
def test_malformed_settings_are_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(text_of(**changes)))
    with pytest.raises(FormatError, match=field):
        settings_for(tmp_path, file)
    with pytest.raises(FormatError, match=field):
        store_entry(entry_of(other_place(1)), file)
    assert json.loads(file.read_text()) == text_of(**changes), "a bad file is left as it is"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": "x", "version": 1, "profiles": []}',
        b'{"format": "uringmig-profiles", "version": 2, "profiles": []}',
        b" " * (BYTES_MAX + 1),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"p\.json"):
        read_entries(file)
    with pytest.raises(FormatError):
        check_writable(file)


def test_names_that_cannot_be_files(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        store_entry(entry_of(other_place(1)), tmp_path / "file" / "p.json")


OPTION_NAMES = ("channels", "depth", "block_size", "engine", "direct")


@given(
    explicit=st.sets(st.sampled_from(OPTION_NAMES)),
    block_size=st.integers(1, 1024).map(lambda pages: pages * PAGE_SIZE),
    bridge=st.integers(0, 4 << 20),
)
def test_asked_for_before_profile_before_default(
    explicit: set[str], block_size: int, bridge: int
) -> None:
    asked = WriteOptions(
        channels=7, depth=5, block_size=block_size, bridge=0, engine="pwrite", direct="off"
    )
    settings = ProfileSettings(
        channels=3, depth=16, block_size=4 << 20, bridge=bridge, engine="auto", direct="required"
    )
    tuned = settings.apply_to(asked, explicit=explicit)
    for name in OPTION_NAMES:
        winner = asked if name in explicit else settings
        assert getattr(tuned, name) == getattr(winner, name), name
    assert tuned.bridge == min(bridge, tuned.block_size)
    assert (tuned.rate, tuned.manifest, tuned.dense_up_to) == (0, True, asked.dense_up_to)


def test_read_options_take_a_profile_too() -> None:
    assert SETTINGS.apply_to(ReadOptions(rate=5)) == ReadOptions(
        channels=3, depth=16, block_size=4 << 20, bridge=8192, rate=5
    )


def test_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert default_file() == tmp_path / ".config/uringmig/profiles.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/xdg")
    assert default_file() == Path("/etc/xdg/uringmig/profiles.json")


def test_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(StateError, match="name the profile file"):
        default_file()
