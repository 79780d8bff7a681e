"""Device state as QEMU's ``xen-save-devices-state`` writes it, and as an image has it.  Pure.

    be32 QEVM | be32 3 | FULL section ... | 00

These are the very sections of a migration stream, but nothing says how long one is: no length, no
vmdescription. A section ends with its footer, after which comes another section's header or the
end; where that may be said of several places, the first is taken from which the rest can be read.
A guest can plant such bytes in a device's buffer. The bytes are copied as they are, so QEMU reads
what it wrote; only our description of the sections would be cut wrongly. What is to be changed or
moved has therefore to be unmistakable, or is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Final, Self

from uringmig.errors import FormatError
from uringmig.format import constants as c
from uringmig.format.cursor import BE32
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import StreamHeader
from uringmig.options import PAGE_SIZE

#: Type, id, length of the name; then name, instance, version.
_HEAD_BYTES: Final = 1 + BE32.size + 1
_NUMBERS_BYTES: Final = 2 * BE32.size
_FOOTER_BYTES: Final = 1 + BE32.size
#: QEMU: migration/global_state.c, vmstate_globalstate: be32 length of the name and its end, name in
#: 32 bytes (9.0; 100 before), then flags, of which the second says that the guest was suspended.
_GLOBAL_STATE: Final = re.compile(
    rb"\x04(?P<id>.{4})\x0bglobalstate\0{4}\0\0\0\x01"
    rb"(?P<name>\0\0\0\x08running\0{25}).{2}\0{66}\x7e(?P=id)",
    re.DOTALL,
)
#: The same, whatever it says.
_TOLD_STATE: Final = re.compile(
    rb"\x04.{4}\x0bglobalstate\0{4}\0\0\0\x01.{4}(?P<name>.{32}).(?P<suspended>.)",
    re.DOTALL,
)
_NAME_BYTES: Final = 32
#: QEMU: hw/virtio/virtio-mem.c, the one device with early_setup: read before RAM.
_EARLY: Final = "virtio-mem-device-early"
#: QEMU: system/cpu-timers.c; its offset changes whenever the guest runs, and at no other time.
_CLOCK: Final = "timer"


def is_asleep(sections: Sequence[bytes]) -> bool:
    """Whether a guest slept (S3) when it was saved, and perhaps was stopped in its sleep.

    Args:
        sections: its FULL sections, each from its type byte on.
    """
    for raw in sections:
        match = _TOLD_STATE.match(raw)
        if match is not None:
            return match["name"].rstrip(b"\0") == b"suspended" or match["suspended"] == b"\1"
    return False


@dataclass(frozen=True, slots=True)
class _Section:
    """One FULL section; ``raw`` is from its type byte to its footer."""

    name: str
    instance_id: int
    version_id: int
    section_id: int
    raw: bytes
    body_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceSections:
    """The state of all devices at one moment."""

    _sections: tuple[_Section, ...]
    _data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Cut what QEMU wrote into its sections.

        Raises:
            FormatError: it is not such a state, or is cut.
        """
        StreamHeader.unpack(data[: StreamHeader.STRUCT.size])
        bounds = _bounds(data, StreamHeader.STRUCT.size)
        return cls(tuple(_section(data, start, end) for start, end in pairwise(bounds)), data)

    @property
    def names(self) -> tuple[tuple[str, int], ...]:
        """Name and instance of each section."""
        return tuple((section.name, section.instance_id) for section in self._sections)

    @property
    def clock(self) -> bytes:
        """What is the same in two states if, and only if, the guest did not run between them.

        Raises:
            FormatError: there is no such section.
        """
        for section in self._sections:
            if section.name == _CLOCK:
                return section.raw
        raise FormatError("device state without the guest's clock", expected=f"section {_CLOCK!r}")

    @property
    def suspended(self) -> bool:
        """Whether the guest was asleep when it was stopped; QEMU tells since 9.0."""
        return is_asleep([section.raw for section in self._sections])

    def device_state(self, section_id: int, run_state: str) -> DeviceState:
        """Make what follows ram's START section in an image.

        Args:
            section_id: id of the ram section.
            run_state: QEMU's word for what the guest is to be after a restore.

        Raises:
            FormatError: what has to be changed or moved is not unmistakable, or the id is taken.
        """
        early: list[_Section] = []
        full: list[_Section] = []
        for section in self._sections:
            if section.section_id == section_id:
                raise FormatError("device with the id of the ram section", found=section.name)
            (early if section.name.endswith(_EARLY) else full).append(section)
        if early:
            self._check_unmistakable()
        raws = [section.raw for section in full]
        if run_state != "running":  # QEMU writes "running", whatever the guest is
            was, told = self._telling(run_state)
            raws = [told if raw == was else raw for raw in raws]
        return DeviceState.compose(
            section_id, [section.raw for section in early], raws, _describe([*early, *full])
        )

    def _telling(self, run_state: str) -> tuple[bytes, bytes]:
        """The globalstate section as it is, and as it says that the guest is ``run_state``."""
        named = [section.raw for section in self._sections if section.name == "globalstate"]
        found = list(_GLOBAL_STATE.finditer(self._data))
        if len(found) != 1 or named != [found[0][0]]:
            raise FormatError(
                f"device state that cannot be made to say {run_state!r}",
                expected="one globalstate section",
                found=f"{len(found)} that look like it",
            )
        raw, start = found[0][0], found[0].start()
        first, end = found[0].start("name") - start, found[0].end("name") - start
        name = run_state.encode()
        new = BE32.pack(len(name) + 1) + name.ljust(_NAME_BYTES, b"\0")
        return raw, raw[:first] + new + raw[end:]

    def _check_unmistakable(self) -> None:
        """Refuse a state of which some section might end elsewhere."""
        start = StreamHeader.STRUCT.size
        for section in self._sections:
            if len(list(islice(_ends(self._data, start), 2))) > 1:
                raise FormatError(
                    "device state with an early section, of which it is not certain where its "
                    "sections end",
                    found=section.name,
                )
            start += len(section.raw)


