"""Conversions in trouble: bent sources, full and failing disks, kill -9: a whole file or none."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
from commandline import start, uringmig
from contentsreading import collect
from durableorder import unsafe_names
from elffiles import read_core, read_lime
from imagewriter import Device
from loopdisk import mounted
from mappedguests import Ranges, save_guest, write_plain
from smallguests import MIB, OPTIONS, PAGE, PWRITE, RING, aligned, left_in, make_guest
from smallprogram import COMMAND
from systemcalls import record

from uringmig import ReadOptions, StorageError, UringmigError, convert_image
from uringmig.contents.opening import open_contents
from uringmig.errors import BytesError
from uringmig.export.conversion import TargetFormat
from uringmig.storage.enginechoice import EngineChoice
from uringmig.testing.faults import FaultEngine
from uringmig.units import GiB

QUICK = ReadOptions(channels=1, depth=4, engine="pwrite", direct="off")
RANGES: Ranges = (
    (0, 600 * PAGE, "pc.ram", 0),
    (1 << 30, 32 * PAGE, "pc.rom", 0),
    (4 * GiB, 424 * PAGE, "pc.ram", 600 * PAGE),
)
FORMATS: tuple[TargetFormat, ...] = ("mapped-ram", "stream", "raw", "elf", "lime")
ALL = pytest.mark.parametrize("to", FORMATS)
#: Of each kind of source; 2,000 in all were run when this was written.
MUTATIONS = 60


def read_whole(path: Path, to: TargetFormat) -> None:
    """An independent reader, or that of images, finds nothing missing."""
    if to == "elf":
        read_core(path)
    elif to == "lime":
        read_lime(path)
    elif to != "raw":
        with open_contents(path, options=QUICK) as contents:
            collect(contents)


def sources(folder: Path) -> dict[str, list[Path]]:
    """Of each kind the files that are bent, the image first."""
    small = {"pc.ram": aligned(4 * MIB), "pc.rom": aligned(32 * PAGE)}
    for memory in small.values():
        memory[: 40 * PAGE : 3] = 7
    devices = [Device(), Device(idstr="cpu", section_id=3, body=bytes(1900))]
    with_map = save_guest(folder / "map", small, RANGES, devices)
    alone = save_guest(folder / "alone", small, None, devices)
    Path(f"{alone}.manifest.json").unlink()
    return {
        "image": [with_map],
        "manifest": [Path(f"{with_map}.manifest.json")],
        "without": [alone],
        "plain": [write_plain(alone, folder / "plain")],
    }


def bend(data: bytearray, chance: random.Random) -> bytearray:
    """Cut it, or change a few bytes, most of them where something is."""
    if chance.random() < 0.15:
        return data[: chance.randrange(len(data))]
    places = [at for at in range(0, len(data), 512) if any(data[at : at + 512])]
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = min(len(data) - 1, chance.choice(places) + chance.randrange(512))
        data[at] = chance.choice(
            [0, 255, data[at] ^ 1 << chance.randrange(8), chance.randrange(256)]
        )
    return data


@pytest.mark.parametrize("kind", ["image", "manifest", "without", "plain"])
def test_bent_sources(tmp_path: Path, kind: str) -> None:
    """Rule: whatever the bytes, exit 3 and nothing, or a whole file; never anything else."""
    (bent,) = sources(tmp_path)[kind]
    image = tmp_path / "map" if kind == "manifest" else bent
    original, before = bent.read_bytes(), left_in(tmp_path)
    outcomes = set()
    for seed in range(MUTATIONS):
        chance = random.Random(seed)
        to = chance.choice(FORMATS)
        bent.write_bytes(bend(bytearray(original), chance))
        out = tmp_path / "out"
        try:
            convert_image(image, out, to=to, read=QUICK, write=QUICK.like(type(OPTIONS)))
        except BytesError:
            outcomes.add("refused")
        except StorageError as error:  # an address beyond what any file system has
            if (error.errno, to) != (errno.EFBIG, "raw"):
                raise
        else:
            outcomes.add("whole")
            read_whole(out, to)
            out.unlink()
            Path(f"{out}.manifest.json").unlink(missing_ok=True)
        assert left_in(tmp_path) == before, seed
    assert "refused" in outcomes


@ALL
@pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)
def test_disk_that_gets_full(tmp_path: Path, to: TargetFormat, engine: EngineChoice) -> None:
    """ENOSPC in the middle: it is told as such, and the disk is as empty as before."""
    ranges: Ranges = ((0, 37 * MIB, "pc.ram", 0),)
    image = save_guest(tmp_path / "a.mig", make_guest(ram_bytes=37 * MIB), ranges)
    with mounted("ext4", tmp_path, size=14 * MIB) as disk:
        with pytest.raises(StorageError) as caught:
            convert_image(image, disk / "out", to=to, write=OPTIONS, engine=engine)
        assert caught.value.errno == errno.ENOSPC
        assert left_in(disk) == ["lost+found"]


@pytest.mark.parametrize("to", ["raw", "elf", "lime", "mapped-ram"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
def test_write_that_fails(tmp_path: Path, to: TargetFormat, number: int) -> None:
    """The fifth write fails: the number is told, nothing is left, the former file is as it was."""
    image = save_guest(tmp_path / "a.mig", make_guest(), ((0, 9 * MIB, "pc.ram", 0),))
    (tmp_path / "out").write_bytes(b"former")
    failing = EngineChoice(
        "faulty",
        lambda fd, operation, depth: FaultEngine(
            PWRITE.factory(fd, operation, depth),
            iter([1 << 62] * 4 + [-number]),
            seed=1,
            hold_max=2,
        ),
    )
    with pytest.raises(StorageError) as caught:
        convert_image(image, tmp_path / "out", to=to, write=OPTIONS, engine=failing)
    assert caught.value.errno == number
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json", "out"]
    assert (tmp_path / "out").read_bytes() == b"former"


def content(path: Path, to: TargetFormat) -> object:
    """What a file holds; a stream's pages, and so its length, go by the order they were read in."""
    data = path.read_bytes()
    if to != "stream" or data == b"former":
        return data
    with open_contents(path, options=QUICK) as contents:
        return collect(contents), contents.device_state()


