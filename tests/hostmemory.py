"""What a guest's RAM takes of its host: pages, swap, huge pages, blocks of files, page tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from uringmig.memory.maps import Mapping, mappings_of
from uringmig.testing.machine import Machine
from uringmig.units import KiB, MiB

#: Blocks at least this large are the guest's RAM; the others are ROMs and tables.
RAM_LEAST: Final = 8 * MiB
PAGE: Final = 4 * KiB
#: Page tables that QEMU's own work meanwhile may need.
TABLES_MOST: Final = 64 * KiB


@dataclass(frozen=True)
class Taken:
    """What the blocks of a guest take of the host.

    Attributes:
        pages: bytes that are QEMU's own, and huge pages; those of files are the files'.
        swapped: bytes that are swapped out.
        blocks: bytes of the files that are mapped, holes left out.
        tables: bytes of QEMU's page tables.
    """

    pages: int
    swapped: int
    blocks: int
    tables: int

    def grown_to(self, after: Taken) -> dict[str, int]:
        """What grew, by how many bytes, but for page tables that QEMU's own work may need."""
        growth = {
            "pages": after.pages - self.pages - (self.swapped - after.swapped),
            "blocks": after.blocks - self.blocks,
            "tables": max(0, after.tables - self.tables - TABLES_MOST),
        }
        return {name: bytes_ for name, bytes_ in growth.items() if bytes_ > 0}


def taken(machine: Machine) -> Taken:
    """What the guest's RAM takes now."""
    pid = machine.process.pid
    ours = ram_mappings(machine)
    counts = dict.fromkeys(("Anonymous", "Swap", "Shared_Hugetlb", "Private_Hugetlb"), 0)
    counted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            counted = int(head[1], 16) in ours
        elif counted and (name := line.split(":")[0]) in counts:
            counts[name] += int(line.split()[1]) * KiB
    files = {
        (one.device, one.inode): Path(f"/proc/{pid}/map_files/{one.start:x}-{one.end:x}").stat()
        for one in ours.values()
        if one.inode
    }
    status = Path(f"/proc/{pid}/status").read_text()
    tables = re.search(r"VmPTE:\s+(\d+)", status)
    assert tables is not None
    return Taken(
        pages=counts["Anonymous"] + counts["Shared_Hugetlb"] + counts["Private_Hugetlb"],
        swapped=counts["Swap"],
        blocks=sum(one.st_blocks * 512 for one in files.values()),
        tables=int(tables[1]) * KiB,
    )


def ram_mappings(machine: Machine) -> dict[int, Mapping]:
    """QEMU's mappings that are RAM of the guest, by address."""
    places = [
        (block.host_address, block.host_address + block.used_length)
        for block in machine.monitor.ram_blocks()
        if block.host_address is not None and block.used_length >= RAM_LEAST
    ]
    return {
        one.start: one
        for one in mappings_of(machine.process.pid)
        if any(one.start < end and start < one.end for start, end in places)
    }


def fill(machine: Machine, *, leave_out: Sequence[str] = ()) -> None:
    """Write five pages at eight places of each block of RAM, from outside; the rest stays hole."""
    source = np.random.default_rng(1)
    with Path(f"/proc/{machine.process.pid}/mem").open("r+b", buffering=0) as memory:
        for block in machine.monitor.ram_blocks():
            if block.used_length < RAM_LEAST or block.idstr.endswith(tuple(leave_out) or "\n"):
                continue
            assert block.host_address is not None
            for at in range(0, block.used_length, block.used_length // 8):
                memory.seek(block.host_address + at + 3 * PAGE)
                memory.write(source.integers(1, 256, 5 * PAGE, np.uint8).tobytes())