def _bounds(data: bytes, start: int) -> list[int]:
    """Where each section begins, and where the last one ends."""
    path, open_ends, dead = [start], [_ends(data, start)], set()
    while path:
        if path[-1] == len(data) - 1 and data[path[-1]] == c.QEMU_VM_EOF:
            return path
        end = next((one for one in open_ends[-1] if one not in dead), None)
        if end is not None:
            path.append(end)
            open_ends.append(_ends(data, end))
        else:
            dead.add(path.pop())
            open_ends.pop()
    raise FormatError("device state that does not end as it should", offset=start)


def _ends(data: bytes, start: int) -> Iterator[int]:
    """Where the section that begins at ``start`` may end; nothing if none begins there."""
    body = _body_of(data, start)
    if body is None:
        return
    footer = bytes([c.QEMU_VM_SECTION_FOOTER]) + data[start + 1 : start + 1 + BE32.size]
    at = data.find(footer, body)
    while at >= 0:
        end = at + _FOOTER_BYTES
        is_last = end == len(data) - 1 and data[end] == c.QEMU_VM_EOF
        if is_last or _body_of(data, end) is not None:
            yield end
        at = data.find(footer, at + 1)


def _body_of(data: bytes, start: int) -> int | None:
    """Where the body of a section that begins at ``start`` begins; None: no header is there."""
    if len(data) < start + _HEAD_BYTES or data[start] != c.QEMU_VM_SECTION_FULL:
        return None
    name = data[start + _HEAD_BYTES : start + _HEAD_BYTES + data[start + _HEAD_BYTES - 1]]
    if not (name.isascii() and name.decode("latin-1").isprintable() and name):
        return None
    body = start + _HEAD_BYTES + len(name) + _NUMBERS_BYTES
    return body if body + _FOOTER_BYTES < len(data) else None


def _section(data: bytes, start: int, end: int) -> _Section:
    """One section between its bounds."""
    body = _body_of(data, start)
    assert body is not None, "bounds are those of sections"
    numbers = body - _NUMBERS_BYTES
    return _Section(
        name=data[start + _HEAD_BYTES : numbers].decode("ascii"),
        instance_id=BE32.unpack_from(data, numbers)[0],
        version_id=BE32.unpack_from(data, numbers + BE32.size)[0],
        section_id=BE32.unpack_from(data, start + 1)[0],
        raw=data[start:end],
        body_bytes=end - _FOOTER_BYTES - body,
    )


def _describe(sections: list[_Section]) -> bytes:
    """A vmdescription that says of each section how long it is, and no more."""
    devices = [
        {
            "name": section.name,
            "instance_id": section.instance_id,
            "vmsd_name": section.name,
            "version": section.version_id,
            "fields": [{"name": "raw", "type": "buffer", "size": section.body_bytes}],
        }
        for section in sections
    ]
    text = {"configuration": {}, "page_size": PAGE_SIZE, "devices": devices}
    return json.dumps(text).encode()
