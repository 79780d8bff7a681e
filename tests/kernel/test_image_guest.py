"""What a manifest says of the machine goes with the memory, and with that memory alone."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from commandline import uringmig

from uringmig import MappedRamWriter, RamBlock, WriteOptions
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.hot import write_hot
from uringmig.contents.opening import open_contents
from uringmig.contents.source import Contents
from uringmig.image import manifest
from uringmig.image.guestfacts import GuestFacts, MapRange
from uringmig.units import MiB

GUEST = GuestFacts(
    qemu_version="10.0.2", qemu_package="Debian", machine="pc-q35-10.0", target="x86_64",
    cpu_type="qemu64-x86_64-cpu", cpu_count=2, kvm=True, name="web1", uuid=None,
    memory_map=[
        MapRange(start=0, length=MiB, block="pc.ram", offset=0, read_only=False, region="pc.ram"),
        MapRange(
            start=1 << 32, length=7 * MiB, block="pc.ram", offset=MiB, read_only=False,
            region="pc.ram",
        ),
    ],
)  # fmt: skip
FAST = WriteOptions(channels=1, engine="pwrite")


def save(path: Path, seed: int, guest: GuestFacts | None = GUEST) -> Path:
    memory = np.zeros(8 * MiB, np.uint8)
    memory[: (seed + 1) * 4096] = seed + 1
    with MappedRamWriter(path, [RamBlock("pc.ram", memory, dense=False)], options=FAST) as writer:
        writer.write_all()
        writer.finish(guest=guest)
    return path


def copy(tier: str, contents: Contents, out: Path) -> Path:
    if tier == "hot":
        write_hot(contents, out, options=FAST)
    else:
        write_cold(contents, out, options=FAST, level=1, workers=1)
    return out


def opened(path: Path) -> Contents:
    return open_cold(path) if path.suffix == ".cold" else open_contents(path)


def sidecar(image: Path) -> Path:
    return Path(f"{image}.manifest.json")


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_a_copy_of_a_copy_has_it(tmp_path: Path, tier: str) -> None:
    with open_contents(save(tmp_path / "vm.mig", 1)) as contents:
        first = copy(tier, contents, tmp_path / f"first.{tier}")
    with opened(first) as contents:
        assert contents.guest() == GUEST
        for name in ("second.hot", "third.cold"):
            with opened(copy(name.split(".")[1], contents, tmp_path / name)) as again:
                assert again.guest() == GUEST
                assert again.notes == contents.notes


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_memory_of_no_machine_has_none(tmp_path: Path, tier: str) -> None:
    """Programs from before can read whatever has nothing that they do not know."""
    image = save(tmp_path / "vm.mig", 1, guest=None)
    with open_contents(image) as contents:
        copied = copy(tier, contents, tmp_path / f"vm.{tier}")
        assert contents.guest() is None
    for path in (image, copied):
        text = json.loads(sidecar(path).read_bytes())
        assert (text["version"], "guest" in text) == (2 if "piece_bytes" in text else 1, False)
        assert ("piece_bytes" in text) == (path != copied or tier == "hot")


def other_bytes(image: Path) -> None:
    """Put the manifest of another image of the same shape beside it."""
    other = save(image.parent / "other.mig", 2)
    if image.suffix == ".cold":
        with open_contents(other) as contents:
            other = copy("cold", contents, image.parent / "other.cold")
    sidecar(image).write_bytes(sidecar(other).read_bytes())


def cut(image: Path) -> None:
    sidecar(image).write_bytes(sidecar(image).read_bytes()[:-10])


def folder(image: Path) -> None:
    sidecar(image).unlink()
    sidecar(image).mkdir()


def newer(image: Path) -> None:
    text = json.loads(sidecar(image).read_bytes()) | {"version": manifest.VERSION + 1}
    sidecar(image).write_text(json.dumps(text))


@pytest.mark.parametrize("tier", ["hot", "cold"])
@pytest.mark.parametrize("spoil", [other_bytes, cut, folder, newer])
def test_what_lies_beside_an_image_and_is_not_its_own_is_not_taken_over(
    tmp_path: Path, tier: str, spoil: object
) -> None:
    """The copy is made all the same, and says once what it did without."""
    assert callable(spoil)
    with open_contents(save(tmp_path / "vm.mig", 1)) as contents:
        image = copy(tier, contents, tmp_path / f"vm.{tier}")
    spoil(image)
    with opened(image) as contents:
        copied = copy("hot", contents, tmp_path / "copy")
        (note,) = [note for note in contents.notes if "manifest" in note]
    assert note.startswith(f"{sidecar(image)}: not used: ")
    said = manifest.decode(sidecar(copied).read_bytes())
    assert said.guest is msgspec.UNSET
    assert note in said.notes


def test_inspect_shows_the_rest_of_an_image_whose_manifest_is_another_ones(tmp_path: Path) -> None:
    image = save(tmp_path / "vm.mig", 1)
    assert uringmig("inspect", image, "--json").result()["guest"]["name"] == "web1"
    other_bytes(image)
    shown = uringmig("inspect", image, "--json").result()
    assert (shown["exit_code"], shown["guest"]) == (0, None)
    assert "another image's manifest" in " ".join(shown["notes"])
    sidecar(image).unlink()
    shown = uringmig("inspect", image, "--json").result()
    assert (shown["guest"], shown["manifest_path"]) == (None, None)
