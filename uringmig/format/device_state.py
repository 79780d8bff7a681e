"""The device state of an image: everything after ram's START section, as bytes kept verbatim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from uringmig.errors import StateError
from uringmig.format import constants as c
from uringmig.format.compose import compose_ram_section
from uringmig.format.cursor import BE32

#: A vmdescription of no device, in the shape QEMU writes.
_NO_DEVICES: Final = b'{"configuration": {}, "page_size": 4096, "devices": []}'


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What follows the footer of ram's START section in a mapped-ram file.

    Attributes:
        tail: the bytes, verbatim, to the end of the vmdescription: FULL sections, ram's PART and
            END, commands, the EOF byte, the vmdescription item. Its PART and END name the ram
            section's id, so a tail goes with a START section of that id only.
    """

    tail: bytes

    @classmethod
    def empty(cls, section_id: int = 1) -> Self:
        """Make the state of a machine without devices."""
        return cls.compose(section_id, early=(), full=(), vmdescription=_NO_DEVICES)

    @classmethod
    def compose(
        cls, section_id: int, early: Sequence[bytes], full: Sequence[bytes], vmdescription: bytes
    ) -> Self:
        """Put sections together as QEMU orders them.

        Args:
            section_id: id of the ram section.
            early: FULL sections that stood before the end of RAM, each from its type byte to its
                footer; they must stay there.
            full: the FULL sections that stood after it.
            vmdescription: the JSON text, without the item's header.

        Raises:
            StateError: the vmdescription is longer than a reader accepts.
        """
        if len(vmdescription) > c.VMDESCRIPTION_BYTES_MAX:
            raise StateError(f"a vmdescription of {len(vmdescription)} bytes is too long")
        return cls(
            b"".join(
                (
                    *early,
                    compose_ram_section(c.QEMU_VM_SECTION_PART, section_id=section_id),
                    compose_ram_section(c.QEMU_VM_SECTION_END, section_id=section_id),
                    *full,
                    bytes([c.QEMU_VM_EOF, c.QEMU_VM_VMDESCRIPTION]),
                    BE32.pack(len(vmdescription)),
                    vmdescription,
                )
            )
        )
