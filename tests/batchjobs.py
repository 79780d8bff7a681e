"""Job files, small images as their sources, and runs of the real program over them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from commandline import PROGRAM, Ended, uringmig
from numpy.typing import NDArray
from smallguests import aligned, left_in

from uringmig import MappedRamWriter, RamBlock, verify
from uringmig.archive.cold import open_cold
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.archive.healing import HealReport
from uringmig.contents.source import Contents, all_rows
from uringmig.testing.guests import PatternName, fill_guest
from uringmig.units import MiB

#: No measuring of disks: their limits are in the job file.
DEPTHS = '[devices."."]\ndepth = 64\n'


def make_image(
    path: Path, *, size: int = 16 * MiB, pattern: PatternName = "mixed", seed: int = 0
) -> NDArray[np.uint8]:
    """Write a mapped-ram image; returns its memory."""
    memory = aligned(size)
    fill_guest(memory, pattern, seed=seed)
    with MappedRamWriter(path, [RamBlock("pc.ram", memory)]) as writer:
        writer.write_all()
        writer.finish()
    return memory


def job(name: str, source: str, **settings: object) -> str:
    """One job as TOML; ``source`` is the inside of its inline table."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(["[[jobs]]", f'name = "{name}"', f"source = {{ {source} }}", *lines, ""])


def write_jobs(folder: Path, *jobs: str, defaults: str = "", head: str = DEPTHS) -> Path:
    """Write a job file whose archive is ``archive`` beside it."""
    path = folder / "jobs.toml"
    path.write_text(f'[defaults]\narchive = "archive"\n{defaults}\n{head}\n' + "\n".join(jobs))
    return path


def run_jobs(path: Path, *options: object) -> Ended:
    """Run a job file with ``--json``."""
    return uringmig("archive", "run", path, "--json", *options)


def start_jobs(path: Path, *options: object) -> subprocess.Popen[str]:
    """Start a run in a process group of its own, and leave it running."""
    return subprocess.Popen(
        [*PROGRAM, "archive", "run", str(path), "--json", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill -9 the runner alone, and wait until its workers have noticed."""
    workers = children(process.pid)
    process.kill()
    process.communicate()
    for worker in workers:
        wait_until_gone(worker)


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found: list[int] = []
    # Each is listed with the thread that started it; threads come and go.
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, listing.read_text().split())
    return found


def wait_until_gone(pid: int, *, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, f"process {pid} does not end"
        time.sleep(0.01)


def summary_of(ended: Ended) -> dict[str, Any]:
    """The summary event."""
    (found,) = [event for event in ended.events() if event["event"] == "summary"]
    return found


def job_ends(ended: Ended) -> dict[str, dict[str, Any]]:
    """The end of each job, by its name, from the summary."""
    return {one["job"]: one for one in summary_of(ended)["jobs"]}


def memory_of(contents: Contents) -> dict[str, bytes]:
    """A guest's whole memory, by block."""
    blocks = [bytearray(block.used_length) for block in contents.blocks]
    for window in contents.windows(all_rows(contents.blocks)):
        if window.data is None:
            pieces = [(0, len(window.memory))]
        else:
            pieces = list(zip(window.data.start.tolist(), window.data.length.tolist(), strict=True))
        for start, length in pieces:
            at = window.row * (4 * MiB) + start
            blocks[window.block_index][at : at + length] = window.memory[
                start : start + length
            ].tobytes()
    return {
        block.idstr: bytes(memory) for block, memory in zip(contents.blocks, blocks, strict=True)
    }


def check_archive(folder: Path) -> dict[str, Entry]:
    """Every entry is whole, nothing half-made is there, and the catalogue agrees with the disk."""
    with Archive.open(folder, write=False) as archive:
        entries = {entry.name: entry for entry in archive.entries()}
    with Archive.open(folder, write=True) as archive:
        healed = archive.healed
        assert healed == HealReport()
        assert not archive.unfinished()
    for entry in entries.values():
        if entry.tier == "hot":
            assert not verify(entry.image).mismatches
        else:
            with open_cold(Path(entry.image)) as contents:
                memory_of(contents)
    expected = {Path(entry.image).name for entry in entries.values()}
    expected |= {Path(entry.manifest).name for entry in entries.values()}
    others = {name for name in left_in(folder) if not name.startswith((".", "catalogue.sqlite"))}
    assert others == expected
    return entries


def first_event(process: subprocess.Popen[str], name: str, **fields: object) -> dict[str, Any]:
    """Read events until one of a name with these fields comes."""
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == name and all(event[key] == value for key, value in fields.items()):
            return event
        seen.append(line)
    _, errors = process.communicate()
    raise AssertionError(f"no event {name} {fields} but {''.join(seen)} and {errors}")
