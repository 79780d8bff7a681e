"""Save a VM from outside: no migration runs, and no setting of QEMU's changes.

The guest is stopped; QEMU writes the state of its devices into a memory file of ours
(``xen-save-devices-state``, which has nothing of Xen in it and takes milliseconds); its memory is
mapped or read in its process; then it goes on, and the image is finished and published afterwards.
That the guest stood still in between is proved by its clock, which is part of the state of its
devices and is asked for once more at the end.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from uringmig import signals
from uringmig.errors import BusyError, PeerError
from uringmig.format.constants import CAPABILITY_MAPPED_RAM, TAIL_BYTES_MAX
from uringmig.format.devicesections import DeviceSections
from uringmig.format.headers import Configuration
from uringmig.options import WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.guardian import Standstill, standing_still
from uringmig.qemu.guardprocess import DEVICES
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.guestmemory import GuestMemory, guest_memory
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.vmsave import DONE_BUT, Then, VmSave, state_to_save
from uringmig.result import SaveResult
from uringmig.writer import MappedRamWriter, RamBlock

#: Id of the ram section: QEMU counts its devices' from 0, and takes them for signed numbers.
_RAM_SECTION_ID: Final = 0x7FFFFFFF
_DEVICES: Final = ("/machine/peripheral", "/machine/peripheral-anon")
#: Devices whose state is more than ``xen-save-devices-state`` writes: how their types begin.
_ITERATING: Final = ("vfio-",)


def save_outside(
    monitor: Monitor,
    out: str | os.PathLike[str],
    *,
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    then: Then | None = None,
    progress: ProgressCallback | None = None,
) -> VmSave:
    """Save a VM on this host, whatever its RAM, to one mapped-ram image.

    Args:
        monitor: of the VM.
        out: the image's final name.
        options: how to write.
        then: let the guest ``cont``, ``quit`` QEMU, or ``leave`` it stopped; None: as it was found.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        PeerError: the VM has something that cannot be saved this way, or QEMU failed; the guest is
            as it was.
        HostError: no right to read QEMU's process, or io_uring is required and cannot be had.
        FormatError: QEMU's device state is not as expected; the guest is as it was.
        StorageError: the image cannot be written; the guest is as it was.
    """
    _, healed = state_to_save(monitor)
    _refuse_what_is_more(monitor)
    with ExitStack() as stack:
        memory = stack.enter_context(guest_memory(monitor))
        still = stack.enter_context(standing_still(monitor))
        # What cannot be written at all shows before the guest is stopped.
        writer = stack.enter_context(
            MappedRamWriter(
                out,
                [RamBlock(b.idstr, memory.memory_of(b.idstr)) for b in memory.blocks],
                options=options,
                configuration=_configuration(monitor),
                section_id=_RAM_SECTION_ID,
                progress=progress,
            )
        )
        still.stop()
        image, notes, stopped = _write(monitor, memory, writer, still, then, facts=options.manifest)
        if then in ("leave", "quit"):
            still.keep()
    notes += _go_on(monitor, then, still)
    return VmSave(
        image=image,
        how="outside",
        blocks_mapped=tuple(memory.mapped),
        blocks_copied=tuple(memory.copied),
        stopped_seconds=stopped if still.live else 0.0,
        state_before=still.found,
        state_after=None if then == "quit" and not notes else _state_after(monitor),
        notes=(*image.notes, *healed, *notes),
    )


def _write(
    monitor: Monitor,
    memory: GuestMemory,
    writer: MappedRamWriter,
    still: Standstill,
    then: Then | None,
    *,
    facts: bool,
) -> tuple[SaveResult, list[str], float]:
    """Write the image of a guest that stands still, and let it go on as soon as its memory is.

    With ``facts`` the manifest gets those of the machine, too.

    Returns:
        The image, what went amiss, and how long the guest stood still, in seconds.
    """
    began = time.monotonic()
    devices = _devices(monitor)
    received = time.monotonic() - began
    run_state = still.found
    if still.live:  # it may have fallen asleep, or woken up, between the look and the stop
        run_state = "suspended" if devices.suspended else "running"
    state = devices.device_state(_RAM_SECTION_ID, run_state)
    if not memory.is_still(monitor.ram_blocks()):
        raise BusyError("the VM's RAM changed as it was to be saved; try again")
    writer.write_all()
    guest, notes = describe_guest(monitor) if facts else (None, ())
    if still.disturbed or _devices(monitor).clock != devices.clock:
        raise PeerError("another client let the guest go on before its memory was saved")
    amiss = []
    if then in (None, "cont"):
        try:
            still.go_on()
        except PeerError as error:
            amiss.append(f"{DONE_BUT} {error}")
    stopped = time.monotonic() - still.stopped_at
    image = writer.finish(state, guest=guest)
    image = replace(image, time=replace(image.time, receive=received), notes=(*image.notes, *notes))
    return image, amiss, stopped


def _go_on(monitor: Monitor, then: Then | None, still: Standstill) -> list[str]:
    """Do what was asked for, now that the image is durable."""
    try:
        if then == "cont" and not still.live:
            monitor.execute("cont")
        elif then == "quit":
            monitor.execute("quit")
    except PeerError as error:
        return [f"{DONE_BUT} {error}"]
    return []


def _state_after(monitor: Monitor) -> str | None:
    """QEMU's run state, or None if there is no QEMU any more."""
    try:
        return monitor.run_state()
    except PeerError:
        return None


def _configuration(monitor: Monitor) -> Configuration:
    """What QEMU would put at the beginning of its own image."""
    identity = b""
    if monitor.capabilities().get("validate-uuid"):
        identity = uuid.UUID(monitor.execute("query-uuid")["UUID"]).bytes
    return Configuration(
        monitor.machine_type(),
        (CAPABILITY_MAPPED_RAM,),
        uuid=identity if any(identity) else None,  # QEMU has none unless it was told
    )


def _refuse_what_is_more(monitor: Monitor) -> None:
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


def _devices(monitor: Monitor) -> DeviceSections:
    """The state of all devices of a guest that stands still.

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
