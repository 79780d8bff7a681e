"""A real child process with memory of a given kind, and which of its pages it has touched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE = 4096

#: Maps memory as it is told, writes to some pages, and waits; each page has its number in it.
_CHILD = """
import ctypes, json, mmap, os, sys
kind, size, touched, path, below = json.loads(sys.argv[1])
flags = {"shared": mmap.MAP_SHARED}.get(kind, mmap.MAP_PRIVATE)
fd, offset = -1, 0
if kind in ("anonymous", "huge"):
    flags |= mmap.MAP_ANONYMOUS
elif path is None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
else:
    fd = os.open(path, os.O_RDWR)
def mark(where, pages, salt):
    for page in pages:
        where[page * 4096 : page * 4096 + 4096] = (page * 31 + salt).to_bytes(8, "little") * 512
if fd >= 0 and below:
    file = mmap.mmap(fd, size)
    mark(file, below, 7)
    file.close()
memory = mmap.mmap(fd, size, flags=flags)
if kind == "huge":
    memory.madvise(mmap.MADV_HUGEPAGE)
mark(memory, touched, 1)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Remote:
    """The child: its pid, and where its memory begins."""

    pid: int
    address: int
    size: int

    def pages_there(self) -> int:
        """Pages of its memory that are in its page tables, the zero page included."""
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(self.address // PAGE * 8)
            words = np.frombuffer(pagemap.read(self.size // PAGE * 8), np.uint64)
        return int(np.count_nonzero(words >> np.uint64(62)))


@contextmanager
def remote_memory(
    kind: str,
    size: int,
    touched: Sequence[int],
    *,
    path: Path | None = None,
    below: Sequence[int] = (),
) -> Iterator[Remote]:
    """A child that has mapped ``size`` bytes and written to pages.

    Args:
        kind: ``anonymous``, ``huge`` (with MADV_HUGEPAGE), ``private`` or ``shared`` of a file.
        size: bytes.
        touched: pages it has written through the mapping.
        path: the file; None is a memfd.
        below: pages written to the file beforehand.
    """
    argument = json.dumps([kind, size, list(touched), path and str(path), list(below)])
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        yield Remote(child.pid, int(child.stdout.readline()), size)
        child.kill()


def expected_page(page: int, *, salt: int) -> bytes:
    """What the child wrote to a page: salt 1 through its mapping, 7 to the file below."""
    return (page * 31 + salt).to_bytes(8, "little") * 512
