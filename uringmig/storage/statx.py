"""statx(2), which Python does not have: what a file system says of one file beyond stat(2).

Linux: Documentation, statx(2); struct statx in linux/stat.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

#: Attributes: ``chattr +i``, ``chattr +a``, something is mounted here (Linux 5.8).
ATTR_IMMUTABLE: Final = 0x10
ATTR_APPEND: Final = 0x20
ATTR_MOUNT_ROOT: Final = 0x2000
_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BYTES: Final = 256
_ATTRIBUTES_AT: Final = 8


def statx_of(file: int | str, mask: int) -> bytes | None:
    """The raw ``struct statx`` of a descriptor or of a name (a link is not followed).

    Returns:
        The structure; None where it cannot be had: no such call here, no such file.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    statx = getattr(libc, "statx", None)
    if statx is None:
        return None
    statx.restype = ctypes.c_int
    statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    result = ctypes.create_string_buffer(_STATX_BYTES)
    if isinstance(file, int):
        failed = statx(file, b"", _AT_EMPTY_PATH, mask, result)
    else:
        failed = statx(_AT_FDCWD, os.fsencode(file), _AT_SYMLINK_NOFOLLOW, mask, result)
    return None if failed else result.raw


def attributes_of(path: str) -> int:
    """The ``ATTR_`` bits of a name; 0 where they are not known."""
    found = statx_of(path, 0)
    return (
        0 if found is None else int.from_bytes(found[_ATTRIBUTES_AT : _ATTRIBUTES_AT + 8], "little")
    )
