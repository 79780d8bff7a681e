"""What a command loads: nothing it does not need, so that it begins at once.  Not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from archiveentries import add_entry

from uringmig.archive.directory import Archive

#: Runs a command line and prints which modules are loaded then.
RUN = """
import json, sys
from uringmig import cli
from uringmig.cli.output import Output
from uringmig.cli.session import Session
from uringmig.signals import Signals
with Signals() as signals:
    code = cli.run(sys.argv[1:], Session(Output(), signals))
print(json.dumps({"code": code, "modules": sorted(sys.modules)}))
"""
#: Each takes a tenth of a processor second, or some hundredths, to load.
HEAVY = {"asyncio", "msgspec", "numpy", "rich", "sqlite3", "ssl", "xxhash", "zstandard"}
#: Drawn in by nothing at all: other ways to read options, and what they draw in.
NEVER = {"typer", "pydantic", "matplotlib", "distributed", "pkg_resources"}


def loaded(*arguments: object) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    return said["code"], set(said["modules"])


def commands_of(modules: set[str]) -> set[str]:
    """Modules of single commands: all of the command line's but what every run has."""
    shared = {"command", "completion", "output", "parameters", "session", "table"}
    names = {name.removeprefix("uringmig.cli.") for name in modules if "uringmig.cli." in name}
    return names - shared


def test_version_loads_neither_numpy_nor_a_command() -> None:
    code, modules = loaded("--version")
    assert code == 0
    assert not modules & (HEAVY | NEVER)
    assert commands_of(modules) == {"version"}


def test_save_speaks_to_qemu_before_it_loads_the_writer(tmp_path: Path) -> None:
    """Nobody listens; what is loaded by then was needed to find that out."""
    code, modules = loaded("save", "--qmp", tmp_path / "nobody", tmp_path / "out.mig")
    assert code == 4
    assert not modules & (HEAVY | NEVER)
    assert commands_of(modules) == {"save"}
    assert "uringmig.writer" not in modules


def test_what_saves_loads_nothing_that_only_archives_need() -> None:
    """`save` waits for it with QEMU at hand; the guest is saved from then on."""
    code = "import json, sys, uringmig.qemu.sharedram; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert "uringmig.writer" in modules
    assert not modules & (NEVER | {"asyncio", "rich", "secrets", "sqlite3", "ssl", "zstandard"})
    # Its Python package; only the path of a file in it is needed.
    assert "liburing" not in modules
    rooms = {name.split(".")[1] for name in modules if name.startswith("uringmig.")}
    assert not rooms & {"archive", "batch", "bench", "cli", "reader", "testing", "verify"}
    contents = {name for name in modules if name.startswith("uringmig.contents.")}
    assert contents == {"uringmig.contents.devicestream"}


def test_listing_an_archive_loads_no_engine_and_no_qemu(tmp_path: Path) -> None:
    with Archive.open(tmp_path / "a", write=True) as archive:
        add_entry(archive, "one")
    code, modules = loaded("archive", "list", tmp_path / "a")
    assert code == 0
    assert not modules & (NEVER | {"asyncio", "rich", "zstandard"})
    assert commands_of(modules) == {"archive", "archive_list"}
    for name in ("uringmig.writer", "uringmig.storage.ring", "uringmig.batch", "uringmig.qemu"):
        assert name not in modules


@pytest.mark.parametrize(
    "command", ["load", "verify", "inspect", "convert", "diff", "archive show", "archive prune"]
)
def test_help_of_a_command_loads_that_command_alone(command: str) -> None:
    code, modules = loaded(*command.split(), "--help")
    assert code == 0
    assert not modules & NEVER
    *groups, name = command.split()
    assert commands_of(modules) - {"runlengths"} == {*groups, "_".join([*groups, name])}
