"""The disks of a guest at the moment of its image, kept by one transaction while it stands still.

Either an internal snapshot in each disk's own qcow2 file, or an overlay over each disk, to which
the guest writes from then on. What cannot be done is refused before the guest is stopped. Until the
image has its name all of it is undone by whatever ends the save; should we be killed, by the next
save or ``uringmig repair``, which find a note of it that QEMU keeps.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from uringmig import signals
from uringmig.errors import BusyError, FormatError, PeerError, StorageError
from uringmig.image.guestfacts import GuestDisk, GuestFacts
from uringmig.qemu.disknodes import PROTOCOLS, DiskNode, writable_disks
from uringmig.qemu.diskundo import NOTE, Keeping, KeptDisk, overlay_ending, undo
from uringmig.qemu.diskway import NO_DISKS, DisksWay, refuse_disks
from uringmig.qemu.jobs import run_job
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.qmp import CommandError

#: Of a disk's own name in that of its overlay; a name has 255 bytes.
_STEM_BYTES_MAX: Final = 100


class DiskMoment:
    """The disks of a guest that is being saved; a context manager.

    Leaving it without `keep` undoes what was done; it should be left after the guest goes on.

    Args:
        monitor: of the VM.
        way: how its disks are kept.
        out: final name of the image that they are kept for.

    Attributes:
        way: as it was given.
        disks: those that the guest may write to, and how each is kept.
    """

    def __init__(
        self,
        monitor: Monitor,
        way: DisksWay = NO_DISKS,
        out: str | os.PathLike[str] = "",
    ) -> None:
        self._monitor = monitor
        self.way = way
        self._nodes: list[DiskNode] = []
        self._note: _Note | None = None
        self._keeping = Keeping(
            kind="external" if way.folder is not None else "internal",
            name=_new_name(),
            out=os.path.realpath(out),
            disks=[],
        )
        self.disks: list[GuestDisk] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Take back what was kept for an image that did not come to be."""
        if self._note is None:
            return
        with closing(self._note):
            try:
                undo(self._monitor, self._keeping)
            except (PeerError, StorageError) as second:
                # QEMU has the note still: the next save tries again.
                if error is None:
                    raise
                error.add_note(f"disks are not as they were ({self._keeping.name}): {second}")
            else:
                self._note.forget()

    def look(self) -> None:
        """Look at the disks, and refuse what cannot be kept; nothing is changed.

        Raises:
            BusyError: a block job is under way.
            PeerError: a disk cannot be kept this way; names it.
            FormatError: what QEMU says of its disks is not understood.
        """
        try:
            self._nodes = writable_disks(self._monitor)
        except (CommandError, FormatError):
            if self.way.kind != "none":
                raise
            return  # it fails no save, and the manifest's facts have a note why
        self.disks = [one.facts for one in self._nodes]
        if self.way.kind != "none":
            refuse_disks(self._monitor, self._at_risk(), self.way)

    def prepare(self) -> None:
        """Look at the disks, and make ready to keep them; the guest runs.

        Raises:
            BusyError: a block job is under way.
            PeerError: a disk cannot be kept this way; names it.
            FormatError: what QEMU says of its disks is not understood.
            StorageError: the overlays cannot be made.
        """
        self.look()
        at_risk = self._at_risk()
        if self.way.kind == "none" or not at_risk:
            return
        self._keeping.disks.extend(_to_keep(at_risk, self.way, self._keeping.name))
        with signals.deferred():
            self._note = _Note(self._monitor, self._keeping)
        if self.way.folder is not None:
            _make_overlays(self._monitor, self._keeping, at_risk, self.way.folder)

    def _at_risk(self) -> list[DiskNode]:
        """The disks that the image alone does not hold."""
        return [one for one in self._nodes if one.at_risk]

    def look_again(self) -> None:
        """Before a guest that has run on since `prepare` is stopped: its disks are to be the same.

        Raises:
            BusyError: they are others than were made ready.
            PeerError: as for `prepare`.
        """
        if self._note is None:
            self.prepare()
            return
        now = [(one.facts.device, one.facts.node) for one in writable_disks(self._monitor)]
        if now != [(one.facts.device, one.facts.node) for one in self._nodes]:
            raise BusyError("the VM's disks changed as it was to be saved; try again")

    def take(self) -> None:
        """Keep all disks as they are now, at once; the guest stands still.

        Raises:
            PeerError: QEMU refuses; the disks are as they were.
        """
        if self._note is None:
            return
        with signals.deferred():
            self._monitor.execute(
                "transaction", actions=[_action(self._keeping, one) for one in self._keeping.disks]
            )

    def describe(self, guest: GuestFacts | None) -> GuestFacts | None:
        """Say in the facts of a machine how its disks are kept, once they are.

        Raises:
            PeerError: QEMU went away.
            FormatError: what QEMU says of its disks is not understood.
        """
        if self._note is not None:
            by_node = {one.node: one for one in self._keeping.disks}
            # Once more: snapshots have their numbers now, and files the time of their last write.
            now = {one.facts.device: one for one in writable_disks(self._monitor)}
            self.disks = [
                self._kept(one.facts, by_node[one.facts.node], now.get(one.facts.device))
                if one.facts.node in by_node
                else one.facts
                for one in self._nodes
            ]
        if guest is None or not self.disks:
            return guest
        return msgspec.structs.replace(guest, disks=self.disks)

    def _kept(self, before: GuestDisk, disk: KeptDisk, now: DiskNode | None) -> GuestDisk:
        """The facts of a disk that has been kept."""
        replace = msgspec.structs.replace
        if self._keeping.kind == "internal":
            name = self._keeping.name
            number = None if now is None else dict(now.snapshots).get(name)
            return replace(before, kept="internal", snapshot=name, snapshot_id=number)
        # What was written to until now is behind the overlay, and stays as it is.
        files = (now.facts.files[1:] if now is not None else []) or before.files
        nodes = self._monitor.execute("query-named-block-nodes", flat=True)
        if any(each["node-name"] == disk.node and not each["ro"] for each in nodes):
            # But for what QEMU itself copies into it as it is read (-drive copy-on-read=on).
            files = [replace(files[0], size=None, modified_ns=None), *files[1:]]
        return replace(before, kept="external", overlay=disk.overlay, files=files)

    @property
    def are_kept(self) -> bool:
        """Whether anything of them is kept that would be undone."""
        return self._note is not None

    def keep(self) -> None:
        """The image has its name: what was kept of the disks belongs to it now."""
        if self._note is not None:
            with closing(self._note):
                self._note.forget()
            self._note = None

    def notes(self, *, goes_on: bool) -> tuple[str, ...]:
        """What the operator should know of the disks, now that the guest goes on or does not."""
        moved = tuple(
            f"from now on the guest's disk {one.name} is {one.overlay}: start it from there"
            for one in self.disks
            if one.overlay is not None
        )
        left = [one for one in self.disks if one.kept == "none"]
        if not left or not goes_on:
            return moved
        names = ", ".join(f"{one.name} ({one.files[0].path})" for one in left)
        return (
            *moved,
            f"the guest goes on writing to its disks, which are not kept: {names}; once it has, "
            "restoring this image with them damages its file systems (--disks keeps them)",
        )


