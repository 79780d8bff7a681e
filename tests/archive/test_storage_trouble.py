"""Every command on an archive where storage is in trouble: what it does there, and its exit code.

Cleaning up must not need what has run out: a full disk can be listed, checked, restored from and
pruned; one that is read-only can be read; and a catalogue that is broken stops nobody.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archiveentries import add_entry
from commandline import uringmig
from loopdisk import mounted, needs, run
from otheruser import let_everybody_search
from smallguests import MIB

from uringmig.archive.directory import Archive

#: What each of them needs at least.
SIZES = {"ext4": 64 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB, "tmpfs": 64 * MIB}
#: Exit codes where nothing can be written: what only reads works. Verification is done, but when an
#: entry was found good cannot be kept.
FULL = {"list": 0, "show": 0, "verify": 1, "restore": 0, "prune": 0, "reindex": 5, "run": 5}


@pytest.fixture(params=[*SIZES, "btrfs-quota"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of each kind, with an archive in it: two images of one machine, unchecked."""
    kind = request.param.partition("-")[0]
    with mounted(kind, tmp_path, size=SIZES[kind]) as point:
        if request.param == "btrfs-quota":
            run("btrfs", "quota", "enable", str(point))
            run("btrfs", "subvolume", "create", str(point / "sub"))
            run("btrfs", "qgroup", "limit", "40M", str(point / "sub"))
            point = point / "sub"
        with Archive.open(point / "a", write=True) as archive:
            for number in (1, 2):
                add_entry(archive, f"e{number}", created=f"2026-01-0{number}T00:00:00+00:00",
                          seed=number, ram_bytes=4 * MIB)  # fmt: skip
        yield point


def fill(folder: Path) -> None:
    """Take all the room there is, to the last byte."""
    for number, size in enumerate((MIB, 4096, 512)):
        with contextlib.suppress(OSError), (folder / f"fill{number}").open("wb", 0) as file:
            while True:
                file.write(os.urandom(size))
    for number in range(100_000):
        try:
            (folder / f"more{number}").write_bytes(b"x" * 64)
        except OSError:
            break
    with contextlib.suppress(OSError):
        os.sync()


