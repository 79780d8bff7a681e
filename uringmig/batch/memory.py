"""How much memory of its own a process has: not the mapped guest's, nor the page cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from uringmig.units import KiB, MiB

#: Looking at shared mappings one by one takes some milliseconds: only so often, and only if there
#: is more or less of them than before.
_INTERVAL_SECONDS: Final = 0.5
_CHANGE_BYTES: Final = MiB
#: How Linux names an anonymous mapping that is shared, as Python's mmap makes them.
_ANONYMOUS: Final = "/dev/zero (deleted)"


class OwnMemory:
    """The most memory of its own that this process was seen to have.

    Attributes:
        peak_bytes: private memory and anonymous shared mappings, which our buffers are.
    """

    def __init__(self) -> None:
        self._looked_at = float("-inf")
        self._shared = self._own_shared = 0
        self.peak_bytes = 0
        self.look()

    def look(self) -> int:
        """Look now, and return the bytes."""
        words = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        private, shared = (int(words[name].split()[0]) * KiB for name in ("RssAnon", "RssShmem"))
        now = time.monotonic()
        changed = abs(shared - self._shared) >= _CHANGE_BYTES
        if changed and now - self._looked_at >= _INTERVAL_SECONDS:
            self._looked_at, self._shared = now, shared
            self._own_shared = _anonymous_shared_bytes(Path("/proc/self/smaps").read_text())
        found = private + min(self._own_shared, shared)
        self.peak_bytes = max(self.peak_bytes, found)
        return found


def _anonymous_shared_bytes(smaps: str) -> int:
    """What of the shared mappings has no file, so is no guest's memory."""
    total, wanted = 0, False
    for line in smaps.splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) * KiB if wanted else 0
        elif "-" in line.partition(" ")[0]:
            wanted = line.endswith(_ANONYMOUS)
    return total
