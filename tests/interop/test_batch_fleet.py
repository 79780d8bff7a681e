"""A fleet in one run: guests that QEMU saved in every form, running ones, memory files, ours.

Eight images of 16 to 128 MiB; with URINGMIG_FLEET=full twenty of 64 MiB to 2 GiB, which needs about
15 GiB of disk and 5 GiB of memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import xxhash
from batchjobs import (
    check_archive,
    first_event,
    job,
    job_ends,
    make_image,
    run_jobs,
    start_jobs,
    summary_of,
    write_jobs,
)
from commandline import Ended, finish, uringmig
from loopdisk import mounted
from qemuprocess import BINARY, QemuProcess
from realguest import shared_path
from smallguests import aligned

from uringmig import MappedRamReader
from uringmig.archive.directory import Archive
from uringmig.archive.restoring import restore_file
from uringmig.testing.guests import fill_guest
from uringmig.units import MiB, align_down

pytestmark = pytest.mark.skipif(BINARY is None, reason="qemu-system-x86_64 is not installed")

FULL = os.environ.get("URINGMIG_FLEET") == "full"
COUNT, LEAST, MOST = (20, 64 * MiB, 2048 * MiB) if FULL else (8, 16 * MiB, 128 * MiB)
#: These stay in memory as long as the fleet does.
IN_MEMORY_MOST = MOST // 4
KINDS = ("live", "memory", "mapped", "ours", "plain", "raw", "offset", "sparse")
LIBVIRT_XML = b"<domain type='qemu'><name>web1</name></domain>\0"
LIBVIRT_DATA = 0x8000
OFFSET = 0x3000


@dataclass(frozen=True)
class Ship:
    """One source: its job's ``source``, its kind, and the digest of its pc.ram."""

    name: str
    source: str
    kind: str
    digest: str


def libvirt_header(form: int) -> bytes:
    fields = struct.pack("<5I", 2, LIBVIRT_DATA, 1, form, 0)
    return (b"LibvirtQemudSave" + fields + bytes(56) + LIBVIRT_XML).ljust(92 + LIBVIRT_DATA, b"\0")


def make_ram(stack: ExitStack, size: int, seed: int) -> tuple[Path, str]:
    """A guest's memory in /dev/shm, half of it in pages, with holes; and its digest."""
    path = shared_path()
    stack.callback(path.unlink, missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    memory = np.memmap(path, np.uint8, "r+")
    fill_guest(memory, "mixed", seed=seed)
    return path, xxhash.xxh3_128_hexdigest(memory.data)


def save_by(folder: Path, ram: Path, kind: str, image: Path) -> None:
    """Have a stock QEMU save a guest in one of its forms, or in libvirt's."""
    offsets = {"offset": OFFSET, "sparse": 92 + LIBVIRT_DATA, "raw": 92 + LIBVIRT_DATA}
    offset = f",offset={offsets[kind]}" if kind in offsets else ""
    capabilities = {"memory": ["x-ignore-shared"], "plain": [], "raw": []}.get(kind, ["mapped-ram"])
    with QemuProcess(folder, ram=ram) as qemu:
        qemu.save(f"file:{image}{offset}", capabilities=capabilities, max_bandwidth=0)
    if kind in ("raw", "sparse"):
        with image.open("r+b") as file:
            file.write(libvirt_header(0 if kind == "raw" else 6))


def make_ship(stack: ExitStack, folder: Path, number: int) -> Ship:
    """Make one source; what it needs ends with the stack."""
    kind = KINDS[number % len(KINDS)]
    size = round(LEAST * (MOST / LEAST) ** (number / (COUNT - 1)))
    if kind in ("live", "memory"):
        size = min(size, IN_MEMORY_MOST)
    size = align_down(size, 2 * MiB)
    name = f"{kind}{number}"
    image = folder / f"{name}.img"
    if kind == "ours":
        digest = xxhash.xxh3_128_hexdigest(make_image(image, size=size, seed=number).data)
        return Ship(name, f"image = '{image}'", "mapped-ram", digest)
    keep = stack if kind in ("live", "memory") else stack.enter_context(ExitStack())
    ram, digest = make_ram(keep, size, number)
    if kind == "live":
        qmp = folder / f"{name}.qmp"
        listen = ["-qmp", f"unix:{qmp},server=on,wait=off"]
        stack.enter_context(QemuProcess(folder, ram=ram, arguments=listen))
        return Ship(name, f"qmp = '{qmp}'", "qmp", digest)
    save_by(folder, ram, kind, image)
    if kind == "memory":
        source = f"memory = {{ 'pc.ram' = '{ram}' }}, device_state = '{image}'"
        return Ship(name, source, "memory", digest)
    keep.close()
    source = f"image = '{image}'" + (f", offset = {OFFSET}" if kind == "offset" else "")
    kinds = {"plain": "plain", "raw": "libvirt", "sparse": "libvirt"}
    return Ship(name, source, kinds.get(kind, "mapped-ram"), digest)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Ship]]:
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        yield [make_ship(stack, folder, number) for number in range(COUNT)]
    for path in folder.iterdir():
        path.unlink()


