"""A restore by plain stream: any contents into a QEMU that waits, digests checked as they pass.

QEMU gets one end of a socket pair over QMP, so neither a path nor a port is needed. It starts the
guest at the end of the stream only, and we send that end only when every window was what it should
be: otherwise the stream is cut, the load fails, and QEMU stays as it waited. Unlike a mapped-ram
load a plain one also clears memory and compares lengths.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from uringmig import signals
from uringmig.contents.comparing import Digests
from uringmig.contents.source import Contents
from uringmig.contents.streaming import plain_pieces
from uringmig.errors import PeerError
from uringmig.image.guestfacts import GuestDisk
from uringmig.memory.mapping import FileMemory
from uringmig.options import PAGE_SIZE
from uringmig.progress import ChannelCounters, ProgressCallback, take_snapshot
from uringmig.qemu.backing import open_backing
from uringmig.qemu.diskcheck import check_disks
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.restore import (
    check_blocks,
    check_machine,
    check_waiting,
    stale_pages,
    start_load,
    wait_for_load,
)
from uringmig.qemu.waitingdevices import check_devices
from uringmig.qemu.waitingmemory import check_memory
from uringmig.units import div_ceil

_DESCRIPTOR_NAME: Final = "uringmig"
#: Longest that QEMU takes no byte; it reads at once unless its main loop is blocked.
_SILENCE_SECONDS: Final = 60.0
_INTERVAL_SECONDS: Final = 0.1
#: Capabilities that would make it expect another stream; unknown ones are left out.
_SWITCHED_OFF: Final = (
    "mapped-ram", "multifd", "x-ignore-shared", "postcopy-ram", "postcopy-preempt", "x-colo",
    "xbzrle", "compress", "dirty-bitmaps", "validate-uuid",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """What a load by stream did.

    Attributes:
        machine: machine type of contents and QEMU.
        memory_bytes: bytes of guest memory in all.
        stream_bytes: bytes sent.
        digests_checked: windows compared with their digest.
        seconds: from ``migrate-incoming`` until QEMU said "completed".
        run_state: of the guest afterwards: ``running``, ``paused``, ...
        notes: what the operator should know, one line each.
        disks: of the machine that was saved, and how each was kept.
        unseen: for each disk that is not seen to be the one that was kept, a line.
    """

    machine: str
    memory_bytes: int
    stream_bytes: int
    digests_checked: int
    seconds: float
    run_state: str
    notes: tuple[str, ...]
    disks: tuple[GuestDisk, ...]
    unseen: tuple[str, ...]


def stream_into(
    monitor: Monitor,
    contents: Contents,
    *,
    digests: Digests | None = None,
    progress: ProgressCallback | None = None,
) -> StreamLoad:
    """Have a waiting QEMU load contents of any kind, and wait until it has.

    Migration capabilities and parameters are put back afterwards. QEMU tries a load only once:
    after one that it began and that failed, it has to be started again.

    Args:
        monitor: of a QEMU started with ``-incoming defer``.
        contents: what to load; the caller closes it.
        digests: of every row of every block, as hex; a window that differs makes the load fail.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        MismatchError: contents and QEMU differ in machine type, blocks or sizes, its disks are
            seen to be others than those that were kept, or a window is not what its digest says;
            the guest has not started.
        FormatError: the source breaks a rule; the guest has not started.
        StorageError: the source cannot be read; the guest has not started.
        PeerError: QEMU does not wait for a load, refused, failed, or went away.
    """
    check_waiting(monitor)
    check_machine(monitor, contents.configuration.machine)
    check_blocks(contents.blocks, monitor.ram_blocks())
    guest = contents.guest()
    unseen = check_disks(monitor, guest)
    notes = check_memory(monitor, [block.idstr for block in contents.blocks])
    notes += check_devices(monitor, contents.device_state().tail, guest)
    memory_bytes = sum(block.used_length for block in contents.blocks)
    pieces = plain_pieces(
        contents,
        digests=digests,
        fresh=_fresh_blocks(monitor),
        # With the end QEMU has all of the guest, and may let it run.
        before_end=signals.commit,
    )
    with monitor.saved_settings(), contextlib.closing(pieces):
        known = monitor.capabilities()
        monitor.set_capabilities(**{name: False for name in _SWITCHED_OFF if known.get(name)})
        started = time.monotonic()
        with _loading(monitor, memory_bytes) as connection:
            sent = _send(connection, pieces, contents.stored_bytes(), progress)
        seconds = time.monotonic() - started
    return StreamLoad(
        machine=contents.configuration.machine,
        memory_bytes=memory_bytes,
        stream_bytes=sent,
        digests_checked=0 if digests is None else sum(len(rows) for rows in digests),
        seconds=seconds,
        run_state=monitor.run_state(),
        notes=(*contents.notes, *notes),
        disks=tuple((guest and guest.disks) or ()),
        unseen=unseen,
    )


@contextlib.contextmanager
def _loading(monitor: Monitor, memory_bytes: int) -> Iterator[socket.socket]:
    """Have QEMU load from a socket of ours; it is cut if the block fails, and the load with it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            monitor.pass_descriptor(_DESCRIPTOR_NAME, theirs.fileno())
        try:
            start_load(monitor, f"fd:{_DESCRIPTOR_NAME}")
        except BaseException:
            with signals.deferred(), contextlib.suppress(PeerError):
                monitor.execute("closefd", fdname=_DESCRIPTOR_NAME)
            raise
        try:
            yield ours
        except OSError as error:
            ours.close()
            # QEMU closes its end when it fails: what it says is the reason.
            with signals.deferred():
                wait_for_load(monitor, memory_bytes)
            raise PeerError(f"QEMU closed the stream: {error.strerror}") from None
        except BaseException:
            ours.close()
            with signals.deferred(), contextlib.suppress(PeerError):
                wait_for_load(monitor, memory_bytes)
            raise
        wait_for_load(monitor, memory_bytes)