@ALL
def test_kill_at_any_moment(tmp_path: Path, to: TargetFormat) -> None:
    """Kill -9: the name has its former content, or the whole file; the next run goes well."""
    image = save_guest(
        tmp_path / "a.mig", make_guest(ram_bytes=33 * MIB), ((0, 9 * MIB, "pc.ram", 0),)
    )
    convert_image(image, tmp_path / "whole", to=to)
    whole = content(tmp_path / "whole", to)
    out = tmp_path / "out"
    for seed in range(4):
        out.write_bytes(b"former")
        process = start("convert", image, out, "--to", to, "--rate", "24M")
        while not (tmp_path / "out.partial").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.Random(seed).random() * 0.4)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert content(out, to) in (b"former", whole)
    assert uringmig("convert", image, out, "--to", to).code == 0
    assert content(out, to) == whole
    beside = ["a.mig", "a.mig.manifest.json", "out", "whole"]
    if to == "mapped-ram":
        beside += ["out.manifest.json", "whole.manifest.json"]
    assert left_in(tmp_path) == sorted(beside)


@ALL
def test_it_is_durable_before_it_has_its_name(tmp_path: Path, to: TargetFormat) -> None:
    """The order of system calls: written, synced, named."""
    root = tmp_path / "root"
    root.mkdir()
    image = save_guest(tmp_path / "a.mig", make_guest(ram_bytes=MIB), ((0, MIB, "pc.ram", 0),))
    recording = record(
        [*COMMAND, "convert", str(image), str(root / "out"), "--to", to, "--engine", "pwrite"],
        root, trace=tmp_path / "trace",
    )  # fmt: skip
    assert recording.code == 0, recording.err
    assert unsafe_names(recording.calls) == []
    assert any(Path(call.target).name == "out" for call in recording.calls if call.target)


@pytest.mark.parametrize("to", ["raw", "elf", "stream"])
def test_interrupt_in_the_middle(tmp_path: Path, to: TargetFormat) -> None:
    """Whatever the progress callback raises ends it, and nothing is left."""
    image = save_guest(tmp_path / "a.mig", make_guest(), ((0, 9 * MIB, "pc.ram", 0),))

    def interrupt(_: object) -> None:
        raise UringmigError("enough")

    with pytest.raises(UringmigError, match="enough"):
        convert_image(image, tmp_path / "out", to=to, progress=interrupt)
    assert left_in(tmp_path) == ["a.mig", "a.mig.manifest.json"]
