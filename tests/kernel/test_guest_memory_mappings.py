"""Blocks of RAM that are several mappings of a real child process, found and read as one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from otheruser import NOBODY
from remoteprocess import PAGE, read_all

from uringmig.errors import HostError, PeerError
from uringmig.memory.mapping import FileMemory
from uringmig.memory.remote import RemoteMemory
from uringmig.qemu.guestmemory import GuestMemory
from uringmig.qemu.monitor import HostBlock

SIZE = 8 << 20
#: Maps memory, has the kernel split the mapping in three, and writes a page in each.
_CHILD = """
import ctypes, json, mmap, os, sys
kind, size, user = json.loads(sys.argv[1])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
if user:
    os.setgid(user), os.setuid(user), libc.prctl(4, 1, 0, 0, 0)
fds = [os.memfd_create("ram"), os.memfd_create("other")]
for fd in fds:
    os.ftruncate(fd, size)
shared = mmap.MAP_SHARED if "shared" in kind else mmap.MAP_PRIVATE
flags = shared | (0 if "file" in kind else mmap.MAP_ANONYMOUS)
at = libc.mmap(None, size, 3, flags, fds[0] if "file" in kind else -1, 0)
half = size // 2
if "two" in kind:
    libc.mmap(at + half, half, 3, flags | 0x10, fds[1], half)
elif "gap" in kind:
    libc.munmap(ctypes.c_void_p(at + half), ctypes.c_size_t(4096))
else:
    libc.madvise(ctypes.c_void_p(at + half), ctypes.c_size_t(4 * 4096), 10)  # MADV_DONTFORK
for page in (0, size // 8192 + 1, size // 4096 - 1):
    ctypes.memset(at + page * 4096, page % 251 + 1, 4096)
for fd in fds:
    os.close(fd)
print(at, flush=True)
sys.stdin.read()
"""


@contextmanager
def child(kind: str, *, user: int = 0) -> Iterator[tuple[int, list[HostBlock]]]:
    """Its process id, and the one block of its memory."""
    argument = json.dumps([kind, SIZE, user])
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        address = int(process.stdout.readline())
        yield process.pid, [HostBlock("ram", SIZE, SIZE, address)]
        process.kill()


def expected() -> bytes:
    whole = bytearray(SIZE)
    for page in (0, SIZE // 8192 + 1, SIZE // PAGE - 1):
        whole[page * PAGE : (page + 1) * PAGE] = bytes([page % 251 + 1]) * PAGE
    return bytes(whole)


@pytest.mark.parametrize("kind", ["private", "private file", "shared file"])
def test_one_memory_in_three_mappings(kind: str) -> None:
    """The kernel splits a mapping when part of it is advised otherwise; it is one memory still."""
    with child(kind) as (pid, blocks), ExitStack() as stack:
        found = GuestMemory(pid, blocks, stack)
        memory = found.memory_of("ram")
        if isinstance(memory, FileMemory):
            assert kind == "shared file"
            assert memory.view.tobytes() == expected()
        else:
            assert isinstance(memory, RemoteMemory)
            assert read_all(memory).tobytes() == expected()
        assert found.is_still(blocks)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("private file two", "several mappings of different kinds"),
        ("shared file two", "several mappings of different kinds"),
        ("private gap", "not mapped where QEMU says it is"),
    ],
)
def test_what_is_not_one_memory(kind: str, reason: str) -> None:
    """Two files, or a gap: refused, with the block's name."""
    with (
        child(kind) as (pid, blocks),
        ExitStack() as stack,
        pytest.raises(PeerError, match=f"'ram' is .*{reason}"),
    ):
        GuestMemory(pid, blocks, stack)


def test_a_file_that_is_mapped_and_closed() -> None:
    """By its mapping root opens it; its own user has no descriptor to go by, and is told so."""
    with child("shared file", user=NOBODY) as (pid, blocks):
        with ExitStack() as stack:
            assert isinstance(GuestMemory(pid, blocks, stack).memory_of("ram"), FileMemory)
        program = (
            "import os, sys\n"
            "from contextlib import ExitStack\n"
            "from uringmig.errors import HostError\n"
            "from uringmig.qemu.guestmemory import GuestMemory\n"
            "from uringmig.qemu.monitor import HostBlock\n"
            f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            f"block = HostBlock('ram', {SIZE}, {SIZE}, {blocks[0].host_address})\n"
            "try:\n"
            "    with ExitStack() as stack:\n"
            f"        GuestMemory({pid}, [block], stack)\n"
            "except HostError as error:\n"
            "    print(error)\n"
            "    sys.exit(error.exit_code)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (HostError.exit_code, "")
    assert "missing: CAP_CHECKPOINT_RESTORE" in done.stdout
