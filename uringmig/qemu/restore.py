"""A restore by QEMU itself: an image into a QEMU that waits with ``-incoming defer``.

QEMU's mapped-ram loader checks little: sizes that differ, blocks that are missing and memory that
is not fresh all give a guest with wrong memory and the word "completed". So the image is parsed
and compared with the waiting QEMU first, and refused while nothing has happened yet.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from uringmig import signals
from uringmig.errors import MismatchError, PeerError, StateError
from uringmig.image.guestfacts import GuestDisk
from uringmig.image.parse import parse_image, read_bitmap
from uringmig.image.sidecar import guest_of_image
from uringmig.memory.mapping import FileMemory
from uringmig.memory.source import MemorySource
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, DirectMode
from uringmig.pages import bitmap
from uringmig.pages.zero import nonzero_pages
from uringmig.qemu.backing import open_backing
from uringmig.qemu.diskcheck import check_disks
from uringmig.qemu.guardprocess import OURS
from uringmig.qemu.monitor import HostBlock, Monitor, RamBackend
from uringmig.qemu.qmp import CommandError
from uringmig.qemu.waitingdevices import check_devices
from uringmig.qemu.waitingmemory import check_memory
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.mainfile import open_for_reading
from uringmig.units import MiB

#: A load may take ten minutes, and its bytes at this rate besides; no disk is slower.
_LOAD_BYTES_PER_S_LEAST: Final = MiB
_LOAD_TIMEOUT_LEAST_S: Final = 600.0
#: Opaque text of the descriptors of an image; QEMU drops them when nobody is connected to it.
_IMAGE: Final = f"{OURS} the image that is loaded"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load did.

    Attributes:
        machine: machine type of image and QEMU.
        page_bytes: bytes of guest memory read from the image (pages with their bit set).
        memory_bytes: bytes of guest memory in all.
        channels: multifd channels QEMU read with; 0 is without multifd.
        direct: QEMU read the pages with O_DIRECT.
        seconds: from ``migrate-incoming`` until QEMU said "completed".
        run_state: of the guest afterwards: ``running``, ``paused``, ...
        notes: what went otherwise than preferred, one line each.
        disks: of the machine that was saved, and how each was kept.
    """

    machine: str
    page_bytes: int
    memory_bytes: int
    channels: int
    direct: bool
    seconds: float
    run_state: str
    notes: tuple[str, ...]
    disks: tuple[GuestDisk, ...]


def load_into(
    monitor: Monitor,
    path: str | os.PathLike[str],
    *,
    offset: int = 0,
    channels: int,
    direct: DirectMode,
) -> LoadResult:
    """Have a waiting QEMU load an image, and wait until it has.

    Migration capabilities and parameters are put back afterwards. QEMU tries a load only once:
    after one that it began and that failed, it has to be started again.

    Args:
        monitor: of a QEMU started with ``-incoming defer``.
        path: the image; QEMU is given it opened, and need not be able to open it.
        offset: where the image begins in the file.
        channels: multifd channels; 0 loads without multifd.
        direct: whether QEMU is to read pages with O_DIRECT; that needs ``channels``.

    Raises:
        StateError: path and options that cannot work.
        FormatError: the image breaks a rule, also one that QEMU does not check.
        MismatchError: image and QEMU differ in machine type, blocks or sizes, QEMU's memory holds
            old bytes that the load would not clear, or its disks are seen to be others than those
            that were kept for the image.
        StorageError: the image cannot be read, or O_DIRECT is required and cannot be had.
        PeerError: QEMU does not wait for a load, refused, failed, or went away.
    """
    if offset < 0:
        raise StateError(f"offset must not be negative: {offset}")
    if direct == "required" and channels == 0:
        raise StateError("direct-io needs multifd channels: QEMU ignores it without them")
    check_waiting(monitor)
    with closing(open_for_reading(os.fspath(path))) as main:
        image = parse_image(main, base=offset)
        check_machine(monitor, image.configuration.machine)
        check_blocks(image.blocks, monitor.ram_blocks())
        bitmaps = {block.idstr: read_bitmap(main, block) for block in image.blocks}
        notes = check_memory(monitor, [name for name, packed in bitmaps.items() if packed.any()])
        notes += _check_fresh(monitor, bitmaps)
        guest, unused = guest_of_image(path, main, base=offset, blocks=image.blocks)
        notes += [*unused, *check_disks(monitor, guest)]
        notes += check_devices(monitor, image.device_state.tail, guest)
        pages, more = _open_pages(monitor, path, direct) if channels else (None, [])
        notes += more
        with _given(monitor, main.fd, pages) as name, monitor.saved_settings():
            _set_up(monitor, channels=channels, direct=pages is not None)
            started = time.monotonic()
            memory_bytes = sum(block.used_length for block in image.blocks)
            # QEMU reads the file by itself now, and nothing makes it let go of a load by file.
            signals.commit()
            start_load(monitor, f"file:{name}" + (f",offset={offset:#x}" if offset else ""))
            wait_for_load(monitor, memory_bytes)
            seconds = time.monotonic() - started
    return LoadResult(
        machine=image.configuration.machine,
        page_bytes=PAGE_SIZE * sum(bitmap.set_bit_count(packed) for packed in bitmaps.values()),
        memory_bytes=memory_bytes,
        channels=channels,
        direct=pages is not None,
        seconds=seconds,
        run_state=monitor.run_state(),
        notes=tuple(notes),
        disks=tuple((guest and guest.disks) or ()),
    )


