"""Guests whose whole RAM is huge pages of the pool, saved from outside: none is taken to look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hostmemory import fill, taken
from hugepool import huge_page_bytes, mounted_hugetlbfs, pool_of
from machinestates import assert_qemu_loads, assert_saved_as_by_qemu
from realguest import FILL_BYTES, GUEST_BYTES, StartMachine, assert_goes_on

from uringmig.qemu.outside import save_outside
from uringmig.testing.guestimage import GuestImage
from uringmig.units import MiB

SMALL_BYTES = 64 * MiB


@pytest.fixture(scope="module")
def hugetlbfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted hugetlbfs, and a pool for a guest, one to restore it into, and private copies."""
    folder = tmp_path_factory.mktemp("pool") / "huge"
    with pool_of(4 * GUEST_BYTES // huge_page_bytes() + 8), mounted_hugetlbfs(folder):
        yield folder


@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize(
    "backend",
    ["memory-backend-memfd,hugetlb=on", "memory-backend-file,mem-path={folder}",
     "memory-backend-file,mem-path={folder}/ram", "memory-backend-memfd,hugetlb=on,prealloc=on"],
)  # fmt: skip
def test_as_qemu_saves_it(
    backend: str, share: str, hugetlbfs: Path, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Memfd or file, shared or private: QEMU's bytes, and not one huge page more is taken."""
    (hugetlbfs / "ram").touch()
    try:
        machine = start_machine(
            memory_bytes=SMALL_BYTES,
            backend=f"{backend.format(folder=hugetlbfs)},share={share}",
            paused=True,
        )
        fill(machine)
        assert taken(machine).pages >= 8 * huge_page_bytes()
        mapped = ("pc.ram",) if share == "on" else ()
        image = assert_saved_as_by_qemu(machine, tmp_path, mapped=mapped)
        waiting = start_machine(memory_bytes=SMALL_BYTES, backend="", incoming=True)
        assert_qemu_loads(waiting, image)
    finally:
        (hugetlbfs / "ram").unlink()


@pytest.mark.parametrize("share", ["on", "off"])
def test_a_guest_remembers(
    share: str, hugetlbfs: Path, guest: GuestImage, start_machine: StartMachine, tmp_path: Path
) -> None:
    """Saved from huge pages, restored into huge pages; it goes on, here and there."""
    backend = f"memory-backend-memfd,hugetlb=on,share={share}"
    machine = start_machine(
        memory_bytes=GUEST_BYTES, backend=backend, guest=guest, fill_bytes=FILL_BYTES
    )
    digest = machine.console.wait_until_ready()
    save_outside(machine.monitor, tmp_path / "vm.mig")
    assert_goes_on(machine)
    assert machine.console.digest() == digest
    waiting = start_machine(memory_bytes=GUEST_BYTES, backend=backend, guest=guest, incoming=True)
    assert_qemu_loads(waiting, tmp_path / "vm.mig")
    assert waiting.console.digest() == digest
    assert_goes_on(waiting)
