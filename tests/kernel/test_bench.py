"""`uringmig bench` on real file systems: what it says, what it leaves, and what a save makes of it.

Tiny and short: nothing here says how fast anything is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Ended, finish, start, uringmig
from loopdisk import mounted, needs, run
from smallguests import left_in

from uringmig.bench.directory import bench_directory
from uringmig.bench.profile import read_entries, settings_for
from uringmig.errors import StorageError
from uringmig.options import WriteOptions
from uringmig.storage.devices import place_of
from uringmig.storage.nameless import nameless_file

MIB = 1 << 20
SHORT = ("--size", "8M", "--seconds", "1")


@pytest.fixture
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile file that is not in the measured folder."""
    return tmp_path_factory.mktemp("profile") / "p.json"


def open_files(pid: int, folder: Path) -> list[str]:
    """What a process holds open below a folder."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    return [name for name in found if name.startswith(f"{folder}/")]


def test_bench_measures_says_and_keeps(tmp_path: Path, out: Path) -> None:
    done = uringmig("bench", tmp_path, *SHORT, "--out", out, "--json")
    assert (done.code, done.err) == (0, ""), done
    [said] = done.events()
    assert (said["event"], said["command"], said["folder"]) == ("result", "bench", str(tmp_path))
    assert said["engine"] == "io_uring"
    assert said["direct"] is True
    assert said["place"]["filesystem"] == place_of(str(tmp_path)).filesystem
    assert said["tried"] == 27
    for name in ("ceiling", "sized", "extending", "fallocated", "buffered"):
        assert said[name]["median"] > 0, name
        assert said[name]["rounds"] >= 1, name
    finalists = [one["rate"]["median"] for one in said["finalists"]]
    assert finalists == sorted(finalists, reverse=True)
    assert said["best"]["rate"]["median"] == finalists[0]
    for name in ("best", "chosen", "default"):
        assert said[name] in said["finalists"], name
    kept = WriteOptions(**said["settings"])
    chosen = said["chosen"]
    assert (kept.channels, kept.depth, kept.block_size) == (
        chosen["channels"],
        chosen["depth"],
        chosen["block_size"],
    )
    pages = said["bridge_pages"]
    assert kept.bridge == (4096 * (pages + 1) if pages else 0)
    [entry] = read_entries(out)
    assert settings_for(tmp_path / "vm.mig", out) == entry.settings
    assert entry.settings.channels == chosen["channels"]
    assert left_in(tmp_path) == []


def test_bench_for_people(tmp_path: Path, out: Path) -> None:
    done = uringmig("bench", tmp_path, *SHORT, "--out", out, "--direct", "off")
    assert (done.code, done.err) == (0, "")
    heads = [line.split()[0] for line in done.out.splitlines()]
    assert heads[1:] == [
        "ceiling",
        "best",
        "default",
        "chosen",
        "O_DIRECT",
        "file",
        "gaps",
        "profile",
    ]
    assert re.search(r"^O_DIRECT +off$", done.out, re.MULTILINE)
    assert read_entries(out)[0].settings.direct == "off"


def test_pwrite_has_no_depth_to_try(tmp_path: Path, out: Path) -> None:
    done = uringmig("bench", tmp_path, *SHORT, "--out", out, "--json", "--engine", "pwrite")
    said = done.result()
    assert (done.code, said["engine"], said["tried"]) == (0, "pwrite", 9)
    assert said["settings"]["engine"] == "pwrite"
    assert said["settings"]["depth"] == WriteOptions().depth


def test_the_default_place_is_in_the_config_folder(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(out.parent))
    assert uringmig("bench", tmp_path, *SHORT, "--quiet") == Ended(0, "", "")
    assert settings_for(tmp_path, out.parent / "uringmig" / "profiles.json") is not None


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "read-only"])
def test_nothing_measured_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """Where no profile can be kept that is told first, and the result all the same."""
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    with contextlib.ExitStack() as stack:
        if home == "read-only":
            home = str(stack.enter_context(mounted("tmpfs", tmp_path, size=MIB)))
            run("mount", "-o", "remount,ro", home)
        monkeypatch.setenv("HOME", home)
        done = uringmig("bench", tmp_path, *SHORT, "--json")
        assert done.code == 1
        assert done.err.startswith("uringmig: warning: the profile is not kept: ")
        assert "--out" in done.err
        assert done.result()["settings"]
        named = uringmig("bench", tmp_path, *SHORT, "--out", f"{home}/p.json", "--json")
        assert (named.code, named.err.count("\n")) == (5, 1)
        assert [event["event"] for event in named.events()] == ["error"]


@pytest.fixture
def no_direct(tmp_path: Path) -> Iterator[Path]:
    """A file system without O_DIRECT; tmpfs has it since Linux 6.6."""
    needs()
    run("mount", "-t", "ramfs", "none", str(tmp_path))
    yield tmp_path
    run("umount", str(tmp_path))


def test_no_direct_is_told_and_kept(no_direct: Path, out: Path) -> None:
    done = uringmig("bench", no_direct, *SHORT, "--out", out, "--json")
    said = done.result()
    assert done.code == 0, done
    assert said["direct"] is False
    assert said["buffered"] is said["fallocated"] is None
    assert said["settings"]["direct"] == "off"
    assert re.search(rf"note: {no_direct}: no O_DIRECT", done.err)
    assert len(said["notes"]) == 1
    required = uringmig("bench", no_direct, *SHORT, "--out", out, "--direct", "required")
    assert required.code == 5
    assert f"{no_direct}: O_DIRECT is required" in required.err
    assert left_in(no_direct) == []


def test_too_little_room_is_refused_at_once(tmp_path: Path, out: Path) -> None:
    with mounted("tmpfs", tmp_path, size=8 * MIB) as folder:
        done = uringmig("bench", folder, "--out", out, "--json")
        assert done.code == 5
        assert done.err.count("\n") == 1
        assert "too little room: 8.0 MiB are free and 528.0 MiB are needed" in done.err
        assert not out.exists()
        assert left_in(folder) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room that goes after the check: told with the number, and given back."""
    monkeypatch.setattr("uringmig.bench.directory._check_room", lambda folder, size: None)
    with mounted(kind, tmp_path, size=320 * MIB) as folder:
        status = os.statvfs(folder)
        with (folder / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - 32 * MIB)
        free = os.statvfs(folder).f_bavail
        with pytest.raises(StorageError) as caught:
            bench_directory(folder, size=512 * MIB, seconds=60.0, seed=1)
        assert caught.value.errno == errno.ENOSPC
        assert str(folder) in str(caught.value)
        assert set(left_in(folder)) <= {"lost+found", "ballast"}
        deadline = time.monotonic() + 60  # xfs gives room back in the background
        while os.statvfs(folder).f_bavail < free - 1024 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert os.statvfs(folder).f_bavail >= free - 1024


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing(tmp_path: Path, out: Path, number: signal.Signals) -> None:
    """Not even SIGKILL: the files have no name."""
    process = start("bench", tmp_path, "--size", "16M", "--seconds", "60", "--out", out)
    deadline = time.monotonic() + 60
    while not open_files(process.pid, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    ended = finish(process)
    assert ended.code == (-number if number == signal.SIGKILL else 128 + number)
    assert ended.out == ""
    assert left_in(tmp_path) == []
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--size", "4M"),
        ("--size", "big"),
        ("--seconds", "0"),
        ("--seconds", "1e9"),
        ("--seconds", "nan"),
        ("--engine", "fast"),
    ],
)
def test_usage_is_2(tmp_path: Path, out: Path, arguments: tuple[str, ...]) -> None:
    assert uringmig("bench", tmp_path, *arguments, "--out", out).code == 2


