"""A restore by QEMU itself: an image into a QEMU that waits with ``-incoming defer``.

QEMU's mapped-ram loader checks little: sizes that differ, blocks that are missing and memory that
is not fresh all give a guest with wrong memory and the word "completed". So the image is parsed
and compared with the waiting QEMU first, and refused while nothing has happened yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
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
from uringmig.qemu.monitor import HostBlock, Monitor, RamBackend
from uringmig.qemu.qmp import CommandError
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.mainfile import open_for_reading
from uringmig.units import MiB

#: A load may take ten minutes, and its bytes at this rate besides; no disk is slower.
_LOAD_BYTES_PER_S_LEAST: Final = MiB
_LOAD_TIMEOUT_LEAST_S: Final = 600.0
#: QEMU takes the first of these in a URI for the end of the path (file_parse_offset).
_OFFSET_WORD: Final = ",offset="


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
        path: the image; QEMU opens it by this path too.
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
    where = _uri(path, offset)
    if direct == "required" and channels == 0:
        raise StateError("direct-io needs multifd channels: QEMU ignores it without them")
    check_waiting(monitor)
    with closing(open_for_reading(os.fspath(path))) as main:
        image = parse_image(main, base=offset)
        check_machine(monitor, image.configuration.machine)
        check_blocks(image.blocks, monitor.ram_blocks())
        bitmaps = {block.idstr: read_bitmap(main, block) for block in image.blocks}
        notes = _check_fresh(monitor, bitmaps)
        guest, unused = guest_of_image(path, main, base=offset, blocks=image.blocks)
    notes += [*unused, *check_disks(monitor, guest)]
    use_direct = False
    if channels:
        use_direct, more = _choose_direct(monitor, path, direct)
        notes += more
    with monitor.saved_settings():
        _set_up(monitor, channels=channels, direct=use_direct)
        started = time.monotonic()
        memory_bytes = sum(block.used_length for block in image.blocks)
        # QEMU reads the file by itself now, and nothing makes it let go of a load by file.
        signals.commit()
        start_load(monitor, where)
        wait_for_load(monitor, memory_bytes)
        seconds = time.monotonic() - started
    return LoadResult(
        machine=image.configuration.machine,
        page_bytes=PAGE_SIZE * sum(bitmap.set_bit_count(packed) for packed in bitmaps.values()),
        memory_bytes=memory_bytes,
        channels=channels,
        direct=use_direct,
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


def _uri(path: str | os.PathLike[str], offset: int) -> str:
    """QEMU's ``file:`` URI for an image.  QEMU: file_parse_offset, migration/file.c."""
    absolute = os.path.abspath(path)  # noqa: PTH100 - links stay: QEMU shows this name in its errors
    if _OFFSET_WORD in absolute:
        raise StateError(f"QEMU cannot load from a path with {_OFFSET_WORD!r} in it: {absolute}")
    if any("\ud800" <= character <= "\udfff" for character in absolute):
        raise StateError(f"QEMU cannot be told a path that is not UTF-8: {absolute!a}")
    if offset < 0:
        raise StateError(f"offset must not be negative: {offset}")
    return f"file:{absolute}" + (f"{_OFFSET_WORD}{offset:#x}" if offset else "")


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


def _choose_direct(
    monitor: Monitor, path: str | os.PathLike[str], mode: DirectMode
) -> tuple[bool, list[str]]:
    """Decide whether QEMU can read this file with O_DIRECT; it fails where it cannot.

    Raises:
        StorageError: required, and the file system has no O_DIRECT.
        PeerError: required, and this QEMU has no direct-io (before 9.1).
    """
    if mode == "off":
        return False, []
    if "direct-io" not in monitor.parameters():
        reason = "this QEMU has no direct-io (it came with 9.1)"
        if mode == "required":
            raise PeerError(reason)
        return False, [f"{reason}; loading through the page cache"]
    file = open_direct(os.fspath(path), Operation.READ, mode)
    os.close(file.fd)
    return file.direct, [] if file.note is None else [file.note]


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
