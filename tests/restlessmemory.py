"""Real memory that changes while it is saved: at every look, and around every write of an engine.

A shared memory file, seen through `FileMemory`, or private memory, read by `RemoteMemory` (of this
very process); pages become holes again as a guest's balloon makes them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uringmig.memory.mapping import FileMemory, create_memfd
from uringmig.memory.pagemap import Pagemap
from uringmig.memory.remote import RemoteMemory
from uringmig.memory.source import Extents
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import Completions

PAGE = 4096
#: Page, and what is in it from then on: None is a hole, 0 is zeros, anything else its content.
Change = tuple[int, int | None]


class Restless:
    """Memory, and the changes still to come.

    Attributes:
        steps: lists of changes; one list is made at every look and around every write.
        around: made before every write, and made good after it.
        memory: as a save takes it.
    """

    def __init__(self, mapping: mmap.mmap, *, shared: bool) -> None:
        self.steps: list[list[Change]] = []
        self.around: tuple[Change, Change] | None = None
        self.memory: FileMemory | RemoteMemory
        self._mapping = mapping
        self._give_back = mmap.MADV_REMOVE if shared else mmap.MADV_DONTNEED

    def change(self, page: int, content: int | None) -> None:
        """Have a page hold something else, now."""
        if content is None:
            self._mapping.madvise(self._give_back, page * PAGE, PAGE)
        else:
            self._mapping[page * PAGE : (page + 1) * PAGE] = bytes([content]) * PAGE

    def step(self) -> None:
        """Make the changes of the next step, if there are any left."""
        for page, content in self.steps.pop(0) if self.steps else []:
            self.change(page, content)

    def now(self) -> bytes:
        """All of it, read so that no hole is allocated."""
        held = self.memory.data_extents(start=0, length=len(self._mapping))
        found = np.zeros(len(self._mapping), np.uint8)
        view = np.frombuffer(self._mapping, np.uint8)
        for start, length in zip(held.start.tolist(), held.length.tolist(), strict=True):
            found[start : start + length] = view[start : start + length]
        return found.tobytes()

    def host_bytes(self) -> int:
        """What of it is in the host's memory; of shared memory only."""
        assert isinstance(self.memory, FileMemory)
        return self.memory.data_bytes()

    def engine(self) -> EngineChoice:
        """Writes as pwrite does, between two steps: the device reads when the guest likes."""
        restless = self

        class Between(PwriteEngine):
            def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
                restless.step()
                if restless.around is not None:
                    restless.change(*restless.around[0])
                done = super().reap(wait_count=wait_count, timeout_ns=timeout_ns)
                if restless.around is not None:
                    restless.change(*restless.around[1])
                restless.step()
                return done

        def make(fd: int, operation: Operation, slots: int) -> PwriteEngine:
            return Between(fd, operation, slots)

        return EngineChoice("pwrite", make)


@contextmanager
def restless(kind: str, page_count: int) -> Iterator[Restless]:
    """Memory of this process.

    Args:
        kind: ``shared``, a memory file; ``private``; ``huge``, with MADV_HUGEPAGE; or ``over
            file``, private over a file that holds other bytes, which show through holes.
        page_count: of it; all holes.
    """
    length = page_count * PAGE
    with ExitStack() as stack:
        fd = -1
        if kind in ("shared", "over file"):
            fd = create_memfd("restless", length)
            stack.callback(os.close, fd)
        for page in range(0, page_count if kind == "over file" else 0, 3):
            os.pwrite(fd, b"\t" * PAGE, page * PAGE)
        flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
        mapping = stack.enter_context(
            mmap.mmap(fd, length, flags=flags | (mmap.MAP_ANONYMOUS if fd < 0 else 0))
        )
        if kind == "huge":
            mapping.madvise(mmap.MADV_HUGEPAGE)
        held = Restless(mapping, shared=kind == "shared")
        if kind == "shared":
            held.memory = stack.enter_context(closing(_File(held, fd)))
        else:
            file = FileMemory(fd) if fd >= 0 else None
            place = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            pagemap = stack.enter_context(closing(Pagemap(os.getpid())))
            memory = _Remote(
                held, os.getpid(), address=place, length=length, pagemap=pagemap, file=file
            )
            held.memory = stack.enter_context(closing(memory))
        yield held


class _File(FileMemory):
    """Changes whenever it is looked at."""

    def __init__(self, held: Restless, fd: int) -> None:
        super().__init__(fd)
        self._held = held

    def data_extents(self, *, start: int, length: int) -> Extents:
        found = super().data_extents(start=start, length=length)
        self._held.step()
        return found

    def copy_out(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        super().copy_out(extents, into, start=start)
        self._held.step()


class _Remote(RemoteMemory):
    """Changes whenever it is looked at."""

    def __init__(self, held: Restless, pid: int, **arguments: Any) -> None:
        super().__init__(pid, **arguments)
        self._held = held

    def data_extents(self, *, start: int, length: int) -> Extents:
        found = super().data_extents(start=start, length=length)
        self._held.step()
        return found

    def read(self, extents: Extents, into: NDArray[np.uint8], *, start: int) -> None:
        super().read(extents, into, start=start)
        self._held.step()