def jobs_of(fleet: list[Ship]) -> list[str]:
    return [
        job(ship.name, ship.source, tier="cold" if number % 3 == 1 else "hot")
        for number, ship in enumerate(fleet)
    ]


def check_restored(archive: Path, ship: Ship, out: Path) -> None:
    """Restore an entry to a hot image, and compare its RAM with what the guest had."""
    with Archive.open(archive, write=False) as opened:
        restore_file(opened, ship.name, out)
    with MappedRamReader(out) as reader:
        memory = aligned(
            next(block.used_length for block in reader.blocks if block.idstr == "pc.ram")
        )
        reader.read_into("pc.ram", memory)
    assert xxhash.xxh3_128_hexdigest(memory.data) == ship.digest, f"{ship.name} differs"
    out.unlink()
    Path(f"{out}.manifest.json").unlink(missing_ok=True)


def test_a_fleet_of_every_kind(fleet: list[Ship], tmp_path: Path) -> None:
    path = write_jobs(tmp_path, *jobs_of(fleet), defaults='entry = "{name}"')
    report = tmp_path / "report"
    ended = run_jobs(path, "--report", report)
    assert ended.code == 0, ended.err
    ends = job_ends(ended)
    archive = tmp_path / "archive"
    entries = check_archive(archive)
    assert list(ends) == [ship.name for ship in fleet]
    for ship in fleet:
        assert ends[ship.name]["archived"]["kind"] == entries[ship.name].source_kind == ship.kind
        check_restored(archive, ship, tmp_path / "restored")
    verified = uringmig("archive", "verify", archive)
    assert verified.code == 0, verified.err
    totals = summary_of(ended)
    assert totals["peak_worker_bytes"] < 160 * MiB
    (text,) = report.glob("*.md")
    assert f"{COUNT} done" in text.read_text()


def run_while_filling(path: Path, disk: Path) -> Ended:
    """Run jobs, and take a disk's space away once the job that writes there is at work."""
    process = start_jobs(path)
    first_event(process, "progress", job="full")
    with contextlib.suppress(OSError), (disk / "taken").open("wb") as file:
        while True:
            file.write(bytes(MiB))
            file.flush()
    return finish(process)


def test_a_fleet_with_hostile_ones_a_full_disk_and_a_peer_that_hangs(
    fleet: list[Ship], tmp_path: Path
) -> None:
    """The good ones are whole, each bad one has one clear line of its own."""
    make_image(tmp_path / "good.img")
    whole = (tmp_path / "good.img").read_bytes()
    (tmp_path / "cut.img").write_bytes(whole[:3000])
    (tmp_path / "noise.img").write_bytes(os.urandom(1 << 16))
    bent = bytearray(whole)
    bent[whole.index(b"pc.ram") + 6] ^= 0x80
    (tmp_path / "bent.img").write_bytes(bent)
    dense = tmp_path / "dense.img"
    make_image(dense, size=48 * MiB, pattern="dense")
    with ExitStack() as stack:
        disk = stack.enter_context(mounted("ext4", tmp_path, size=96 * MiB))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "hangs"))
        listener.listen(8)
        bad = [
            *(job(name, f"image = '{name}.img'") for name in ("cut", "noise", "bent")),
            job("full", f"image = '{dense}'", archive=str(disk / "archive"), rate="24M"),
            job("hangs", "qmp = 'hangs'", timeout="2s"),
        ]
        path = write_jobs(tmp_path, *jobs_of(fleet), *bad, defaults='entry = "{name}"')
        ended = run_while_filling(path, disk)
        ends = job_ends(ended)
        assert ended.code == 5
        errors = {"cut": "", "noise": "", "bent": "", "full": "ENOSPC", "hangs": "given up after"}
        for name, what in errors.items():
            assert ends[name]["stage"] == "failed", name
            assert what in ends[name]["error"]
            lines = [line for line in ended.err.splitlines() if f"job {name} failed: " in line]
            assert lines == [f"uringmig: job {name} failed: {ends[name]['error']}"]
        (disk / "taken").unlink()
        assert not check_archive(disk / "archive")
    entries = check_archive(tmp_path / "archive")
    assert sorted(entries) == sorted(ship.name for ship in fleet)
    for ship in fleet[:: max(1, COUNT // 4)]:
        check_restored(tmp_path / "archive", ship, tmp_path / "restored")