def _send(
    connection: socket.socket,
    pieces: Iterator[memoryview],
    stored_bytes: int,
    progress: ProgressCallback | None,
) -> int:
    """Send every piece; return the bytes."""
    connection.setblocking(False)
    counters = ChannelCounters()
    started = told = time.monotonic()
    for piece in pieces:
        _send_piece(connection, piece)
        counters.completed_bytes += len(piece)
        counters.finished_bytes = min(counters.completed_bytes, stored_bytes)
        now = time.monotonic()
        if progress is not None and now - told >= _INTERVAL_SECONDS:
            told = now
            progress(
                take_snapshot("read", [counters], total_bytes=stored_bytes, seconds=now - started)
            )
    return counters.completed_bytes


def _send_piece(connection: socket.socket, piece: memoryview) -> None:
    """Send all of a piece; a signal that asks to stop does not wait for QEMU to take it."""
    while len(piece):
        if not signals.wait_until_ready(
            connection.fileno(), select.POLLOUT, timeout_s=_SILENCE_SECONDS
        ):
            raise PeerError(f"QEMU took nothing for {_SILENCE_SECONDS:.0f} s")
        with contextlib.suppress(BlockingIOError):
            piece = piece[connection.send(piece) :]


def _fresh_blocks(monitor: Monitor) -> set[str]:
    """Blocks in named files that hold nothing but zeros.

    A loader looks at memory before it clears it, which allocates the holes of a shared file. Other
    memory it may look at: private pages are not allocated by reading.
    """
    fresh = set()
    for backend in monitor.ram_backends():
        if backend.path is None or backend.idstr is None:
            continue
        try:
            backing = open_backing(monitor, backend, private_too=True)
        except PeerError:
            continue  # not known to be fresh: its zeros are sent
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, backing.fd)
            if backing.note is not None:
                continue  # perhaps another file's zeros
            memory = FileMemory(backing.fd, offset=backend.offset, length=backend.size)
            undo.callback(memory.close)
            pages = div_ceil(backend.size, PAGE_SIZE)
            count, _ = stale_pages(memory, np.zeros(div_ceil(pages, 8), np.uint8))
        if count == 0:
            fresh.add(backend.idstr)
    return fresh
