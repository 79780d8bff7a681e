"""RAM kind x machine x state: a real guest saved from outside, and everything that is to hold.

Run as a program it tries every combination, two at a time, and writes docs/kinds.md::

    PYTHONPATH=tests python tests/kindtable.py docs/kinds.md
"""

from __future__ import annotations

import itertools
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hostmemory import taken
from hugepool import huge_page_bytes, mounted_hugetlbfs, pool_of
from realguest import assert_goes_on, shared_path

from uringmig.errors import UringmigError
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.outside import save_outside
from uringmig.testing.guestimage import GuestImage, build_guest
from uringmig.testing.machine import Machine
from uringmig.units import MiB
from uringmig.verify import verify

RAM_BYTES = 128 * MiB
FILL_BYTES = 24 * MiB
#: A guest that runs touches memory of its own between two looks at it.
OWN_BYTES = 8 * MiB
#: How many guests are tried at a time by the program.
AT_A_TIME = 2

#: Kind of RAM: QEMU's backend; ``{file}`` is a new file, ``{huge}`` a hugetlbfs.
RAMS = {
    "-m alone": "",
    "ram": "memory-backend-ram",
    "ram, shared": "memory-backend-ram,share=on",
    "memfd, shared": "memory-backend-memfd,share=on",
    "memfd, private": "memory-backend-memfd,share=off",
    "shm": "memory-backend-shm,share=on",
    "file, shared": "memory-backend-file,mem-path={file},share=on",
    "file, private": "memory-backend-file,mem-path={file},share=off",
    "folder": "memory-backend-file,mem-path=/dev/shm,share=on",
    "huge pages, shared": "memory-backend-memfd,hugetlb=on,share=on",
    "huge pages, private": "memory-backend-memfd,hugetlb=on,share=off",
    "hugetlbfs": "memory-backend-file,mem-path={huge},share=on",
}
#: Machine: more of QEMU's arguments.
MACHINES = {
    "q35": (),
    "q35, 2 CPUs, VGA": ("-smp", "2", "-vga", "std"),
    "i440fx": ("-machine", "pc"),
    "microvm": ("-machine", "microvm,acpi=off"),
}
#: How a guest is found, and what brings it there, by QMP or by HMP.
STATES = {
    "running": ("cont", ""),
    "paused": ("stop", ""),
    "guest-panicked": ("", "o/b 0x505 1"),
}

Combination = tuple[str, str, str]


@dataclass
class Row:
    """What one combination showed.

    Attributes:
        digest: the memory of the restored guest, and of the one that was saved, is the same.
        after: the run state, here and there, is as it was found.
        grown: what the guest takes more of its host, by kind, in bytes.
        settings: QEMU keeps the same ones.
        goes_on: its counter does, here and there.
        notes: what else was told or wrong.
    """

    ram: str
    machine: str
    state: str
    digest: bool = False
    after: bool = False
    grown: dict[str, int] = field(default_factory=dict)
    settings: bool = False
    goes_on: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """All is as it is to be."""
        kept = self.digest and self.after and self.settings and self.goes_on
        return kept and not self.grown and not self.notes


def everything() -> list[Combination]:
    return list(itertools.product(RAMS, MACHINES, STATES))


def some() -> list[Combination]:
    """Each kind of RAM once; each machine meets each state."""
    states, machines = itertools.cycle(STATES), itertools.cycle(MACHINES)
    return list(zip(RAMS, machines, states, strict=False))


