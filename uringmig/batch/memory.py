"""How much memory of its own a process has."""

from __future__ import annotations

from pathlib import Path

from uringmig.units import KiB


def own_memory_bytes() -> int:
    """Anonymous memory of this process: not the guest's, which is mapped, nor the page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KiB
    return 0
