"""A machine saved from outside beside QEMU's own save of it, and loaded by QEMU's own loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hostmemory import taken
from imagereader import read_image
from realguest import save_by_qemu

from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.testing.machine import Machine


def assert_saved_as_by_qemu(machine: Machine, folder: Path, *, mapped: Sequence[str] = ()) -> Path:
    """Save it, at no cost of the host's; returns the image, which has QEMU's bytes."""
    ours, theirs = folder / "ours.mig", folder / "theirs.mig"
    before = taken(machine)
    with Monitor(machine.qmp_path) as monitor:
        result = save_outside(monitor, ours)
    assert before.grown_to(taken(machine)) == {}
    assert result.notes == ()
    for idstr in (*result.blocks_mapped, *result.blocks_copied):
        assert (idstr in result.blocks_mapped) == idstr.endswith(tuple(mapped) or "\n"), idstr
    save_by_qemu(machine, theirs, multifd=False, direct=False)
    mine, qemus = read_image(ours), read_image(theirs)
    assert list(mine.contents) == list(qemus.contents)
    assert [n for n in mine.contents if mine.contents[n] != qemus.contents[n]] == []
    assert any(any(block) for block in mine.contents.values())
    return ours


def assert_qemu_loads(waiting: Machine, image: Path) -> None:
    waiting.monitor.set_capabilities(**{"mapped-ram": True})
    waiting.monitor.execute("migrate-incoming", uri=f"file:{image}")
    assert waiting.monitor.wait_for_migration(timeout_s=300).status == "completed"
