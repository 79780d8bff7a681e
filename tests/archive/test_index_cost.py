"""What one entry costs does not grow with the others: told by the system calls that it takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from archiveentries import add_entry

from uringmig.archive.directory import Archive

#: Does ACTION between two looks at files that are not there; every file counts as settled.
CHILD = """
import os, sys
from uringmig.archive import looking
from uringmig.archive.directory import Archive
looking._SETTLED_NS = 0
folder, action = sys.argv[1:]
Archive.open(folder, write=True).close()
archive = Archive.open(folder, write=action == "remove")
os.access("/begin", os.F_OK)
if action == "open":
    Archive.open(folder, write=True).close()
elif action == "find":
    archive.find("the-one")
elif action == "has":
    assert not archive.has("nobody")
elif action == "latest_of":
    assert archive.latest_of("alone").name == "the-one"
else:
    archive.remove("the-one")
os.access("/end", os.F_OK)
"""


def calls_of(folder: Path, action: str) -> list[str]:
    """What the action asks of the file system, one line a call."""
    trace = folder.parent / f"{folder.name}.trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=%file,read,getdents64",
               sys.executable, "-c", CHILD, str(folder), action]  # fmt: skip
    subprocess.run(command, check=True)
    lines = trace.read_text().splitlines()
    begin, end = (
        next(n for n, line in enumerate(lines) if f'"/{mark}"' in line) for mark in ("begin", "end")
    )
    return lines[begin + 1 : end]


def archive_of(folder: Path, others: int) -> Path:
    with Archive.open(folder, write=True) as archive:
        add_entry(archive, "the-one", vm="alone", ram_bytes=1 << 16)
        for number in range(others):
            add_entry(archive, f"other{number}", ram_bytes=1 << 16)
    return folder


@pytest.mark.parametrize("action", ["find", "has", "latest_of", "remove"])
def test_one_entry_costs_the_same_among_many(tmp_path: Path, action: str) -> None:
    """Neither files nor manifests of others are looked at: a prune of thousands asks thousands."""
    few, many = (calls_of(archive_of(tmp_path / f"a{n}", n), action) for n in (1, 30))
    assert few
    assert len(few) == len(many)


def test_opening_for_writing_reads_no_manifest_again(tmp_path: Path) -> None:
    """A file that is the same by inode, size and both times is not read to be compared."""
    calls = calls_of(archive_of(tmp_path / "a", 5), "open")
    assert any("stat" in call and "other4.mig.manifest.json" in call for call in calls)
    assert not [call for call in calls if re.search(r"^\d+ +open(at)?\(.*manifest\.json", call)]