def codes_of(point: Path, outside: Path, *commands: str) -> dict[str, int]:
    """Exit codes of commands on the archive; none may end with a traceback or say too much."""
    image = outside / "source.mig"
    jobs = outside / "jobs.toml"
    jobs.write_text(
        f'[[jobs]]\nname = "n"\narchive = "{point}/a"\nsource = {{ image = "{image}" }}\n'
        # Runs within one second would find that the entry is there already.
        f'entry = "n-{uuid.uuid4()}"\n'
    )
    words: dict[str, list[object]] = {
        "list": [point / "a"],
        "show": [point / "a", "e1"],
        "verify": [point / "a"],
        "restore": [point / "a", "e1", outside / "out.mig"],
        "prune": [point / "a", "--keep-last", 1],
        "delete": [point / "a", "--keep-last", 1, "--delete"],
        "reindex": [point / "a"],
        "run": [jobs],
    }
    codes = {}
    for command in commands:
        ended = uringmig("archive", "prune" if command == "delete" else command, *words[command])
        assert "Traceback" not in ended.err, ended.err
        assert len(ended.err.splitlines()) <= 3, ended.err
        codes[command] = ended.code
    return codes


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder on another disk, with an image to archive."""
    with Archive.open(tmp_path / "other", write=True) as archive:
        add_entry(archive, "source", ram_bytes=8 * MIB)
    return tmp_path / "other"


def test_full_disk_is_read_and_pruned(disk: Path, outside: Path) -> None:
    """Nothing but what writes fails, in one line; pruning needs no room, and makes some."""
    fill(disk)
    codes = codes_of(disk, outside, *FULL)
    # A small file may still fit where a large one does not.
    for command in ("verify", "reindex"):
        assert codes.pop(command) in (0, FULL[command])
    assert codes == {name: code for name, code in FULL.items() if name in codes}
    assert codes_of(disk, outside, "delete") == {"delete": 0}
    assert uringmig("archive", "list", disk / "a", "--names").out == "e2\n"
    assert not list((disk / "a").glob("e1*"))
    assert uringmig("archive", "verify", disk / "a").code in (0, 1)
    for path in disk.glob("fill*"):
        path.unlink()
    with contextlib.suppress(OSError):
        os.sync()
    assert codes_of(disk, outside, "reindex", "run") == {"reindex": 0, "run": 0}
    ended = uringmig("archive", "verify", disk / "a")
    assert (ended.code, ended.err) == (0, "")


def test_damage_on_a_full_disk_is_told_though_it_cannot_be_kept(disk: Path) -> None:
    """The exit code and a line say it; the only good copy is not pruned for it."""
    with (disk / "a" / "e2.mig").open("r+b") as file:
        file.seek(MIB + 100)
        file.write(b"rot")
    fill(disk)
    ended = uringmig("archive", "verify", disk / "a")
    assert ended.code == 3
    assert "e2: ramblock" in ended.out
    (disk / "a" / "e2.mig").unlink()
    ended = uringmig("archive", "prune", disk / "a", "--keep-last", 1, "--delete")
    assert ended.code == 1, ended.out + ended.err
    assert "its image is missing" in ended.err
    assert (disk / "a" / "e1.mig").exists(), "one that is missing does not count"


def test_read_only_disk_is_read(tmp_path: Path, outside: Path) -> None:
    """Whatever only reads works without a word; what writes says why it cannot, in one line."""
    with mounted("ext4", tmp_path, size=SIZES["ext4"]) as point:
        with Archive.open(point / "a", write=True) as archive:
            for number in (1, 2):
                add_entry(archive, f"e{number}", created=f"2026-01-0{number}T00:00:00+00:00")
        run("mount", "-o", "remount,ro", str(point))
        assert codes_of(point, outside, *FULL, "delete") == FULL | {"delete": 5}


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_folder_whose_files_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    """Its names can be read and nothing behind them: lines, and no traceback."""
    needs()
    with Archive.open(tmp_path / "a", write=True) as archive:
        add_entry(archive, "e1")
    let_everybody_search(tmp_path)
    archive.path.chmod(0o444)
    code = (
        "import os, sys; from uringmig.archive.directory import Archive\n"
        "os.setuid(65534); archive = Archive.open(sys.argv[1], write=False)\n"
        "print([entry.name for entry in archive.entries()], archive.has('e1'), *archive.notes)"
    )
    command = [sys.executable, "-c", code, str(archive.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"[] False {archive.path}/e1.mig")
    assert "EACCES" in done.stdout


Breakage = Callable[[Path], object]
BROKEN: dict[str, Breakage] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, 5000),
    "noise": lambda path: path.write_bytes(os.urandom(9000)),
    "gone": lambda path: path.unlink(),
    "a folder": make_folder,
    "a fifo": make_fifo,
    "log": lambda path: Path(f"{path}-wal").write_bytes(b"noise" * 99),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_broken_catalogue_stops_nobody(tmp_path: Path, outside: Path, breakage: str) -> None:
    """Readers go round it, the first writer makes a new one and warns; all goes on."""
    needs()
    with Archive.open(tmp_path / "a", write=True) as archive:
        for number in (1, 2):
            add_entry(archive, f"e{number}", created=f"2026-01-0{number}T00:00:00+00:00")
    BROKEN[breakage](tmp_path / "a" / "catalogue.sqlite")
    codes = codes_of(tmp_path, outside, "list", "show", "verify", "restore", "prune", "run")
    assert codes_of(tmp_path, outside, "run") == {"run": 0}
    reading = {"list": 0, "show": 0, "verify": 1, "restore": 0, "prune": 0}
    assert {name: codes[name] for name in reading} == reading
    ended = uringmig("archive", "list", tmp_path / "a")
    assert (ended.code, len(ended.out.splitlines())) == (0, 6), "e1, e2, and two of the runs"
    assert ended.err == "", "there is a catalogue again"
    assert codes_of(tmp_path, outside, "reindex", "verify") == {"reindex": 0, "verify": 0}
