"""How often and how fast the bytes of an archive job's source are read, by its system calls."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from batchjobs import job, job_ends, make_image, run_jobs, write_jobs
from commandline import PROGRAM, uringmig
from loopdisk import mounted
from plainstreams import random_stream
from smallguests import left_in

from uringmig.batch.attempt import carry_out
from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Estimate, Examine
from uringmig.contents.opening import open_contents
from uringmig.units import MiB

#: Both ends of a stream, looked at for its kind, its blocks and its vmdescription, a few times.
ENDS_BYTES = 6 * MiB
READS = re.compile(r"^(\d+\.\d+) (?:read|pread64|preadv|preadv2)\(\d+<([^>]*)>.* = (\d+)$")


@dataclass(frozen=True)
class Reads:
    """Reads of one file, in their order: when, in seconds, and how many bytes."""

    reads: list[tuple[float, int]]

    @property
    def total_bytes(self) -> int:
        return sum(count for _, count in self.reads)


def traced(folder: Path, source: Path, *arguments: object) -> Reads:
    """Run the program to its end, all its processes traced."""
    folder.mkdir()
    strace = ["strace", "-ff", "-ttt", "-y", "-e", "trace=read,pread64,preadv,preadv2"]
    done = subprocess.run(
        [*strace, "-o", str(folder / "t"), *PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    matches = [
        match
        for trace in folder.iterdir()
        for line in trace.read_text().splitlines()
        if (match := READS.match(line)) and match[2] == str(source)
    ]
    return Reads(sorted((float(match[1]), int(match[3])) for match in matches))


def make_source(folder: Path, kind: str) -> Path:
    """A source of some 10 MiB."""
    source = folder / "source"
    stream, _ = random_stream(1)
    if kind == "mapped-ram":
        make_image(source, size=12 * MiB, pattern="dense")
    elif kind == "plain":
        source.write_bytes(stream)
    else:
        xml = b"<domain/>\0"
        header = b"LibvirtQemudSave" + struct.pack("<5I", 2, 4096 - 92, 1, 0, 0) + bytes(56)
        source.write_bytes((header + xml).ljust(4096, b"\0") + stream)
    return source


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize(("kind", "times"), [("plain", 2), ("libvirt", 2), ("mapped-ram", 1)])
def test_a_source_is_read_no_more_often_than_it_must_be(
    tmp_path: Path, kind: str, times: int, tier: str
) -> None:
    """A stream twice, once for its index; an image once. A plan reads next to nothing."""
    source = make_source(tmp_path, kind)
    size = source.stat().st_size
    settings = 'engine = "pwrite"\nverify = true\n'
    path = write_jobs(tmp_path, job("a", f'image = "{source}"', tier=tier), defaults=settings)
    planned = traced(tmp_path / "planned", source, "archive", "run", path, "--dry-run")
    sample = size if (kind, tier) == ("mapped-ram", "cold") else size // 8
    assert 0 < planned.total_bytes <= sample + ENDS_BYTES
    whole = traced(tmp_path / "run", source, "archive", "run", path)
    assert size / 2 < whole.total_bytes <= times * size + sample + ENDS_BYTES


@pytest.mark.parametrize("kind", ["plain", "libvirt", "mapped-ram"])
def test_a_source_is_never_read_faster_than_its_job_may(tmp_path: Path, kind: str) -> None:
    """From the first byte on, so in opening, too: whatever has been read is paid for in time."""
    rate, request, in_flight = 8 * MiB, 256 << 10, 2 * 2
    source = make_source(tmp_path, kind)
    path = write_jobs(
        tmp_path,
        job("a", f'image = "{source}"', rate=rate, block_size=request, channels=2, depth=2),
        defaults='engine = "pwrite"\n',
    )
    done = traced(tmp_path / "run", source, "archive", "run", path)
    # What is in flight at first need not wait, in each of the two times that a stream is read.
    free = ENDS_BYTES + 2 * in_flight * request
    began, read_bytes = done.reads[0][0], 0
    for at, count in done.reads:
        read_bytes += count
        assert read_bytes <= free + rate * (at - began + 0.001)
    assert read_bytes > (1 if kind == "mapped-ram" else 2) * 0.8 * source.stat().st_size


@pytest.mark.parametrize("kind", ["plain", "libvirt", "mapped-ram"])
def test_a_source_that_has_not_changed_is_known_by_looking(tmp_path: Path, kind: str) -> None:
    """What a plan finds is what the copy wrote down, though it read far less of the source."""
    source = make_source(tmp_path, kind)
    path = write_jobs(tmp_path, job("a", f'image = "{source}"'), defaults='entry = "{name}"\n')
    assert run_jobs(path).code == 0
    again = run_jobs(path)
    assert again.code == 0, again.err
    assert job_ends(again)["a"]["stage"] == "skipped"
    with source.open("r+b") as file:
        file.seek(source.stat().st_size)
        source.touch()
    assert run_jobs(path).code == 2, "another version of the source is another entry"


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("kind", ["plain", "libvirt"])
def test_what_is_only_looked_at_is_estimated_from_its_length(
    tmp_path: Path, kind: str, tier: str
) -> None:
    """Never less than what there is, and said to be a bound: in the plan's rows and its table."""
    source = make_source(tmp_path, kind)
    path = write_jobs(tmp_path, job("a", f'image = "{source}"', tier=tier))
    [one] = parse_jobs(path.read_text(), path=str(path)).jobs
    estimate = carry_out(Examine(key="a", job=one), lambda _: None)
    assert isinstance(estimate, Estimate)
    with open_contents(source) as contents:
        assert estimate.memory_bytes == sum(block.used_length for block in contents.blocks)
        assert contents.stored_bytes() < estimate.stored_bytes <= estimate.memory_bytes
        assert estimate.fingerprint == contents.fingerprint()
    assert (estimate.kind, estimate.at_most) == (kind, True)
    planned = uringmig("archive", "run", path, "--dry-run", "--json")
    [row] = planned.result()["plan"]["rows"]
    assert (planned.code, row["at_most"], row["stored_at_most"]) == (0, True, True)
    assert "<= " in uringmig("archive", "run", path, "--dry-run").out


def test_a_stream_that_does_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """Its plan can only warn; once its pages are counted the disk is not filled for nothing."""
    source = make_source(tmp_path, "plain")
    with mounted("tmpfs", tmp_path, size=6 * MiB) as disk:
        path = write_jobs(tmp_path, job("a", f'image = "{source}"', archive=str(disk / "archive")))
        done = run_jobs(path)
        assert done.code == 5
        assert "may not fit: the plan needs at most" in done.err
        assert "are free" in job_ends(done)["a"]["error"]
        assert not [name for name in left_in(disk / "archive") if name.endswith(".partial")]
    with mounted("ext4", tmp_path, size=32 * MiB) as disk:
        # More than is free by its length alone, which the pages that come again have made.
        path = write_jobs(tmp_path, job("a", f'image = "{source}"', archive=str(disk / "archive")))
        with (disk / "filler").open("wb") as filler:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            os.posix_fallocate(filler.fileno(), 0, free - 14 * MiB)
        done = run_jobs(path)
        assert done.code == 0, done.err
        assert "may not fit" in done.err
