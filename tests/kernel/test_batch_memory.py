"""A process's own memory: buffers count, a guest's mapped memory does not."""

from __future__ import annotations

import os
from pathlib import Path

from uringmig.batch.memory import OwnMemory, own_memory_bytes
from uringmig.memory.mapping import FileMemory
from uringmig.storage.buffers import aligned_buffer
from uringmig.units import MiB


def test_buffers_count_and_a_guest_does_not() -> None:
    path = Path(f"/dev/shm/uringmig-test-memory-{os.getpid()}")
    before = own_memory_bytes()
    try:
        path.write_bytes(bytes(64 * MiB))
        memory = FileMemory(path)
        assert int(memory.view.sum()) == 0
        assert own_memory_bytes() - before < 16 * MiB
        memory.close()
    finally:
        path.unlink()
    own = OwnMemory()
    buffer = aligned_buffer(64 * MiB)
    buffer[:] = 1
    assert own_memory_bytes() - before >= 64 * MiB
    assert own.look() < before + 64 * MiB, "it has just looked"
    del buffer
    assert own_memory_bytes() - before < 16 * MiB
