"""Whether a QEMU that waits for a load has the devices of the guest that was saved.

QEMU finds a device that it lacks in the middle of its only try; one that it has more than the guest
had starts as if it had just been plugged in, without a word. A QEMU that waits writes the state of
its devices like any other, so it can be asked for them beforehand.
"""

from __future__ import annotations

import re
from typing import Final

from uringmig.errors import FormatError, MismatchError, PeerError
from uringmig.format.vmdescription import names_in_tail
from uringmig.image.guestfacts import GuestFacts
from uringmig.qemu.guestfacts import processors_of
from uringmig.qemu.moment import device_sections
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.qmp import CommandError

#: One for each processor.  QEMU: hw/core/cpu-system.c, vmstate_cpu_common.
_PROCESSOR: Final = "cpu_common"
#: Of a device on a PCI bus, which is there or is not: other sections may depend on what a guest
#: has done.  QEMU: pcibus_get_dev_path, for example 0000:00:02.0/virtio-net.
_ON_PCI: Final = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\S*/")

#: QEMU: migration/savevm.c, qemu_savevm_non_migratable_list; qemu_loadvm_state refuses it, too.
_NO_STATE: Final = "non-migratable device"

Names = tuple[tuple[str, int], ...]


def check_devices(monitor: Monitor, tail: bytes, guest: GuestFacts | None) -> list[str]:
    """Refuse a waiting QEMU without a device or a processor of the guest's.

    Args:
        monitor: of a QEMU that waits.
        tail: the guest's device state.
        guest: what the image's manifest says of the machine; None: nothing.

    Returns:
        What the waiting QEMU has otherwise or more, one line each.

    Raises:
        MismatchError: names what is missing.
        PeerError: it has a device with which QEMU loads nothing, or went away.
    """
    saved, waiting = names_in_tail(tail), _names_in(monitor)
    if saved is None or waiting is None:
        return ["not compared: the devices of the image and those of the waiting QEMU"]
    saved_cpus, waiting_cpus = _processors(saved), _processors(waiting)
    if waiting_cpus < saved_cpus:
        raise MismatchError(
            "the waiting QEMU has fewer processors than the image (-smp)",
            expected=saved_cpus,
            found=waiting_cpus,
        )
    missing, more = _names(saved) - _names(waiting), _names(waiting) - _names(saved)
    for name in sorted(missing):
        if _ON_PCI.match(name):
            raise MismatchError(f"device {name} is in the image but not in the waiting QEMU")
    notes = []
    if waiting_cpus > saved_cpus:
        notes.append(f"the waiting QEMU has {waiting_cpus} processors, the image {saved_cpus}")
    if missing:
        notes.append(
            f"not seen in the waiting QEMU, which may refuse it: {', '.join(sorted(missing))}"
        )
    if more:
        notes.append(
            "in the waiting QEMU but not in the image, so as after its start: "
            f"{', '.join(sorted(more))}"
        )
    return notes + _check_processor(monitor, guest)


def _names_in(monitor: Monitor) -> Names | None:
    """The device sections of a QEMU; None: it cannot be asked.

    Raises:
        PeerError: it cannot load anything.
    """
    reasons = [str(one) for one in monitor.migration().info.get("blocked-reasons", ())]
    # Asked for the state of a device that has none, QEMU 10.0 dies.
    if any(reason.startswith(_NO_STATE) for reason in reasons):
        raise PeerError(f"the waiting QEMU can load no image: {'; '.join(reasons)}")
    if reasons:
        return None
    try:
        return device_sections(monitor).names
    except (CommandError, FormatError):
        return None


def _processors(names: Names) -> int:
    return sum(name == _PROCESSOR for name, _ in names)


def _names(names: Names) -> set[str]:
    return {name for name, _ in names}


def _check_processor(monitor: Monitor, guest: GuestFacts | None) -> list[str]:
    """Compare the models; QEMU checks what it can itself, feature by feature, or not at all."""
    saved = guest and guest.cpu_type
    found, _ = processors_of(monitor)
    if not saved or not found or saved == found:
        return []
    return [f"the processors of the image are {saved}, those of the waiting QEMU {found} (-cpu)"]
