"""What tools of forensics get of a real guest: our core beside QEMU's own of the same moment."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import uringmig
from elffiles import Core, read_core
from realguest import StartMachine, assert_goes_on, save_by_qemu, shared_path

from uringmig import ReadOptions, convert_image, diff_images
from uringmig.testing.guestimage import GUEST_FOLDER, GuestImage
from uringmig.testing.machine import Machine
from uringmig.units import GiB, MiB

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "forensics.md"
RAM_BYTES = 256 * MiB
STEP = 16 * MiB


@dataclass(frozen=True)
class Forms:
    """One stopped guest: saved from outside, by QEMU, and dumped by QEMU."""

    outside: Path
    by_qemu: Path
    dumped: Path
    digest: str
    guest: GuestImage


@pytest.fixture(scope="module")
def forms(guest: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forms]:
    folder = tmp_path_factory.mktemp("forms")
    outside, by_qemu, dumped = (folder / name for name in ("o.mig", "q.mig", "q.elf"))
    with Machine(
        tmp_path_factory.mktemp("m"),
        memory_bytes=RAM_BYTES,
        guest=guest,
        fill_bytes=32 * MiB,
        arguments=["-smp", "2"],
    ) as machine:
        digest = machine.console.wait_until_ready()
        machine.monitor.execute("stop")
        done = uringmig("save", "--qmp", machine.qmp_path, outside, "--then", "leave")
        assert done.code == 0, done.err
        machine.monitor.execute("dump-guest-memory", paging=False, protocol=f"file:{dumped}")
        save_by_qemu(machine, by_qemu, multifd=False, direct=False)
    yield Forms(outside, by_qemu, dumped, digest, guest)
    shutil.rmtree(folder)


def assert_same_memory(one: Core, other: Core) -> None:
    """Segment for segment, byte for byte."""
    places = [[(start, size) for start, _, size in core.segments] for core in (one, other)]
    assert places[0] == places[1]
    for start, size in places[0]:
        for at in range(start, start + size, STEP):
            length = min(STEP, start + size - at)
            assert one.read(at, length) == other.read(at, length), hex(at)


def test_core_is_what_qemu_dumps(forms: Forms, tmp_path: Path) -> None:
    """Ground truth: QEMU's dump-guest-memory of the same stopped guest: segments and notes."""
    done = convert_image(forms.outside, tmp_path / "a.elf")
    ours, qemus = read_core(tmp_path / "a.elf"), read_core(forms.dumped)
    assert_same_memory(ours, qemus)
    assert ours.machine == qemus.machine
    assert ours.notes[: len(qemus.notes)] == qemus.notes
    assert [name for name, _, _ in qemus.notes] == [b"CORE"] * 2 + [b"QEMU"] * 2
    assert (done.processors, done.derived_map) == (2, False)
    assert (tmp_path / "a.elf").stat().st_blocks * 512 < forms.dumped.stat().st_size


def test_vmcoreinfo_is_the_running_kernels(forms: Forms, tmp_path: Path) -> None:
    """It is found although the machine has no vmcoreinfo device, and it is this kernel's."""
    done = convert_image(forms.outside, tmp_path / "a.elf")
    assert done.vmcoreinfo
    name, kind, text = read_core(tmp_path / "a.elf").notes[-1]
    assert (name, kind) == (b"VMCOREINFO", 0)
    lines = dict(line.split("=", 1) for line in text.decode().splitlines() if "=" in line)
    assert lines["OSRELEASE"].encode() in forms.guest.kernel.read_bytes()
    assert int(lines["PAGESIZE"]) == 4096
    assert "SYMBOL(init_uts_ns)" in lines


def test_names_and_layout_say_the_same(forms: Forms, tmp_path: Path) -> None:
    """Registers by QEMU's names of its fields are those by the layout that we know."""
    cores = []
    for source in (forms.outside, forms.by_qemu):
        done = convert_image(source, tmp_path / "a.elf")
        assert any("layout" in note for note in done.notes) == (source == forms.outside)
        cores.append(read_core(tmp_path / "a.elf").notes)
    assert cores[0] == cores[1]


def test_map_of_a_foreign_image_is_derived_and_said(forms: Forms, tmp_path: Path) -> None:
    """QEMU's own image has no map: RAM is where its machine type has it, and the output says so."""
    done = uringmig("convert", forms.by_qemu, tmp_path / "a.elf", "--json")
    assert done.code == 0, done.err
    assert done.result()["derived_map"] is True
    assert any("derived from the machine type" in note for note in done.result()["notes"])
    ours, qemus = read_core(tmp_path / "a.elf"), read_core(forms.dumped)
    (segment,) = ours.segments
    assert (segment[0], segment[2]) == (0, RAM_BYTES)
    assert ours.read(0, STEP) == qemus.read(0, STEP)


def test_same_guest_by_whatever_way_it_was_saved(forms: Forms) -> None:
    """Ours from outside and QEMU's own migration of one stopped guest: no page differs."""
    report = diff_images(forms.outside, forms.by_qemu)
    assert all(block.equal for block in report.blocks)


