"""Is the file at a backend's path the memory that QEMU has mapped?

A path is only a name: the file may have been unlinked or replaced since QEMU opened it, or the
path may be a folder in which QEMU made a file without a name. Reading it then would save other
bytes than the guest's, silently, so every such case is refused with one line.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from msgspec import Struct

from uringmig.errors import PeerError, explained
from uringmig.memory.maps import Mapping, mappings_of
from uringmig.qemu.monitor import HostBlock, Monitor, RamBackend


class Backing(Struct, frozen=True):
    """An opened file that is a backend's memory.

    Attributes:
        fd: the caller's to close; the memory is ``backend.size`` bytes at ``backend.offset`` of it.
        note: why it is not proved that QEMU has mapped this very file, or None: it is.
    """

    fd: int
    note: str | None


def open_backing(monitor: Monitor, backend: RamBackend, *, private_too: bool = False) -> Backing:
    """Open the file that is the backend's memory and prove that QEMU has mapped this very file.

    Args:
        monitor: of the QEMU.
        backend: one of its `Monitor.ram_backends`.
        private_too: take a private mapping (``share=off``) too: the file then has what the memory
            was before anything was written to it.

    Raises:
        PeerError: the backend has no named file, is not shared, or its file is a folder, gone,
            replaced, too short or not accessible.
    """
    what = f"memory backend {backend.id!r}"
    if backend.path is None:
        raise PeerError(f"{what} is a {backend.kind}, not a named file (memory-backend-file)")
    if not (backend.share or private_too):
        raise PeerError(f"{what} is not shared (share=on)")
    path, theirs = _seen_from_here(Path(backend.path), monitor.peer_pid)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except IsADirectoryError:
        raise PeerError(f"{what}: {path} is a folder; QEMU made a nameless file in it") from None
    except FileNotFoundError:
        gone = "has been removed" if theirs else "is not there: removed, or only QEMU sees it"
        raise PeerError(f"{what}: its file {backend.path} {gone}") from None
    except OSError as error:
        why = f"{what}: its file {path} cannot be opened: {error.strerror}"
        raise explained(error) or PeerError(why) from None
    try:
        return Backing(fd, _check_file(monitor, backend, fd, path))
    except BaseException:
        os.close(fd)
        raise


def _seen_from_here(path: Path, pid: int) -> tuple[Path, bool]:
    """What QEMU means by a path: its folders and mounts may be others than ours.

    Returns:
        The path from here, and whether it is QEMU's: where we may not look, it is taken for ours.
    """
    if not path.is_absolute():
        return Path(f"/proc/{pid}/cwd") / path, True
    root = Path(f"/proc/{pid}/root")
    try:
        root.stat()
    except OSError:
        return path, False
    return root / path.relative_to("/"), True


def _check_file(monitor: Monitor, backend: RamBackend, fd: int, path: Path) -> str | None:
    """Compare the opened file with the backend and with what QEMU has mapped; see `Backing`."""
    what = f"memory backend {backend.id!r}"
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise PeerError(f"{what}: {path} is a folder; QEMU made a nameless file in it")
    if not stat.S_ISREG(status.st_mode):
        raise PeerError(f"{what}: {path} is not a file that can be read as memory")
    if status.st_size < backend.offset + backend.size:
        raise PeerError(
            f"{what}: {path} has {status.st_size} bytes, fewer than the "
            f"{backend.offset + backend.size} that QEMU uses; it has been replaced or cut"
        )
    mappings = _file_mappings(monitor.peer_pid)
    if mappings is None:
        return (
            f"{what}: what QEMU (process {monitor.peer_pid}) has mapped cannot be seen from here, "
            f"so it is not proved that {path} is its memory"
        )
    block = next((block for block in monitor.ram_blocks() if block.idstr == backend.idstr), None)
    if not any(_is_this(mapping, status, path) for mapping in _relevant(mappings, block)):
        raise PeerError(f"{what}: {path} is not the file QEMU has mapped; it has been replaced")
    return None


def _relevant(mappings: list[Mapping], block: HostBlock | None) -> list[Mapping]:
    """The mapping at the ramblock's address where QEMU tells it, else every one."""
    if block is None or block.host_address is None:
        return mappings
    address = block.host_address
    return [mapping for mapping in mappings if mapping.start <= address < mapping.end]


def _is_this(mapping: Mapping, status: os.stat_result, path: Path) -> bool:
    """Same inode on the same device.

    On btrfs and overlayfs the device in maps is not the one stat gives; there the name decides,
    which for a removed file ends in " (deleted)" and so never matches.
    """
    if mapping.inode != status.st_ino:
        return False
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return mapping.device == device or mapping.name == os.path.realpath(path)


def _file_mappings(pid: int) -> list[Mapping] | None:
    """The file mappings of a process, or None where we may not look (another user's, no /proc)."""
    try:
        return [mapping for mapping in mappings_of(pid) if mapping.inode]
    except OSError:
        return None