def test_a_bad_folder_is_5_and_a_bad_profile_3(tmp_path: Path, out: Path) -> None:
    missing = uringmig("bench", tmp_path / "missing", *SHORT, "--out", out)
    assert (missing.code, missing.err.count("\n")) == (5, 1)
    out.write_text("{}]")
    bad = uringmig("bench", tmp_path, *SHORT, "--out", out)
    assert (bad.code, bad.err.count("\n")) == (3, 1)
    assert out.read_text() == "{}]"


def test_nameless_file_without_o_tmpfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no O_TMPFILE the name is there for a moment only."""
    real_open = os.open
    names: list[str] = []

    def refuse(path: str, flags: int, *arguments: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE")
        names.append(path)
        return real_open(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with nameless_file(str(tmp_path)) as file:
        file.write_at(0, b"x")
        assert left_in(tmp_path) == []
    assert len(names) == 1
    assert names[0].startswith(str(tmp_path))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_allocated_blocks_are_there_and_read_as_zeros(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path, size=320 * MIB) as folder, nameless_file(str(folder)) as file:
        file.set_size(4 * MIB)
        file.write_at(MIB, b"x" * 4096)
        file.allocate(0, 4 * MIB)
        assert os.fstat(file.fd).st_blocks * 512 >= 4 * MIB
        assert file.read_at(0, 4 * MIB) == bytes(MIB) + b"x" * 4096 + bytes(3 * MIB - 4096)
        with pytest.raises(StorageError, match=f"{folder}: fallocate failed") as caught:
            file.allocate(0, 1 << 40)
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_a_place_is_recognised(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path, size=320 * MIB) as folder:
        (folder / "below").mkdir()
        place = place_of(str(folder))
        assert place.filesystem == kind
        assert place_of(str(folder / "below")) == place
        assert not place.matches(place_of(str(tmp_path)))
        if kind == "tmpfs":
            assert (place.source, place.identity) == ("tmpfs", "tmpfs")
        else:
            number = Path(place.source).stat().st_rdev
            assert place.device == f"{os.major(number)}:{os.minor(number)}"
            assert place.identity == str(tmp_path / f"{kind}.disk")
