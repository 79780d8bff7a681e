"""A process's own memory: buffers count, a guest's mapped memory does not."""

from __future__ import annotations

import os
from pathlib import Path

from uringmig.batch.memory import OwnMemory
from uringmig.memory.mapping import FileMemory
from uringmig.storage.buffers import aligned_buffer
from uringmig.units import MiB


def test_buffers_count_and_a_guest_does_not() -> None:
    path = Path(f"/dev/shm/uringmig-test-memory-{os.getpid()}")
    before = OwnMemory().look()
    try:
        path.write_bytes(bytes(64 * MiB))
        memory = FileMemory(path)
        assert int(memory.view.sum()) == 0
        assert OwnMemory().look() - before < 16 * MiB
        buffer = aligned_buffer(64 * MiB)
        buffer[:] = 1
        own = OwnMemory()
        assert before + 64 * MiB <= own.peak_bytes < before + 80 * MiB
        del buffer
        memory.close()
    finally:
        path.unlink()
    assert OwnMemory().look() - before < 16 * MiB
    # Mappings were just looked at, and are fewer than they were.
    assert own.look() - before < 16 * MiB
    assert own.peak_bytes >= before + 64 * MiB
