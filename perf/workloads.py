"""Named guests, made in seconds: a file in /dev/shm is the RAM, and this process fills it.

A QEMU started with ``-S`` has that file as its RAM, so it and we are given the same bytes; of a
guest whose RAM is of another kind it is the pattern, and is copied into each QEMU's memory. Zero
pages of ``fragmented``, ``mixed`` and ``zero`` are written, as in a guest that once used them; in
``idle`` they are holes, which a look through a mapping would allocate.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np

from perf.observe import cache_drops
from uringmig.memory.mapping import FileMemory
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.qemu.monitor import Monitor
from uringmig.testing.guests import PatternName, fill_pages, nonzero_bits
from uringmig.units import GiB, align_up

#: What QEMU's RAM is: the file itself; a memfd of its own, shared; private memory, as with ``-m``
#: alone, in huge pages, or in pages of 4 KiB, as where transparent huge pages are off.
RamKind = Literal["file", "memfd", "private", "private-4k"]
SHM: Final = Path("/dev/shm")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Workload:
    """A guest's memory by name.

    Attributes:
        memory_bytes: size of the guest.
        pattern: which pages are not zero, see `uringmig.testing.guests.nonzero_bits`; ``zero``:
            none.
        holes: whether zero pages are holes of the file, or written zeros.
        what: one line for the report.
        ram: what a QEMU has as its RAM.
    """

    name: str
    memory_bytes: int
    pattern: PatternName | Literal["zero"]
    holes: bool
    what: str
    ram: RamKind = "file"

    def resized(self, memory_bytes: int) -> Workload:
        """The same guest with another size, rounded up to whole pages."""
        return replace(self, memory_bytes=align_up(memory_bytes, PAGE_SIZE))

    def in_ram(self, ram: RamKind) -> Workload:
        """The same guest in RAM of another kind."""
        what = f"{self.what}; {_WHAT_RAM[ram]}"
        return replace(self, name=f"{self.name}-{ram}", what=what, ram=ram)


_WHAT_RAM: Final[dict[RamKind, str]] = {
    "memfd": "RAM is QEMU's own memfd, share=on",
    "private": "private RAM, as -m alone gives it, in huge pages",
    "private-4k": "private RAM in pages of 4 KiB",
}

_OF_FILES: Final = {
    workload.name: workload
    for workload in (
        Workload("dense", 4 * GiB, "dense", False, "every page, incompressible"),
        Workload("grid", GiB, "dense", False, "as dense, smaller: depth by block size"),
        Workload("fragmented", GiB, "alternate", False, "every other page is zero"),
        Workload("mixed", 2 * GiB, "mixed", False, "runs and gaps of 1 to 1023 pages, log-uniform"),
        Workload("idle", 8 * GiB, "idle", True, "about a 32nd touched in runs, the rest holes"),
        Workload(
            "small", GiB // 2, "mixed", True, "half in runs of 1 to 1023 pages, the rest holes"
        ),
        Workload("zero", 2 * GiB, "zero", False, "every page zero, and written"),
    )
}
#: Guests whose RAM is none of our files: what most VMs are.
OF_QEMU: Final = {
    workload.name: workload
    for workload in (
        _OF_FILES[name].in_ram(ram)
        for name in ("dense", "fragmented", "mixed", "idle")
        for ram in _WHAT_RAM
    )
}
WORKLOADS: Final = _OF_FILES | OF_QEMU


class GuestRam:
    """The file that is a guest's RAM; a context manager that removes it.

    Attributes:
        path: the file, in /dev/shm.
        nonzero_pages: pages that are not zero.
    """

    def __init__(self, workload: Workload, *, seed: int) -> None:
        self.workload = workload
        self.path = SHM / f"uringmig-perf-{os.getpid()}-{next(_numbers)}"
        self.nonzero_pages = 0
        self._seed = seed
        self._fresh_bytes = 0
        self._cache_drops = 0
        self.renew()

    def renew(self) -> None:
        """Make the file anew, with the same bytes and the same holes."""
        self.path.unlink(missing_ok=True)
        self.path.touch(mode=0o600)
        os.truncate(self.path, self.workload.memory_bytes)
        pattern, page_count = self.workload.pattern, self.workload.memory_bytes // PAGE_SIZE
        if pattern == "zero":
            nonzero = np.zeros(page_count, np.bool_)
        else:
            nonzero = nonzero_bits(pattern, page_count=page_count, seed=self._seed)
        self.nonzero_pages = int(np.count_nonzero(nonzero))
        with closing(FileMemory(self.path, writable=True)) as memory:
            fill_pages(memory.view, nonzero, seed=self._seed, write_zeros=not self.workload.holes)
        self._fresh_bytes = self.allocated_bytes
        self._cache_drops = cache_drops()

    @property
    def allocated_bytes(self) -> int:
        """What the host has given the guest so far."""
        return self.path.stat().st_blocks * 512

    def refresh(self) -> None:
        """Make the file anew if somebody has allocated its holes, or dropped the page cache.

        After that the kernel maps its pages in one by one, see `perf.observe.drop_page_cache`.
        """
        if self.allocated_bytes != self._fresh_bytes or cache_drops() != self._cache_drops:
            self.renew()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.path.unlink(missing_ok=True)

    def copy_into(self, monitor: Monitor, pid: int) -> None:
        """Give a stopped QEMU's own RAM the same bytes; where they have holes, it has none."""
        [block] = [block for block in monitor.ram_blocks() if block.idstr == "pc.ram"]
        assert block.host_address is not None, "QEMU 8.0 and newer tell"
        with (
            closing(FileMemory(self.path)) as memory,
            Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as theirs,
        ):
            extents = memory.data_extents(start=0, length=memory.length_bytes)
            for start, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True):
                for first in range(start, start + length, WINDOW_BYTES):
                    end = min(first + WINDOW_BYTES, start + length)
                    os.pwrite(
                        theirs.fileno(), memory.view[first:end].data, block.host_address + first
                    )


#: prctl(2): of a process and of all that it starts.
_PR_SET_THP_DISABLE: Final = 41


@contextmanager
def backend_of(ram: RamKind) -> Iterator[str | None]:
    """What `Machine` takes as its backend for RAM of a kind; within the block it is started."""
    if ram != "private-4k":
        yield {"file": None, "memfd": "memory-backend-memfd,share=on", "private": ""}[ram]
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield ""
    finally:
        libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
