"""The map of a guest's memory in a manifest is QEMU's own: what it says is where, is there."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batchjobs import job, job_ends, run_jobs, write_jobs
from commandline import uringmig
from realguest import StartMachine, shared_path

from uringmig.archive.directory import Archive
from uringmig.contents.opening import open_contents
from uringmig.image import manifest
from uringmig.image.guestfacts import GuestFacts, MapRange
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.qemu.guestfacts import describe_guest
from uringmig.testing.machine import Machine
from uringmig.units import GiB, MiB

RAM_BYTES = 5 * GiB
UUID = "5f6f7ad8-2d11-4c6e-8b55-3a1f0e4c9d10"
#: Where this test writes into the guest's RAM, as offsets of it.
MARKED = (2 * MiB, 2 * GiB, 2 * GiB + MiB, RAM_BYTES - MiB)


def in_place(machine: Machine) -> GuestFacts:
    """What QEMU says once the firmware has put both adapters' memory in its place."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        facts, notes = describe_guest(machine.monitor)
        assert notes == ()
        assert facts.memory_map is not None
        if sum((one.block or "").endswith("vga.vram") for one in facts.memory_map) >= 2:
            return facts
        time.sleep(0.2)
    raise AssertionError("the firmware did not come to its end")


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A stopped machine of 5 sparse GiB with two VGA adapters, and marks in its RAM."""
    ram = shared_path()
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=RAM_BYTES,
        shared=ram,
        arguments=[
            *["-smp", "2", "-name", "web one", "-uuid", UUID],
            *["-device", "VGA", "-device", "secondary-vga"],
        ],
    ) as machine:
        in_place(machine)
        machine.monitor.execute("stop")
        with ram.open("r+b") as file, mmap.mmap(file.fileno(), RAM_BYTES) as memory:
            for offset in MARKED:
                memory[offset : offset + 8] = offset.to_bytes(8, "big")
        yield machine


@pytest.fixture(scope="module")
def saved(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = tmp_path_factory.mktemp("saved") / "vm.mig"
    done = uringmig("save", "--qmp", machine.qmp_path, image)
    assert done.code == 0, done.err
    return image


def facts_of(image: Path) -> GuestFacts:
    text = Path(f"{image}.manifest.json").read_bytes()
    said = (manifest.decode_cold if image.suffix == ".cold" else manifest.decode)(text)
    assert said.version == manifest.SECOND_VERSION
    assert said.guest
    return said.guest


def physical(machine: Machine, address: int, length: int, path: Path) -> bytes:
    """What QEMU itself says lies at a physical address."""
    machine.monitor.execute("pmemsave", val=address, size=length, filename=str(path))
    return path.read_bytes()


def test_every_range_leads_to_the_bytes_that_qemu_has_there(
    machine: Machine, saved: Path, tmp_path: Path
) -> None:
    """By the manifest's map alone each physical page is found in the image."""
    facts = facts_of(saved)
    ranges = facts.memory_map
    assert ranges is not None
    looked_at: list[tuple[MapRange, int]] = [
        (one, at) for one in ranges for at in (0, one.length - PAGE_SIZE)
    ]
    looked_at += [
        (one, mark - one.offset)
        for one in ranges
        for mark in MARKED
        if one.block == "pc.ram" and one.offset <= mark < one.offset + one.length
    ]
    assert len(looked_at) == 2 * len(ranges) + len(MARKED)
    assert any(one.start >= 4 * GiB for one in ranges)
    nonzero = 0
    with open_contents(saved) as contents:
        names = [block.idstr for block in contents.blocks]
        for one, at in looked_at:
            assert one.block is not None
            row, within = divmod(one.offset + at, WINDOW_BYTES)
            (window,) = contents.windows([(names.index(one.block), row)])
            found = window.memory[within : within + PAGE_SIZE].tobytes()
            assert found == physical(machine, one.start + at, PAGE_SIZE, tmp_path / "page")
            nonzero += any(found)
    assert nonzero > len(MARKED)


def test_the_facts_are_the_machines_and_inspect_shows_them(saved: Path) -> None:
    facts = facts_of(saved)
    assert (facts.cpu_count, facts.name, facts.uuid) == (2, "web one", UUID)
    assert facts.qemu_version.startswith("10.0.")
    assert (facts.target, facts.machine) == ("x86_64", "pc-q35-10.0")
    assert facts.cpu_type == "qemu64-x86_64-cpu"
    shown = uringmig("inspect", saved, "--json").result()
    assert shown["guest"] == json.loads(Path(f"{saved}.manifest.json").read_bytes())["guest"]
    text = uringmig("inspect", saved).out
    assert "2 x qemu64-x86_64-cpu, web one" in text
    assert "0x100000000" in text


def test_every_copy_of_an_archive_has_them(machine: Machine, saved: Path, tmp_path: Path) -> None:
    """From the guest and from its image, hot, cold, and out of the archive again."""
    path = write_jobs(
        tmp_path,
        job("a", f"qmp = '{machine.qmp_path}'", vm="a"),
        job("b", f"qmp = '{machine.qmp_path}'", vm="b", tier="cold", level=1),
        job("c", f"image = '{saved}'", vm="c"),
        job("d", f"image = '{saved}'", vm="d", tier="cold", level=1),
        defaults='entry = "{name}"\nretries = 5',
    )
    ended = run_jobs(path)
    assert ended.code == 0, ended.err
    assert len(job_ends(ended)) == 4
    facts = facts_of(saved)
    folder = tmp_path / "archive"
    with Archive.open(folder, write=False) as archive:
        images = [Path(entry.image) for entry in archive.entries()]
    assert [facts_of(image) for image in images] == [facts] * 4
    for name in "ad":
        out = tmp_path / name
        assert uringmig("archive", "restore", folder, name, out).code == 0
        assert facts_of(out) == facts


@pytest.mark.parametrize("kind", ["pc", "microvm"])
def test_other_machines_are_described(start_machine: StartMachine, kind: str) -> None:
    machine = start_machine(
        memory_bytes=64 * MiB, paused=True, arguments=["-machine", f"type={kind}"]
    )
    facts, notes = describe_guest(machine.monitor)
    assert notes == ()
    assert facts.machine is not None
    assert kind in facts.machine or "i440fx" in facts.machine
    assert facts.memory_map is not None
    ram = sum(one.length for one in facts.memory_map if one.block == "pc.ram")
    assert 63 * MiB < ram <= 64 * MiB


def test_a_guest_with_private_ram_has_map_and_digests_of_pieces(
    start_machine: StartMachine, tmp_path: Path
) -> None:
    """However a running QEMU is saved; the digests are of the bytes that were copied out of it."""
    machine = start_machine(memory_bytes=64 * MiB)
    image = tmp_path / "vm.mig"
    done = uringmig("save", "--qmp", machine.qmp_path, image)
    assert done.code == 0, done.err
    facts = facts_of(image)
    assert facts.memory_map is not None
    ram = sum(one.length for one in facts.memory_map if one.block == "pc.ram")
    assert 63 * MiB < ram <= 64 * MiB
    said = manifest.decode(Path(f"{image}.manifest.json").read_bytes())
    assert all(block.pieces for block in said.blocks if block.pages_set)
    checked = uringmig("verify", image)
    assert checked.code == 0, checked.out