class SizedBlock(Protocol):
    """A ramblock that has a name and a size in bytes."""

    @property
    def idstr(self) -> str: ...  # noqa: D102

    @property
    def used_length(self) -> int: ...  # noqa: D102


def check_blocks(image: Sequence[SizedBlock], host: Sequence[HostBlock]) -> None:
    """Refuse an image whose blocks are not exactly those of the QEMU that is to load it.

    QEMU notices neither a length that differs nor a block that is missing (it resizes blocks in
    plain streams only). Compared is what a block uses, not the most it may grow to.

    Raises:
        MismatchError: names the block, and both sizes where they differ.
    """
    waiting = {block.idstr: block for block in host}
    for block in image:
        target = waiting.pop(block.idstr, None)
        if target is None:
            raise MismatchError("is in the image but not in the waiting QEMU", block=block.idstr)
        if target.used_length != block.used_length:
            raise MismatchError(
                "size in bytes differs between the image and the waiting QEMU",
                block=block.idstr,
                expected=block.used_length,
                found=target.used_length,
            )
    for idstr in waiting:
        raise MismatchError("is in the waiting QEMU but not in the image", block=idstr)


def stale_pages(memory: MemorySource, packed: NDArray[np.uint8]) -> tuple[int, int | None]:
    """Count the pages that are not zero though their bit is clear; holes are not looked at.

    Args:
        memory: what a block of the waiting QEMU holds.
        packed: the image's bits of that block: uint8, little bit order.

    Returns:
        Their number, and the byte offset of the first, or None.
    """
    count, first = 0, None
    for window in range(0, memory.length_bytes, WINDOW_BYTES):
        signals.look()
        window_bytes = min(WINDOW_BYTES, memory.length_bytes - window)
        extents = memory.data_extents(start=window, length=window_bytes)
        for start, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True):
            present = bitmap.unpack(
                packed, first_page=start // PAGE_SIZE, page_count=length // PAGE_SIZE
            )
            stale = nonzero_pages(memory.view[start : start + length]) & ~present
            count += int(np.count_nonzero(stale))
            if first is None and stale.any():
                first = start + PAGE_SIZE * int(np.argmax(stale))
    return count, first


