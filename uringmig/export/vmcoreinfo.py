"""VMCOREINFO: what a Linux guest tells debuggers of itself, found in its memory.

The kernel keeps it as an ELF note at the beginning of a page (kernel/vmcore_info.c), whether or not
the machine has the device by which QEMU would learn where.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.options import PAGE_SIZE

_NAME: Final = b"VMCOREINFO\0"
_HEADER: Final = struct.Struct("<III12s")
_BEGINNING: Final = b"OSRELEASE="
_WITHIN: Final = b"\nPAGESIZE="
#: Many different ones are no kernel's, but somebody's collection.
_KEPT_MAX: Final = 8


class VmcoreinfoSearch:
    """Looks at pages for it; may be used by several threads."""

    def __init__(self) -> None:
        self._found: set[bytes] = set()

    def look(self, memory: NDArray[np.uint8], nonzero: NDArray[np.bool_]) -> None:
        """Look at a window.

        Args:
            memory: uint8, whole pages.
            nonzero: one bool a page: which to look at.
        """
        words = memory.view(np.uint32).reshape(-1, PAGE_SIZE // 4)
        pages = np.flatnonzero(nonzero)
        pages = pages[words[pages, 0] == len(_NAME)]
        for page in pages.tolist():
            text = _content(memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes())
            if text is not None and len(self._found) < _KEPT_MAX:
                self._found.add(text)

    def settle(self) -> tuple[bytes | None, str | None]:
        """What was found, if it is one; and else why there is none."""
        if len(self._found) == 1:
            return next(iter(self._found)), None
        if not self._found:
            return None, "no VMCOREINFO: there is none in the guest's memory"
        return None, (
            f"no VMCOREINFO: the guest's memory has {len(self._found)} different ones, of which "
            "all but one are left from before"
        )


def _content(page: bytes) -> bytes | None:
    """The note's content, if a page begins with the note."""
    name_bytes, length, kind, name = _HEADER.unpack_from(page)
    if (name_bytes, kind, name) != (len(_NAME), 0, _NAME.ljust(12, b"\0")):
        return None
    text = page[_HEADER.size : _HEADER.size + length]
    whole = len(text) == length and text.startswith(_BEGINNING) and _WITHIN in text
    return text if whole and text.rstrip(b"\0").isascii() else None
