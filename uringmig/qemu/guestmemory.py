"""The RAM of a QEMU on this host, found in its process: mapped where it is shared, else read.

QEMU says where each block lies in its process (HMP ``info ramblock``, since 8.0), and the kernel
what is mapped there. A shared mapping is opened through the kernel's own link to it, so no path is
looked up that may mean something else here: memfds, removed files, files of another mount
namespace, all are the very memory that QEMU has.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from uringmig.errors import HostError, LimitError, PeerError, StateError, explained
from uringmig.memory.mapping import FileMemory
from uringmig.memory.maps import Mapping, mappings_of, overlapping
from uringmig.memory.pagemap import Pagemap
from uringmig.memory.remote import RemoteMemory
from uringmig.qemu.monitor import HostBlock, Monitor
from uringmig.qemu.rights import who_may

#: No right: what the kernel says, of /proc and of ptrace.
_REFUSED: Final = frozenset({errno.EPERM, errno.EACCES})


class GuestMemory:
    """Every block of a QEMU's RAM, in the order of its stream.

    Attributes:
        blocks: as QEMU lists them.
        mapped: the blocks that are shared, by idstr.
        copied: the private ones.
    """

    def __init__(self, pid: int, blocks: Sequence[HostBlock], stack: ExitStack) -> None:
        self.blocks = tuple(blocks)
        self.mapped: dict[str, FileMemory] = {}
        self.copied: dict[str, RemoteMemory] = {}
        self._pid = pid
        try:
            mappings = mappings_of(pid)
            self._segments = [_segments_of(block, mappings) for block in blocks]
            pagemap = stack.enter_context(closing(Pagemap(pid)))
            for block, segments in zip(blocks, self._segments, strict=True):
                memory = _open_block(pid, block, segments, pagemap)
                stack.callback(memory.close)
                if isinstance(memory, FileMemory):
                    self.mapped[block.idstr] = memory
                else:
                    self.copied[block.idstr] = memory
                    _probe(pid, memory)
        except OSError as error:
            raise _refusal(pid, error) from None

    def memory_of(self, idstr: str) -> FileMemory | RemoteMemory:
        """The memory of a block."""
        return self.mapped.get(idstr) or self.copied[idstr]

    def is_still(self, blocks: Sequence[HostBlock]) -> bool:
        """Whether QEMU has these very blocks, mapped where they were found.

        Raises:
            PeerError: it has not, by far: one is not mapped any more.
            HostError: we may not look any more.
        """
        if self.blocks != tuple(blocks):
            return False
        try:
            mappings = mappings_of(self._pid)
        except OSError as error:
            raise _refusal(self._pid, error) from None
        return [_segments_of(block, mappings) for block in blocks] == self._segments


@contextmanager
def guest_memory(monitor: Monitor) -> Iterator[GuestMemory]:
    """Open the RAM of a QEMU, having tried that it may be read; nothing of it is touched.

    Raises:
        PeerError: this QEMU does not say where its memory is, or has memory of a kind that cannot
            be read from outside; names the block.
        HostError: it is on another host or in another namespace, or we have no right to read it.
    """
    pid = monitor.peer_pid
    if pid == 0 or not os.path.isdir(f"/proc/{pid}"):
        raise HostError(
            "QEMU's process cannot be seen from here: it is in another namespace or on another "
            "host, so its memory cannot be read from outside"
        )
    _refuse_others(pid, monitor.vcpu_threads())
    blocks = monitor.ram_blocks()
    if any(block.host_address is None for block in blocks):
        major, minor, micro = monitor.qemu_version
        raise PeerError(
            f"QEMU {major}.{minor}.{micro} does not tell where its memory is (that came with 8.0), "
            "so it cannot be read from outside"
        )
    with ExitStack() as stack:
        yield GuestMemory(pid, blocks, stack)


def _refuse_others(pid: int, threads: Sequence[int]) -> None:
    """Make sure that who answers is QEMU itself, whose addresses are those of its memory.

    Args:
        pid: of who answers.
        threads: QEMU's, by the numbers that it knows them by itself.

    Raises:
        HostError: it is somebody who passes on.
        PeerError: it has ended.
    """
    own = set()
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        for task in Path(f"/proc/{pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if line.startswith(("Pid:", "NSpid:")):
                    own.add(int(line.split()[-1]))  # the last is of its own namespace
    except OSError as error:
        raise _refusal(pid, error) from None
    if not own.issuperset(threads):
        raise HostError(
            f"who answers, process {pid} ({name}), is not QEMU itself but passes on to one "
            "elsewhere, whose memory cannot be read from outside; give QEMU's own socket"
        )


def why_unreadable(monitor: Monitor) -> HostError | PeerError | None:
    """Try whether QEMU's memory may be read, and say why not; nothing is stopped for that.

    Raises:
        LimitError: this machine gives no memory or descriptor to try it with.
    """
    try:
        with guest_memory(monitor):
            return None
    except LimitError:
        raise
    except (HostError, PeerError) as error:
        return error


def _segments_of(block: HostBlock, mappings: Sequence[Mapping]) -> list[Mapping]:
    """The mappings that a block lies in, without a gap; of files, one file without a jump.

    Raises:
        PeerError: it is not so.
    """
    address, length = _place(block)
    end = address + length
    segments = overlapping(mappings, address, end)
    at = address
    for segment in segments:
        if segment.start > at:
            break
        at = segment.end
    if at < end:
        raise PeerError(f"ramblock {block.idstr!r} is not mapped where QEMU says it is")
    first = segments[0]
    for segment in segments:
        jump = segment.inode and segment.offset - first.offset != segment.start - first.start
        if _kind(segment) != _kind(first) or jump:
            raise PeerError(
                f"ramblock {block.idstr!r} is made of several mappings of different kinds, which "
                "cannot be read from outside"
            )
    return segments


def _kind(mapping: Mapping) -> tuple[bool, int, tuple[int, int]]:
    """What mappings have in common that may be read as one."""
    return mapping.shared, mapping.inode, mapping.device


def _place(block: HostBlock) -> tuple[int, int]:
    """Address and length of a block."""
    assert block.host_address is not None, "guest_memory() has refused that"
    return block.host_address, block.used_length


def _open_block(
    pid: int, block: HostBlock, segments: Sequence[Mapping], pagemap: Pagemap
) -> FileMemory | RemoteMemory:
    """Open one block's memory.

    Raises:
        OSError: the kernel refused.
        PeerError: it is no memory that can be mapped.
    """
    address, length = _place(block)
    first = segments[0]
    file = None
    if first.inode:
        fd = _open_file(pid, first)
        try:
            file = FileMemory(fd, offset=first.offset + address - first.start, length=length)
        except StateError as error:
            raise PeerError(f"ramblock {block.idstr!r} cannot be read: {error}") from None
        finally:
            os.close(fd)
    if first.shared and file is not None:
        return file
    return RemoteMemory(pid, address=address, length=length, pagemap=pagemap, file=file)


def _probe(pid: int, memory: RemoteMemory) -> None:
    """Try to read, and say who may if we may not."""
    try:
        memory.probe()
    except LimitError:
        raise
    except HostError as error:
        raise HostError(f"{error}{who_may(pid)}") from None


def _open_file(pid: int, mapping: Mapping) -> int:
    """Open what a mapping maps, for reading.

    Raises:
        OSError: the kernel refused.
        HostError: it has no descriptor of it, and we no right to go by the mapping itself.
    """
    path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        # Needs CAP_CHECKPOINT_RESTORE, beyond the right to read the process.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if _is_of(entry, mapping):
                return os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    raise HostError(
        f"no right to open what process {pid} has mapped, and closed itself; missing: "
        "CAP_CHECKPOINT_RESTORE; run as root or with that (AmbientCapabilities=, setpriv)"
    )


def _is_of(entry: Path, mapping: Mapping) -> bool:
    """Whether a descriptor of the process is the file that is mapped.

    On btrfs and overlayfs the device in maps is not the one stat gives; there the name decides.
    """
    try:
        status = entry.stat()
        same_device = mapping.device == (os.major(status.st_dev), os.minor(status.st_dev))
        return status.st_ino == mapping.inode and (
            same_device or str(entry.readlink()) == mapping.name
        )
    except OSError:
        return False  # closed since the folder was listed


def _refusal(pid: int, error: OSError) -> HostError | PeerError:
    """Put a kernel error in our words."""
    if error.errno in _REFUSED:
        return HostError(f"no right to read the memory of process {pid}{who_may(pid)}")
    if isinstance(known := explained(error), HostError):
        return known
    return PeerError(f"QEMU's process {pid} cannot be read: {error.strerror}; it has ended")