@pytest.mark.parametrize("way", ["outside", "by_qemu"])
def test_there_and_back(forms: Forms, tmp_path: Path, way: str) -> None:
    """A real guest through every pair of what QEMU loads: memory and devices are the same."""
    source = getattr(forms, way)
    steps = ["a.stream", "b.mig", "c.stream", "d.stream", "e.mig", "f.mig"]
    before = source
    for name in steps:
        convert_image(before, tmp_path / name)
        before = tmp_path / name
        assert diff_images(source, before).equal, name


@pytest.mark.parametrize("way", ["outside", "by_qemu"])
def test_qemu_loads_the_plain_stream(
    forms: Forms, start_machine: StartMachine, tmp_path: Path, way: str
) -> None:
    """A plain stream out is one that QEMU loads; the guest remembers and goes on."""
    convert_image(getattr(forms, way), tmp_path / "a.stream")
    machine = start_machine(
        memory_bytes=RAM_BYTES, guest=forms.guest, fill_bytes=32 * MiB, incoming=True,
        arguments=["-smp", "2"],
    )  # fmt: skip
    machine.monitor.execute("migrate-incoming", uri=f"file:{tmp_path / 'a.stream'}")
    assert machine.monitor.wait_for_migration(timeout_s=120).status == "completed"
    machine.monitor.execute("cont")
    assert machine.console.digest() == forms.digest
    assert_goes_on(machine)


def test_gdb_shows_the_registers(forms: Forms, tmp_path: Path) -> None:
    """A debugger says of our core what it says of QEMU's."""
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("gdb is not installed (ci/setup installs it)")
    convert_image(forms.outside, tmp_path / "a.elf")
    said = [
        subprocess.run(
            [gdb, "--batch", "-nx", "-ex", "thread apply all info registers", "--core", core],
            capture_output=True, text=True, check=True,
        ).stdout
        for core in (tmp_path / "a.elf", forms.dumped)
    ]  # fmt: skip
    registers = [
        re.findall(r"^(r\w\w?|eflags|cs|gs_base) .*$", text, re.MULTILINE) for text in said
    ]
    assert len(registers[0]) >= 2 * 18
    assert said[0] == said[1]


def test_sparse_guest_with_memory_above_4g(start_machine: StartMachine, tmp_path: Path) -> None:
    """5 GiB of which little is touched: two pieces of RAM, as QEMU dumps them, holes as holes."""
    ram = shared_path()
    machine = start_machine(
        memory_bytes=5 * GiB, shared=ram, paused=True, arguments=["-device", "VGA"]
    )
    marks = (0, 2 * GiB - 4096, 2 * GiB, 5 * GiB - 4096)
    with ram.open("r+b") as file:
        for offset in marks:
            file.seek(offset)
            file.write(struct.pack(">Q", offset + 1) * 512)
    image = tmp_path / "a.mig"
    done = uringmig("save", "--qmp", machine.qmp_path, image)
    assert done.code == 0, done.err
    convert_image(image, tmp_path / "a.elf", read=ReadOptions(direct="required"))
    core = read_core(tmp_path / "a.elf")
    above = 4 * GiB
    for offset in marks:
        address = offset if offset < 2 * GiB else above + offset - 2 * GiB
        assert core.read(address, 4096) == struct.pack(">Q", offset + 1) * 512
    assert (tmp_path / "a.elf").stat().st_size > 5 * GiB
    assert (tmp_path / "a.elf").stat().st_blocks * 512 < 64 * MiB
    machine.monitor.execute(
        "dump-guest-memory", paging=False, protocol=f"file:{tmp_path / 'q'}",
        begin=above, length=64 * MiB,
    )  # fmt: skip
    dumped = read_core(tmp_path / "q")
    assert dumped.segments[0][0] == above
    assert dumped.read(above, 64 * MiB) == core.read(above, 64 * MiB)
    for start, _, size in core.segments:
        for at in (start, start + size - 4096):
            machine.monitor.execute("pmemsave", val=at, size=4096, filename=str(tmp_path / "page"))
            assert (tmp_path / "page").read_bytes() == core.read(at, 4096), hex(at)


def test_the_page_runs_as_it_stands(qemu: str, tmp_path: Path) -> None:
    """docs/forensics.md: every command of the example, in order, in one shell; nothing is left."""
    if not (GUEST_FOLDER / "vmlinuz").is_file():
        pytest.skip("no guest kernel and busybox (ci/setup fetches them)")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = "\n".join(text for language, text in blocks if language == "sh")
    (python,) = (text for language, text in blocks if language == "python")
    (tmp_path / "page.py").write_text(python)
    (tmp_path / "page.sh").write_text(
        f"set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}\n"
        f"python {tmp_path}/page.py\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as sink:
        code = subprocess.run(
            ["bash", tmp_path / "page.sh"], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=sink, stderr=sink, check=False,
            env={**os.environ, "FORENSICS": str(tmp_path / "f")},
        ).returncode  # fmt: skip
    output = log.read_text()
    assert code == 0, output
    assert re.search(r"^first.mig and second.mig differ: ", output, re.MULTILINE), output
    assert "NT_PRSTATUS" in output, output
    assert re.search(r"^rip +0x", output, re.MULTILINE), output
    assert re.search(r"^OSRELEASE=\d", output, re.MULTILINE), output
    assert re.search(r"^2 1 True False$", output, re.MULTILINE), output
