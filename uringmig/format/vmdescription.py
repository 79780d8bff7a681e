"""The JSON text that ends a stream, read for one thing: how long each FULL section's body is.

Sections carry no length, so a section can be skipped only by what the vmdescription says of it.
QEMU: migration/vmstate.c, vmstate_save_state_v(), vmsd_desc_field_start(). The text comes from
outside and is decoded into typed structures only, within limits on bytes, objects and depth.
"""

from __future__ import annotations

from typing import Annotated, Final, Self

import msgspec
import numpy as np

from uringmig.errors import FormatError
from uringmig.format import constants as c
from uringmig.format.cursor import BE32
from uringmig.format.headers import at_most
from uringmig.units import MiB

#: A size that is out of all proportion is refused as such, not summed up.
_Size = Annotated[int, msgspec.Meta(ge=0, le=c.TAIL_BYTES_MAX)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]

#: Search steps of `find_vmdescription`: its arrays stay small whatever the bytes are.
_SEARCH_BYTES: Final = MiB


class _Field(msgspec.Struct, gc=False):
    """One field. Its size includes structures in it; equal elements of an array are listed once."""

    size: _Size
    array_len: _Size = 1


class _Subsection(msgspec.Struct):
    """A subsection as its parent lists it."""

    vmsd_name: str
    fields: list[_Field] = []
    subsections: list[_Subsection] = []


class _Device(msgspec.Struct):
    """One FULL section."""

    name: str
    instance_id: _Number
    fields: list[_Field] = []
    subsections: list[_Subsection] = []


class _Description(msgspec.Struct):
    """The whole text."""

    devices: list[_Device]


class DeviceDescription(msgspec.Struct, frozen=True):
    """One FULL section, as described.

    Attributes:
        name: its idstr.
        instance_id: which of the devices of that name.
        body_bytes: bytes between the section's header and its footer.
    """

    name: str
    instance_id: int
    body_bytes: int


class VmDescription(msgspec.Struct, frozen=True):
    """The vmdescription of one stream.

    Attributes:
        raw: the JSON text, verbatim.
        devices: one entry for each FULL section, in stream order.
    """

    raw: bytes
    devices: tuple[DeviceDescription, ...]

    @classmethod
    def parse(cls, raw: bytes, *, at: int = 0) -> Self:
        """Decode the text.

        Args:
            raw: the JSON text.
            at: absolute offset of its first byte, for the message.

        Raises:
            FormatError: beyond a limit of size, objects or depth, not JSON, or not of QEMU's shape.
        """
        at_most("length of the vmdescription", c.VMDESCRIPTION_BYTES_MAX, len(raw), at=at)
        objects = raw.count(b"{")
        at_most("objects in the vmdescription", c.VMDESCRIPTION_OBJECTS_MAX, objects, at=at)
        try:
            description = msgspec.json.decode(raw, type=_Description)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FormatError(
                "vmdescription", offset=at, expected="JSON as QEMU writes it", found=str(error)
            ) from None
        except RecursionError:
            raise FormatError("vmdescription is nested too deep", offset=at) from None
        devices = [
            DeviceDescription(
                device.name,
                device.instance_id,
                _body_bytes(device, depth=0, what=device.name, at=at),
            )
            for device in description.devices
        ]
        return cls(raw, tuple(devices))

    def pack(self) -> bytes:
        """Write the item from its type byte on."""
        return bytes([c.QEMU_VM_VMDESCRIPTION]) + BE32.pack(len(self.raw)) + self.raw


def _body_bytes(part: _Device | _Subsection, *, depth: int, what: str, at: int) -> int:
    """Add up the fields of a section or subsection, and its subsections with their headers."""
    at_most(f"depth of subsections of {what!r}", c.SUBSECTION_DEPTH_MAX, depth, at=at)
    total = sum(field.size * field.array_len for field in part.fields)
    for subsection in part.subsections:
        # Type byte, length byte, name, version; then the body.
        total += 1 + 1 + len(subsection.vmsd_name.encode()) + BE32.size
        total += _body_bytes(subsection, depth=depth + 1, what=what, at=at)
    at_most(f"described size of {what!r}", c.TAIL_BYTES_MAX, total, at=at)
    return total


def names_in_tail(tail: bytes) -> tuple[tuple[str, int], ...] | None:
    """Name and instance of each device section of a stream's tail; None: it does not tell.

    Args:
        tail: see `DeviceState`; older QEMUs leave the vmdescription out of a plain stream.

    Raises:
        FormatError: as `VmDescription.parse`.
    """
    place = find_vmdescription(tail)
    if place is None:
        return None
    at = place + 1 + BE32.size
    devices = VmDescription.parse(tail[at:], at=at).devices
    return tuple((device.name, device.instance_id) for device in devices)


def find_vmdescription(tail: bytes | bytearray) -> int | None:
    """Find the vmdescription item that ends exactly where ``tail`` does.

    The last such position is the right one: JSON holds no raw 0x06, so nothing inside the text
    can look like the item's head. The cost is linear in the last 32 MiB, whatever the bytes are.

    Returns:
        The index of the item's type byte, or None.
    """
    data = np.frombuffer(tail, dtype=np.uint8)
    head_bytes = 1 + BE32.size
    first = max(0, len(data) - head_bytes - c.VMDESCRIPTION_BYTES_MAX)
    end = len(data) - head_bytes + 1
    while end > first:
        start = max(first, end - _SEARCH_BYTES)
        places = np.flatnonzero(data[start:end] == c.QEMU_VM_VMDESCRIPTION) + start
        lengths = np.zeros(len(places), dtype=np.int64)
        for index in range(1, head_bytes):
            lengths = (lengths << 8) | data[places + index]
        matches = places[lengths == len(data) - head_bytes - places]
        if len(matches):
            return int(matches[-1])
        end = start
    return None
