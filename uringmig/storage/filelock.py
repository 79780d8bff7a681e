"""flock(2), and what it means where a file system has no locks, as some network file systems.

A lock is a courtesy of the file system, so its lack stops nobody from writing what is new: an image
into a file that was made just now, a note of damage, an archive's next entry; each says so once.
But nobody can tell then what another process is at work on, so what another may hold is left alone:
a partial file that was there is not taken over, and nothing of others is cleared away.
"""

from __future__ import annotations

import errno
import fcntl
from typing import Final

#: What flock(2) answers where there are no locks.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def take_lock(fd: int) -> str | None:
    """Take an open file's lock for as long as it is open; do not wait for it.

    Returns:
        None if it is taken; else why it cannot be: this file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it can be neither taken nor done without.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return f"this file system has no locks ({errno.errorcode[error.errno]})"
    return None
