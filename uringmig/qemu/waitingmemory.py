"""The memory of a QEMU that waits for a load: may it be written to, and is it nobody else's?

A load writes to it whatever it is. Two VMs that were given one file as their shared RAM have one
memory: to load into the second would overwrite the first, which may be running. QEMU locks nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

from uringmig.errors import PeerError
from uringmig.memory.maps import Mapping, mappings_of, overlapping
from uringmig.options import PAGE_SIZE
from uringmig.qemu.monitor import Monitor

#: It is no VM, and some hosts let nobody look at it, root neither.
_INIT: Final = 1


def check_memory(monitor: Monitor, filled: Collection[str]) -> list[str]:
    """Refuse memory that cannot take a load, or that another process uses.

    Args:
        monitor: of a QEMU that waits.
        filled: idstr of the blocks that the load will write to.

    Returns:
        What cannot be seen from here, one line each.

    Raises:
        PeerError: names the block, and the other process.
    """
    pid = monitor.peer_pid
    try:
        mappings = mappings_of(pid)
    except OSError:
        return [
            f"what QEMU (process {pid}) has mapped cannot be seen from here, so it is not seen "
            "whether another process uses its memory"
        ]
    shared: dict[str, Mapping] = {}
    for block in monitor.ram_blocks():
        if block.host_address is None:
            continue  # QEMU does not tell (before 8.0)
        end = block.host_address + block.used_length
        for mapping in overlapping(mappings, block.host_address, end):
            if block.idstr in filled and not mapping.writable:
                raise PeerError(
                    f"ramblock {block.idstr!r} is read-only in the waiting QEMU, and the image has "
                    "pages for it: no QEMU can load that"
                )
            if mapping.shared and mapping.inode:
                shared[block.idstr] = mapping
    return _check_others(shared, pid) if shared else []


def _check_others(shared: dict[str, Mapping], pid: int) -> list[str]:
    """Look at what all processes have mapped, but QEMU and ourselves."""
    # As /proc/PID/maps has them, which is quicker to look for than to take each line apart.
    marks = {
        idstr: " {:02x}:{:02x} {} ".format(*mapping.device, mapping.inode)
        for idstr, mapping in shared.items()
    }
    least_bytes = min(mapping.end - mapping.start for mapping in shared.values())
    unseen = 0
    others = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    others -= {pid, os.getpid(), _INIT}
    for other in others:
        try:
            maps = Path(f"/proc/{other}/maps").read_text(errors="surrogateescape")
        except PermissionError:
            unseen += _mapped_bytes(other) >= least_bytes
            continue
        except OSError:
            continue  # it has ended
        for idstr, mark in marks.items():
            if mark in maps:
                raise PeerError(
                    f"the memory of the waiting QEMU (ramblock {idstr!r}, {shared[idstr].name}) is "
                    f"that of process {other} ({_name_of(other)}), too, and a load would "
                    "overwrite it; give the waiting QEMU memory of its own"
                )
    if not unseen:
        return []
    names = " or ".join(sorted({mapping.name for mapping in shared.values()}))
    return [
        f"it is not seen whether another process uses {names}, too: so many that have enough "
        f"memory mapped for that cannot be looked at from here: {unseen}"
    ]


def _mapped_bytes(pid: int) -> int:
    """How much a process has mapped in all, which anybody may see."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * PAGE_SIZE
    except OSError:
        return 0  # it has ended


def _name_of(pid: int) -> str:
    """A process's name, as it calls itself."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "it has ended"
