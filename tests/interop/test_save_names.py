"""`save` to a name that is a link, or a folder's: as `archive restore` treats it; the guest runs.

A link is followed and stays, and the image is where it leads to, beside it its manifest. What is
refused is refused before the guest is stopped, and nothing half-made is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commandline import Ended, uringmig
from imagereader import read_image
from loopdisk import mounted
from realguest import shared_path
from smallguests import left_in

from uringmig import verify
from uringmig.errors import StateError, StorageError
from uringmig.testing.machine import Machine
from uringmig.units import MiB

BOTH = ["vm", "vm.manifest.json"]


@pytest.fixture(scope="module")
def machine(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A running machine with something in its RAM."""
    folder = tmp_path_factory.mktemp("m")
    with Machine(folder, memory_bytes=32 * MiB, shared=shared_path()) as machine:
        fill(machine, 0)
        yield machine


def fill(machine: Machine, seed: int) -> bytes:
    """Put something into its RAM, where the firmware that runs there writes nothing."""
    (backend,) = machine.monitor.ram_backends()
    assert backend.path is not None
    data = np.random.default_rng(seed).bytes(8 * MiB)
    with Path(backend.path).open("r+b") as file:
        file.seek(16 * MiB)
        file.write(data)
    return data


def save(machine: Machine, out: Path | str) -> Ended:
    """Save; however that ends, the guest and QEMU's settings are as before."""
    before = machine.monitor.capabilities(), machine.monitor.parameters()
    done = uringmig("save", "--qmp", machine.qmp_path, out, "--json")
    assert machine.monitor.run_state() == "running"
    assert (machine.monitor.capabilities(), machine.monitor.parameters()) == before
    return done


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_is_followed_whether_or_not_an_image_is_there(
    machine: Machine, tmp_path: Path, relative: bool
) -> None:
    """The first save is to a dangling link; the second replaces the first one's image."""
    big = tmp_path / "big"
    big.mkdir()
    link = tmp_path / "link"
    link.symlink_to("big/vm" if relative else big / "vm")
    for number in range(2):
        data = fill(machine, number)
        done = save(machine, link)
        assert (done.code, done.err) == (0, "")
        assert done.result()["image"]["path"] == str(big / "vm")
        assert link.is_symlink()
        assert left_in(big) == BOTH
        assert left_in(tmp_path) == ["big", "link"]
        (block,) = [one for one in read_image(big / "vm").contents.values() if len(one) == 32 * MiB]
        assert block[16 * MiB : 24 * MiB] == data
        report = verify(link)
        assert (report.mismatches, report.manifest_path) == ((), f"{big}/vm.manifest.json")


def test_a_save_through_a_link_that_fails_leaves_the_former_image(
    machine: Machine, tmp_path: Path
) -> None:
    """The disk it leads to is full."""
    with mounted("ext4", tmp_path, size=8 * MiB) as disk:
        (disk / "vm").write_text("former content")
        (disk / "vm.manifest.json").write_text("its manifest")
        before = left_in(disk)
        link = tmp_path / "link"
        link.symlink_to(disk / "vm")
        done = save(machine, link)
        assert (done.code, done.err.count("\n")) == (StorageError.exit_code, 1)
        assert link.is_symlink()
        assert left_in(disk) == before
        assert (disk / "vm").read_text() == "former content"
        assert (disk / "vm.manifest.json").read_text() == "its manifest"


@pytest.mark.parametrize(
    ("out", "code"),
    [
        ("new/", StateError.exit_code),
        ("file/", StateError.exit_code),
        ("folder/", StateError.exit_code),
        ("folder", StateError.exit_code),
        ("to-folder", StateError.exit_code),
        ("to-folder/", StateError.exit_code),
        ("loop", StateError.exit_code),
        ("null", StateError.exit_code),
        ("nowhere", StorageError.exit_code),
    ],
)
def test_a_name_under_which_no_file_can_be_is_refused(
    machine: Machine, tmp_path: Path, out: str, code: int
) -> None:
    """With a slash at its end, a folder, a loop, a device, a link into a folder that is not."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "nowhere").symlink_to("missing/vm")
    before = left_in(tmp_path)
    done = save(machine, f"{tmp_path}/{out}")
    assert done.code == code, done.err
    assert left_in(tmp_path) == before
    assert left_in(tmp_path / "folder") == []
    assert (tmp_path / "file").read_text() == "mine"
