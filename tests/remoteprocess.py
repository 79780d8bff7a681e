"""A real child process with memory of a given kind, and which of its pages it has touched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uringmig.memory.mapping import FileMemory
from uringmig.memory.maps import Mapping, mappings_of
from uringmig.memory.pagemap import Pagemap
from uringmig.memory.remote import RemoteMemory

PAGE = 4096
SIZE = 64 << 20

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


def mapping_at(remote: Remote) -> Mapping:
    return next(m for m in mappings_of(remote.pid) if m.start <= remote.address < m.end)


@contextmanager
def opened(remote: Remote, *, scan: bool = True, size: int = SIZE) -> Iterator[RemoteMemory]:
    """The child's memory, with the file below it if it has one."""
    with ExitStack() as stack:
        pagemap = stack.enter_context(closing(Pagemap(remote.pid, scan=scan)))
        mapping = mapping_at(remote)
        file = None
        if mapping.inode:
            path = f"/proc/{remote.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
            offset = mapping.offset + remote.address - mapping.start
            file = FileMemory(path, offset=offset, length=size)
        memory = RemoteMemory(
            remote.pid, address=remote.address, length=size, pagemap=pagemap, file=file
        )
        yield stack.enter_context(closing(memory))


def read_all(memory: RemoteMemory, *, window: int = 4 << 20) -> NDArray[np.uint8]:
    """Window by window, as a channel does; what is in no extent stays zero."""
    whole = np.zeros(memory.length_bytes, np.uint8)
    for start in range(0, memory.length_bytes, window):
        length = min(window, memory.length_bytes - start)
        extents = memory.data_extents(start=start, length=length)
        memory.read(extents, whole[start : start + length], start=start)
    return whole
