"""How much memory of its own a process has: not the mapped guest's, nor the page cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from uringmig.units import KiB

#: Looking at shared mappings one by one takes some milliseconds.
_INTERVAL_SECONDS: Final = 0.25
#: How Linux names an anonymous mapping that is shared, as Python's mmap makes them.
_ANONYMOUS: Final = "/dev/zero (deleted)"


class OwnMemory:
    """The most memory of its own that this process was seen to have.

    Attributes:
        peak_bytes: private memory and anonymous shared mappings, which our buffers are.
    """

    def __init__(self) -> None:
        self._looked_at = float("-inf")
        self.peak_bytes = 0
        self.look()

    def look(self) -> int:
        """Look, unless that was just done; bytes, of the last look."""
        now = time.monotonic()
        if now - self._looked_at >= _INTERVAL_SECONDS:
            self._looked_at = now
            self._bytes = own_memory_bytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        return self._bytes


def own_memory_bytes() -> int:
    """What this process has now.  proc(5): status, smaps."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, shared = (int(words[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    if shared:
        private += _anonymous_shared_kib(Path("/proc/self/smaps").read_text())
    return private * KiB


def _anonymous_shared_kib(smaps: str) -> int:
    """What of the shared mappings has no file, so is no guest's memory."""
    total, wanted = 0, False
    for line in smaps.splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) if wanted else 0
        elif "-" in line.partition(" ")[0]:
            wanted = line.endswith(_ANONYMOUS)
    return total