@contextmanager
def host(*, guests: int) -> Iterator[Path]:
    """A hugetlbfs and a pool for so many guests and as many restored ones, private or shared."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "huge"
        pages = 4 * guests * RAM_BYTES // huge_page_bytes() + 8
        with pool_of(pages), mounted_hugetlbfs(folder):
            yield folder


def try_states(
    ram: str, machine: str, states: Sequence[str], guest: GuestImage, huge: Path
) -> list[Row]:
    """Boot a guest once; bring it into each state, save it, restore it, and ask both."""
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = stack.enter_context(_machine(ram, machine, guest, huge, folder / "source"))
        digest = source.console.wait_until_ready()
        for state in states:
            row = Row(ram, machine, state)
            rows.append(row)
            command, human = STATES[state]
            if command:
                source.monitor.execute(command)
            if human:
                source.monitor.human(human)
            image = folder / f"{state}.mig"
            _save(source, image, row)
            with _machine(ram, machine, guest, huge, folder / state, incoming=True) as target:
                target.monitor.set_capabilities(**{"mapped-ram": True})
                target.monitor.execute("migrate-incoming", uri=f"file:{image}")
                assert target.monitor.wait_for_migration(timeout_s=300).status == "completed"
                row.after = source.monitor.run_state() == state == target.monitor.run_state()
                digests = set()
                for one in (source, target):
                    one.monitor.execute("cont")
                    assert_goes_on(one)
                    digests.add(one.console.digest())
                row.goes_on, row.digest = True, digests == {digest}
            image.unlink()
    return rows


@contextmanager
def _machine(
    ram: str, machine: str, guest: GuestImage, huge: Path, folder: Path, *, incoming: bool = False
) -> Iterator[Machine]:
    file = shared_path()
    try:
        if "{file}" in RAMS[ram]:
            file.touch()
        with Machine(
            folder,
            memory_bytes=RAM_BYTES,
            backend=RAMS[ram].format(file=file, huge=huge),
            guest=guest,
            fill_bytes=FILL_BYTES,
            incoming=incoming,
            arguments=[*MACHINES[machine], "-device", "pvpanic", "-action", "panic=pause"],
        ) as started:
            yield started
    finally:
        file.unlink(missing_ok=True)


def _save(machine: Machine, out: Path, row: Row) -> None:
    monitor = machine.monitor

    def settings() -> tuple[Any, ...]:
        return monitor.capabilities(), monitor.parameters(), monitor.descriptors()

    kept, before = settings(), taken(machine)
    with Monitor(machine.qmp_path) as other:
        result = save_outside(other, out)
    growth = before.grown_to(taken(machine))
    own = OWN_BYTES if row.state == "running" else 0
    row.grown = {name: bytes_ for name, bytes_ in growth.items() if bytes_ > own}
    row.settings = settings() == kept
    row.notes += [*result.notes, *map(str, verify(out).mismatches)]


def as_markdown(rows: Sequence[Row], version: str) -> str:
    """The table, with when and where it was made."""
    right = sum(row.right for row in rows)
    lines = [
        "# Kinds of VMs, each saved from outside and restored",
        "",
        f"Made by `tests/kindtable.py`, which says how, on {datetime.now(UTC):%Y-%m-%d} with QEMU "
        f"{version} (TCG) on",
        f"Linux {platform.release()}, {platform.machine()}: {len(rows)} combinations, "
        f"{right} of them right in everything.",
        "",
        f"A real guest of {RAM_BYTES // MiB} MiB fills {FILL_BYTES // MiB} MiB, is brought into "
        "the state, saved with `--how outside`, and restored by QEMU's",
        "own loader into a machine of the same kind. *Digest*: of what it filled, here and in the "
        "restored one. *Goes on*: its counter",
        "does, in both. *State*: the run state is as it was found, in both. *Host memory*: what "
        "QEMU's RAM takes more of the host",
        "than before, huge pages, blocks of files and page tables included. *Settings*: migration "
        "capabilities, parameters and",
        "descriptors that QEMU keeps are those of before. `tests/interop/"
        "test_outside_table_hugetlb.py` tries a part of them in every run.",
        "",
        "| RAM | machine | state | digest | goes on | state after | host memory | settings |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        grown = ", ".join(f"{name} +{value}" for name, value in row.grown.items()) or "same"
        cells = [
            *(row.ram, row.machine, row.state),
            "equal" if row.digest else "DIFFERS",
            "yes" if row.goes_on else "NO",
            "same" if row.after else "ANOTHER",
            grown,
            "same" if row.settings else "OTHERS",
        ]
        lines.append("| " + " | ".join([*cells[:-1], "; ".join([cells[-1], *row.notes])]) + " |")
    return "\n".join(lines) + "\n"


def _try_all(ram: str, machine: str, guest: GuestImage, huge: Path) -> list[Row]:
    try:
        rows = try_states(ram, machine, list(STATES), guest, huge)
    except UringmigError as error:  # a table with a hole is better than none
        rows = [Row(ram, machine, state, notes=[str(error)]) for state in STATES]
    print(ram, machine, [row.right for row in rows], flush=True)
    return rows


def main() -> None:
    """Try every combination, and write the table to the file that is named."""
    out = Path(sys.argv[1])
    kinds = list(itertools.product(RAMS, MACHINES))
    with tempfile.TemporaryDirectory() as name, host(guests=AT_A_TIME) as huge:
        guest = build_guest(Path(name))
        assert guest is not None, "ci/setup fetches the guest"
        with ProcessPoolExecutor(AT_A_TIME) as pool:
            jobs = [pool.submit(_try_all, *kind, guest, huge) for kind in kinds]
            rows = [row for job in jobs for row in job.result()]
        with Machine(Path(name) / "version", paused=True) as machine:
            version = ".".join(map(str, machine.monitor.qemu_version))
    out.write_text(as_markdown(rows, version))


if __name__ == "__main__":
    main()
