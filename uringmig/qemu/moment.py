"""The one moment that an image from outside is of: the state of the devices, and the proof.

QEMU writes the state of its devices into a memory file of ours (``xen-save-devices-state``, which
has nothing of Xen in it and takes milliseconds). The guest's clock is part of that state: if it is
the same at the end, the guest stood still in between.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from contextlib import ExitStack
from typing import Final

from uringmig import signals
from uringmig.errors import BusyError, PeerError
from uringmig.format.constants import CAPABILITY_MAPPED_RAM, TAIL_BYTES_MAX
from uringmig.format.device_state import DeviceState
from uringmig.format.devicesections import DeviceSections
from uringmig.format.headers import Configuration
from uringmig.qemu.guardian import Standstill
from uringmig.qemu.guardprocess import DEVICES
from uringmig.qemu.guestmemory import GuestMemory
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.vmsave import refuse_state

#: Id of the ram section: QEMU counts its devices' from 0, and takes them for signed numbers.
RAM_SECTION_ID: Final = 0x7FFFFFFF
RAM_CHANGED: Final = "the VM's RAM changed as it was to be saved; try again"
_DEVICES: Final = ("/machine/peripheral", "/machine/peripheral-anon")
#: Devices whose state is more than ``xen-save-devices-state`` writes: how their types begin.
_ITERATING: Final = ("vfio-",)


class Moment:
    """What a guest is at one moment, beside its memory; it stands still from then on.

    Args:
        monitor: of the VM.
        memory: of the VM, as it was found before.
        still: the guest, which has stopped.

    Attributes:
        state: of its devices, with what the guest was before it was stopped.
        received_seconds: how long it took to get that.

    Raises:
        BusyError: the VM's RAM is not the one that was found.
        PeerError: QEMU refuses, or writes too much, or the guest is not here any more.
        FormatError: the state is not as expected.
    """

    def __init__(self, monitor: Monitor, memory: GuestMemory, still: Standstill) -> None:
        self._monitor = monitor
        self._still = still
        refuse_state(still.found)  # it may have been migrated away since the first look
        began = time.monotonic()
        devices = device_sections(monitor)
        self.received_seconds = time.monotonic() - began
        run_state = still.found
        if still.live:  # it may have fallen asleep, or woken up, between the look and the stop
            run_state = "suspended" if devices.suspended else "running"
        self.state: DeviceState = devices.device_state(RAM_SECTION_ID, run_state)
        self._clock = devices.clock
        if not memory.is_still(monitor.ram_blocks()):
            raise BusyError(RAM_CHANGED)

    def check(self) -> None:
        """Make sure that the guest stands still since then: what was read meanwhile is of then.

        Raises:
            BusyError: it does not.
            PeerError: QEMU went away.
        """
        clock = device_sections(self._monitor).clock
        done = self._still.disturbance
        if done is None and clock != self._clock:  # of a guest that was found stopped
            done = "let the guest go on"
        if done is not None:
            raise BusyError(f"another client {done} before its memory was saved")


def configuration_of(monitor: Monitor) -> Configuration:
    """What QEMU would put at the beginning of its own image."""
    identity = b""
    if monitor.capabilities().get("validate-uuid"):
        identity = uuid.UUID(monitor.execute("query-uuid")["UUID"]).bytes
    return Configuration(
        monitor.machine_type(),
        (CAPABILITY_MAPPED_RAM,),
        uuid=identity if any(identity) else None,  # QEMU has none unless it was told
    )


def refuse_what_is_more(monitor: Monitor) -> None:
    """Refuse a VM with a device that QEMU cannot save, or saves in another way than is used here.

    Raises:
        PeerError: names it.
    """
    # Asked for its state nevertheless, QEMU dies (10.0: nvme).
    reasons = monitor.migration().info.get("blocked-reasons")
    if reasons:
        raise PeerError(f"this VM cannot be saved: {'; '.join(map(str, reasons))}")
    for folder in _DEVICES:
        for entry in monitor.execute("qom-list", path=folder):
            kind = str(entry["type"]).removeprefix("child<").removesuffix(">")
            if kind.startswith(_ITERATING):
                raise PeerError(
                    f"this VM cannot be saved: the state of {kind} {entry['name']!r} is more than "
                    "can be read from outside"
                )


def device_sections(monitor: Monitor) -> DeviceSections:
    """The state of all devices of a guest that stands still, or has not begun.

    Raises:
        PeerError: QEMU refuses, or writes too much.
        FormatError: it is not as expected.
    """
    with signals.deferred(), ExitStack() as stack:  # it takes milliseconds
        fd = os.memfd_create("uringmig-devices", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        # QEMU looks for a descriptor of exactly this access mode.
        theirs = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, theirs)
        fdset = monitor.add_descriptor(theirs, DEVICES)
        try:
            # live=True, the default, would make the disks of a stopped VM inactive.
            monitor.execute("xen-save-devices-state", filename=f"/dev/fdset/{fdset}", live=False)
        finally:
            with contextlib.suppress(PeerError):
                monitor.remove_descriptors(fdset)
        size = os.fstat(fd).st_size
        if size > TAIL_BYTES_MAX:
            raise PeerError(f"QEMU's device state has {size} bytes, more than is taken")
        return DeviceSections.parse(os.pread(fd, size, 0))