@contextmanager
def _given(monitor: Monitor, main_fd: int, pages_fd: int | None) -> Iterator[str]:
    """Give QEMU the image opened: plain, and with O_DIRECT; that one is closed here afterwards.

    It may be another user, in a container, or have another root. QEMU, which tries a load only
    once, would find out in that only try that it cannot open the file.

    Yields:
        The name by which QEMU opens it.
    """
    with ExitStack() as stack:
        if pages_fd is not None:
            stack.callback(os.close, pages_fd)
        # Another open of the file: QEMU begins to read at the position that a descriptor has.
        plain_fd = os.open(f"/proc/self/fd/{main_fd}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, plain_fd)
        fdset = monitor.add_descriptor(plain_fd, _IMAGE)
        try:
            if pages_fd is not None:
                monitor.add_descriptor(pages_fd, _IMAGE, fdset=fdset)
            yield f"/dev/fdset/{fdset}"
        finally:
            with signals.deferred(), contextlib.suppress(PeerError):
                monitor.remove_descriptors(fdset)


def check_waiting(monitor: Monitor) -> None:
    """Refuse a QEMU that does not wait for a load, or has already begun one.

    Raises:
        PeerError: says in which state it is.
    """
    run_state = monitor.run_state()
    if run_state != "inmigrate":
        raise PeerError(
            f"QEMU does not wait for a load (-incoming defer): its guest is {run_state}"
        )
    status = monitor.migration().status
    if status != "none":
        raise PeerError(f"QEMU has already begun a load (status {status}); start it again")


def check_machine(monitor: Monitor, machine: str) -> None:
    """Refuse an image of another machine type; QEMU says so only on its stderr.

    Raises:
        MismatchError: names both.
    """
    found = monitor.machine_type()
    if found != machine:
        raise MismatchError(
            "machine type of the image is not the waiting QEMU's", expected=machine, found=found
        )


def _check_fresh(monitor: Monitor, bitmaps: Mapping[str, NDArray[np.uint8]]) -> list[str]:
    """Refuse memory with old bytes where the image has zero pages: QEMU would leave them.

    Only a named file can hold old bytes: all other memory QEMU has just been given by the kernel.
    A private mapping (``share=off``) shows the file's bytes too.
    """
    notes = []
    for backend in monitor.ram_backends():
        packed = bitmaps.get(backend.idstr or "")
        if backend.path is None or packed is None:
            continue
        try:
            backing = open_backing(monitor, backend, private_too=True)
        except PeerError as error:
            notes.append(f"{error}; not checked for old bytes")
            continue
        notes += [] if backing.note is None else [backing.note]
        try:
            memory = FileMemory(backing.fd, offset=backend.offset, length=backend.size)
        finally:
            os.close(backing.fd)
        with closing(memory):
            _check_stale(backend, memory, packed)
    return notes


def _check_stale(backend: RamBackend, memory: FileMemory, packed: NDArray[np.uint8]) -> None:
    count, first = stale_pages(memory, packed)
    if first is not None:
        raise MismatchError(
            f"{backend.path} holds old bytes in {count} pages, the first at {first:#x}, that are "
            "zero in the image and that QEMU would not clear; give the waiting QEMU a fresh file",
            block=backend.idstr,
        )


def _open_pages(
    monitor: Monitor, path: str | os.PathLike[str], mode: DirectMode
) -> tuple[int | None, list[str]]:
    """Open an image with O_DIRECT if QEMU can read it so; None: it cannot, or is not to.

    Raises:
        StorageError: required, and the file system has no O_DIRECT.
        PeerError: required, and this QEMU has no direct-io (before 9.1).
    """
    if mode == "off":
        return None, []
    if "direct-io" not in monitor.parameters():
        reason = "this QEMU has no direct-io (it came with 9.1)"
        if mode == "required":
            raise PeerError(reason)
        return None, [f"{reason}; loading through the page cache"]
    file = open_direct(os.fspath(path), Operation.READ, mode)
    if file.direct:
        return file.fd, []
    os.close(file.fd)
    return None, [] if file.note is None else [file.note]


def _set_up(monitor: Monitor, *, channels: int, direct: bool) -> None:
    """Switch on what this load needs, and off what an earlier use may have left."""
    known = monitor.capabilities()
    if "mapped-ram" not in known:
        raise PeerError("this QEMU cannot load mapped-ram images (they came with 9.0)")
    wanted = {"mapped-ram": True, "multifd": channels > 0, "x-ignore-shared": False}
    monitor.set_capabilities(**{name: on for name, on in wanted.items() if name in known})
    if channels:
        monitor.set_parameters(**{"multifd-channels": channels})
    if direct or monitor.parameters().get("direct-io"):
        monitor.set_parameters(**{"direct-io": direct})


def start_load(monitor: Monitor, uri: str) -> None:
    """Begin the load, so that QEMU outlives a failure and can tell it.

    Raises:
        PeerError: QEMU refuses.
    """
    try:
        monitor.execute("migrate-incoming", **{"uri": uri, "exit-on-error": False})
    except CommandError as error:
        if "exit-on-error" not in error.description:
            raise
        # Before 9.1: QEMU exits when a load fails, which is then the error we report.
        monitor.execute("migrate-incoming", uri=uri)


def wait_for_load(monitor: Monitor, memory_bytes: int) -> None:
    """Wait for the end of the load.

    Raises:
        PeerError: it failed, with QEMU's description.
    """
    timeout_s = _LOAD_TIMEOUT_LEAST_S + memory_bytes / _LOAD_BYTES_PER_S_LEAST
    outcome = monitor.wait_for_migration(timeout_s=timeout_s)
    if outcome.status != "completed":
        reason = outcome.error or f"status {outcome.status}"
        raise PeerError(f"QEMU failed to load the image: {reason}; start that QEMU again")
