"""Whether the disks of a QEMU that waits for an image are those of the image's moment.

Seen is what files and their tables tell: a qcow2 file whose table is that of a snapshot holds the
very disk, an overlay without entries adds nothing to what it covers, and a file that was written to
has another time. What can be seen to be wrong is refused; what cannot be seen, as with a copy that
somebody made, is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from uringmig.errors import BytesError, MismatchError, StorageError, naming
from uringmig.image.guestfacts import DiskFile, GuestDisk, GuestFacts
from uringmig.qemu.diskfile import Qcow2Look, look_at_qcow2
from uringmig.qemu.disknodes import writable_disks
from uringmig.qemu.monitor import Monitor
from uringmig.storage.mainfile import open_for_reading

_QCOW2: Final = "qcow2"


def check_disks(monitor: Monitor, guest: GuestFacts | None) -> tuple[str, ...]:
    """Refuse a waiting QEMU whose disks are seen not to be those that an image was made with.

    Args:
        monitor: of the QEMU.
        guest: what the image's manifest says of the machine; None: nothing.

    Returns:
        For each disk that was kept and cannot be seen to be the right one, a line.

    Raises:
        MismatchError: names the disk, its file, and what to do.
        PeerError: QEMU went away.
    """
    kept = [one for one in (guest and guest.disks) or () if one.kept in ("internal", "external")]
    if not kept:
        return ()
    waiting = [one.facts for one in writable_disks(monitor)]
    notes = []
    for disk in kept:
        found = _same_device(disk, waiting)
        if found is None:
            reason: str | None = "the waiting QEMU has no such disk that it may write to"
        elif found.size != disk.size:
            raise MismatchError(
                f"disk {disk.name}: {found.files[0].path} is of another size, in bytes",
                expected=disk.size,
                found=found.size,
            )
        else:
            reason = _Check(monitor.peer_pid, disk, found.files).run()
        if reason is not None:
            notes.append(f"disk {disk.name} is not seen to be that of the image's moment: {reason}")
    return tuple(notes)


def _same_device(disk: GuestDisk, waiting: Sequence[GuestDisk]) -> GuestDisk | None:
    """The waiting QEMU's disk of the same device, or of the same ``-drive``."""
    for one in waiting:
        if one.device == disk.device:
            return one
    named = [one for one in waiting if disk.backend and one.backend == disk.backend]
    return named[0] if named else None


class _Check:
    """One disk that was kept, and the files that the waiting QEMU has for it."""

    def __init__(self, pid: int, disk: GuestDisk, files: Sequence[DiskFile]) -> None:
        self._root = f"/proc/{pid}/root"
        self._disk = disk
        self._files = files
        self._kept = disk.files[0]

    def run(self) -> str | None:
        """Say what cannot be seen; None: all is seen to be right.

        Raises:
            MismatchError: it is seen to be wrong.
        """
        try:
            return self._internal() if self._disk.kept == "internal" else self._external()
        except (StorageError, BytesError) as error:
            if isinstance(error, MismatchError):
                raise
            return str(error)

    def _internal(self) -> str | None:
        """A file that has the snapshot must be at it, and what lies over it must be empty."""
        name = self._disk.snapshot
        assert name is not None
        for number, file in enumerate(self._files):
            if file.format != _QCOW2:
                continue
            with self._look(file) as look:
                snapshot = look.named(name)
                if snapshot is None:
                    continue
                self._check_empty(number)
                if look.is_at(snapshot):
                    return self._check_unwritten(self._files[number + 1 :], self._disk.files[1:])
            raise self._wrong(
                f"{file.path} was written to since the snapshot of the image's moment; before QEMU "
                f"is started: qemu-img snapshot -a {name} {file.path}"
            )
        if any(self._is_kept(file) for file in self._files):
            raise self._wrong(f"{self._kept.path} has no snapshot {name} any more")
        return f"{self._files[0].path} has no snapshot {name}"

    def _external(self) -> str | None:
        """The file that was covered must be as it was, and what lies over it now must be empty."""
        for number, file in enumerate(self._files):
            if self._is_kept(file):
                self._check_empty(number)
                return self._check_unwritten(self._files[number:], self._disk.files)
        return f"{self._kept.path} is not among its files"

    def _check_empty(self, count: int) -> None:
        """Refuse an overlay that holds anything itself, of those that lie uppermost."""
        for file in self._files[:count]:
            with self._look(file) as look:
                if look.is_empty:
                    continue
            below = self._files[count]
            if file.path == self._disk.overlay:
                said = "is where the guest went on after the save"
            else:
                said = "was written to"
            raise self._wrong(
                f"{file.path} {said}; give the waiting QEMU a new one: qemu-img create -f qcow2 "
                f"-b {below.path} -F {below.format or 'raw'} NEW"
            )

    def _check_unwritten(self, files: Sequence[DiskFile], then: Sequence[DiskFile]) -> str | None:
        """Refuse files that were written to since they were covered; say which were replaced."""
        for now, before in zip(files, then, strict=False):
            if before.modified_ns is None:
                continue
            try:
                status = Path(self._root + now.path).stat()
            except OSError as error:
                return f"{now.path}: {error.strerror}"
            if status.st_ino != before.inode or not self._is_same(now, before):
                return f"{now.path} is not the file that it was"
            if (status.st_mtime_ns, status.st_size) != (before.modified_ns, before.size):
                raise self._wrong(f"{now.path} was written to since the image was made")
        return None

    def _is_kept(self, file: DiskFile) -> bool:
        """Whether it is the file that was kept."""
        return self._is_same(file, self._kept)

    def _is_same(self, file: DiskFile, other: DiskFile) -> bool:
        """Whether two names are one file's."""
        if file.path == other.path:
            return True
        with suppress(OSError):
            return Path(self._root + file.path).samefile(self._root + other.path)
        return False

    @contextmanager
    def _look(self, file: DiskFile) -> Iterator[Qcow2Look]:
        """Look into a file under the name that the waiting QEMU has for it."""
        with naming(file.path), closing(open_for_reading(self._root + file.path)) as main:
            yield look_at_qcow2(main)

    def _wrong(self, what: str) -> MismatchError:
        return MismatchError(f"disk {self._disk.name}: {what}")
