"""What a save that was killed has left in a QEMU, and how it is put back.

Before anything is changed a note of it is left with QEMU, which keeps it whatever becomes of us:
the opaque text of a descriptor. So the next save finds it, or ``uringmig repair``.
"""

from __future__ import annotations

import fcntl
import os

from uringmig.errors import BusyError, PeerError, StorageError
from uringmig.format.constants import CAPABILITY_IGNORE_SHARED
from uringmig.qemu.diskundo import NOTE as DISKS_NOTE
from uringmig.qemu.diskundo import settle
from uringmig.qemu.guardprocess import GO_ON, HALTED, NOTES, OURS
from uringmig.qemu.monitor import SETTINGS_NOTE, Monitor


def heal(monitor: Monitor) -> tuple[str, ...]:
    """Put back what a save changed that was killed, guardian and all.

    Returns:
        What the operator should know, one line each.

    Raises:
        BusyError: that save is still alive.
        PeerError: QEMU refuses.
    """
    ours = [each for each in monitor.descriptors() if each[1].startswith(OURS)]
    notes = [opaque for _, opaque, _ in ours]
    if any(
        (opaque in NOTES.values() or opaque.startswith(DISKS_NOTE))
        and _is_held(monitor.peer_pid, number)
        for _, opaque, number in ours
    ):
        raise BusyError("another save of this VM is under way")
    done = []
    if NOTES[GO_ON] in notes and monitor.run_state() in HALTED:
        monitor.execute("cont")
        done.append("the guest stood still since a save of it was killed; it was let go on first")
    if not monitor.migration().ended:
        return tuple(done)  # settings stay as they are while they are used
    for fdset, opaque, _ in ours:
        if opaque.startswith(DISKS_NOTE):
            try:
                done += filter(None, [settle(monitor, opaque)])
            except (PeerError, StorageError) as error:
                done.append(f"what a killed save kept of the disks could not be undone: {error}")
                continue
        if opaque.startswith(SETTINGS_NOTE) and monitor.put_back_noted(opaque):
            done.append("migration settings that a killed save had changed were put back")
        monitor.remove_descriptors(fdset)
    if monitor.capabilities().get(CAPABILITY_IGNORE_SHARED):
        done.append(
            f"{CAPABILITY_IGNORE_SHARED} is on in this QEMU: images that others save of it lack "
            "its shared RAM; unless somebody wants that, switch it off (migrate-set-capabilities)"
        )
    return tuple(done)


def _is_held(pid: int, number: int) -> bool:
    """Whether the save that left a note still lives: it holds a lock on the note's file.

    Where we may not look it is taken for alive: its guest must not go on under its eyes.
    """
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