def _new_name() -> str:
    """Of snapshots and, in part, of overlays; no other save has it."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return f"uringmig-{stamp}-{uuid.uuid4().hex[:8]}"


class _Note:
    """What QEMU keeps for us while disks are touched, locked for as long as we live."""

    def __init__(self, monitor: Monitor, keeping: Keeping) -> None:
        self._monitor = monitor
        self._lock = os.memfd_create("uringmig-disks", os.MFD_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # By another open of the file: a lock belongs to an open, and QEMU is to have none.
            fd = os.open(f"/proc/self/fd/{self._lock}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                text = NOTE + msgspec.json.encode(keeping).decode()
                self._fdset = monitor.add_descriptor(fd, text)
            finally:
                os.close(fd)
        except BaseException:
            os.close(self._lock)
            raise

    def forget(self) -> None:
        """Take it back: there is nothing left to undo."""
        with signals.deferred(), suppress(PeerError):  # QEMU may be gone
            self._monitor.remove_descriptors(self._fdset)

    def close(self) -> None:
        """Give the lock back, so that whoever finds the note may act on it."""
        os.close(self._lock)


def _to_keep(disks: Sequence[DiskNode], way: DisksWay, name: str) -> Iterator[KeptDisk]:
    """What is done with each node; several devices may write to one."""
    nodes = {one.facts.node: one.facts for one in disks}
    for number, facts in enumerate(nodes.values()):
        path = facts.files[0].path
        overlay = None
        if way.folder is not None:
            stem = Path(path).stem.encode()[:_STEM_BYTES_MAX].decode(errors="ignore")
            overlay = f"{way.folder}/{stem}-{overlay_ending(name, number)}"
        yield KeptDisk(
            node=facts.node,
            file=path,
            overlay=overlay,
            overlay_node=overlay and f"um-{name[-8:]}-{number}",
        )


def _action(keeping: Keeping, disk: KeptDisk) -> dict[str, Any]:
    """One part of the transaction."""
    if keeping.kind == "internal":
        data: dict[str, Any] = {"device": disk.node, "name": keeping.name}
        return {"type": "blockdev-snapshot-internal-sync", "data": data}
    # Not by blockdev-add: so the overlay is opened with the cache and the rest of what it covers.
    data = {
        "node-name": disk.node,
        "snapshot-file": disk.overlay,
        "snapshot-node-name": disk.overlay_node,
        "format": "qcow2",
        "mode": "existing",
    }
    return {"type": "blockdev-snapshot-sync", "data": data}


def _make_overlays(
    monitor: Monitor, keeping: Keeping, disks: Sequence[DiskNode], folder: str
) -> None:
    """Make the files to which the guest will write, empty, while it runs.

    QEMU formats them. It would also make them, but for everybody to read, and would write to what
    lies there; and it would take the name of a file behind another for relative to that other.

    Raises:
        StorageError: no file can be made there.
        PeerError: QEMU cannot write to it, as one that sees other folders or runs confined.
    """
    by_node = {one.facts.node: one.facts for one in disks}
    for disk in keeping.disks:
        assert disk.overlay is not None
        assert disk.overlay_node is not None
        facts = by_node[disk.node]
        _make_file(disk.overlay, like=facts.files[0].path, pid=monitor.peer_pid)
        form = facts.files[0].format or "raw"
        options = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": disk.overlay},
            "size": facts.size,
            "backing-file": disk.file,
            "backing-fmt": "raw" if form in PROTOCOLS else form,
        }
        with signals.deferred():
            run_job(monitor, disk.overlay_node, "blockdev-create", options=options)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError("cannot sync", errno=error.errno, path=folder) from None


def _make_file(path: str, *, like: str, pid: int) -> None:
    """Make an empty file that QEMU may write to, and whoever may read the disk, to read."""
    try:
        status = Path(f"/proc/{pid}/root{like}").stat()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if os.geteuid() == 0:
                os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o666)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError("cannot make the overlay", errno=error.errno, path=path) from None
