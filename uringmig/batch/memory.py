"""How much memory of its own a process has: not the mapped guest's, nor the page cache."""

from __future__ import annotations

from pathlib import Path

from uringmig.units import KiB


class OwnMemory:
    """The most memory of its own that this process was seen to have.

    Attributes:
        peak_bytes: private memory, as all buffers of ours are (`storage.buffers`).
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.look()

    def look(self) -> int:
        """Look now, and return the bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        [private] = [line for line in lines if line.startswith("RssAnon:")]
        found = int(private.split()[1]) * KiB
        self.peak_bytes = max(self.peak_bytes, found)
        return found
