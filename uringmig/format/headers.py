"""The fixed and small records of a migration stream: definition, bytes, refusal; nothing else.

Rules: `pack` trusts its fields. `read` takes the record from a cursor that may lack bytes;
`unpack` takes exactly the record's bytes. Both refuse with the absolute offset of the field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self, TypeVar

import msgspec

from uringmig.errors import FormatError, StateError
from uringmig.format import constants as c
from uringmig.format import foreign
from uringmig.format.cursor import BE32, Cursor, StarvedError, printable
from uringmig.options import PAGE_SIZE
from uringmig.units import is_aligned


def pack_lstr(name: str) -> bytes:
    """Write a name as a length byte and ASCII.  QEMU: qemu_put_counted_string().

    Raises:
        StateError: the name is empty, too long, or not printable ASCII.
    """
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= c.IDSTR_MAX):
        raise StateError(f"not a name of 1 to {c.IDSTR_MAX} printable ASCII characters: {name!r}")
    return bytes([len(name)]) + name.encode("ascii")


class StreamHeader(msgspec.Struct, frozen=True):
    """Magic and version.  QEMU: migration/savevm.c, qemu_savevm_state_header()."""

    STRUCT: ClassVar[Struct] = Struct(">II")

    def pack(self) -> bytes:
        """Write the 8 bytes."""
        return self.STRUCT.pack(c.QEMU_VM_FILE_MAGIC, c.QEMU_VM_FILE_VERSION)

    @classmethod
    def read(cls, cursor: Cursor) -> Self:
        """Read the header.

        Raises:
            FormatError: another magic (not a migration stream) or version.
        """
        at = cursor.offset
        # The magic is judged alone, so that four bytes are enough to refuse a foreign file.
        head = cursor.ahead(foreign.HEAD_BYTES)
        if cursor.take(4) != c.QEMU_VM_FILE_MAGIC.to_bytes(4, "big"):
            kind = foreign.kind_of(head)
            raise FormatError(
                "not a migration stream" + ("" if kind is None else f" but {kind}"),
                offset=at,
                expected="QEVM",
                found=repr(head[:4])[1:],
            )
        equal("stream version", c.QEMU_VM_FILE_VERSION, cursor.be32(), at=at + 4)
        return cls()

    @classmethod
    def unpack(cls, data: bytes, *, at: int = 0) -> Self:
        """Read the 8 bytes; see `read`."""
        return unpack_whole("stream header", cls.read, data, at=at)


@dataclass(frozen=True, slots=True)
class Configuration:
    """Machine type and the settings a loader compares.  QEMU: savevm.c, vmstate_configuration.

    Attributes:
        machine: machine type, such as ``pc-q35-10.0``.
        capabilities: as listed; QEMU lists only ``x-ignore-shared`` and ``mapped-ram``. Empty
            stands for no such subsection.
        target_page_bits: log2 of the page size, or None where the subsection is absent (x86).
        uuid: 16 bytes, or None where the subsection is absent.
    """

    machine: str
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    uuid: bytes | None = None

    @property
    def mapped_ram(self) -> bool:
        """Whether pages have slots in the file instead of records in the stream."""
        return c.CAPABILITY_MAPPED_RAM in self.capabilities

    @property
    def ignore_shared(self) -> bool:
        """Whether shared file-backed blocks are left out and each block carries its gpa."""
        return c.CAPABILITY_IGNORE_SHARED in self.capabilities

    def pack(self) -> bytes:
        """Write the item from its type byte 0x07 on, subsections in QEMU's order.

        Raises:
            StateError: a name that is not printable ASCII or too long, a uuid not of 16 bytes,
                too many or unknown capabilities, another page size than `PAGE_SIZE`.
        """
        machine = pack_lstr(self.machine)[1:]
        parts = [bytes([c.QEMU_VM_CONFIGURATION]), BE32.pack(len(machine)), machine]
        if self.target_page_bits is not None:
            if self.target_page_bits != c.TARGET_PAGE_BITS:
                raise StateError(f"target_page_bits {self.target_page_bits} is not supported")
            parts += [_pack_subsection(c.CONFIGURATION_PAGE_BITS), BE32.pack(self.target_page_bits)]
        if self.capabilities:
            unknown = set(self.capabilities) - c.KNOWN_CAPABILITIES
            if unknown or len(self.capabilities) > c.CAPABILITIES_MAX:
                raise StateError(f"unknown or too many capabilities: {self.capabilities}")
            parts += [
                _pack_subsection(c.CONFIGURATION_CAPABILITIES),
                BE32.pack(len(self.capabilities)),
            ]
            parts += [pack_lstr(name) for name in self.capabilities]
        if self.uuid is not None:
            if len(self.uuid) != c.UUID_BYTES:
                raise StateError(f"a uuid has {c.UUID_BYTES} bytes, not {len(self.uuid)}")
            parts += [_pack_subsection(c.CONFIGURATION_UUID), self.uuid]
        return b"".join(parts)

    @classmethod
    def read(cls, cursor: Cursor) -> Self:
        """Read the item; it ends before the first byte that opens no subsection.

        Raises:
            FormatError: no configuration, a bad or overlong name, an unknown or repeated
                subsection or capability, x-ignore-shared beside mapped-ram, pages not of 4 KiB.
        """
        at = cursor.offset
        equal("configuration section missing", c.QEMU_VM_CONFIGURATION, cursor.u8(), at=at)
        at = cursor.offset
        length = cursor.be32()
        at_most("length of the machine name", c.MACHINE_NAME_MAX, length, at=at)
        machine = printable(cursor.take(length), what="machine name", at=at)
        seen: set[str] = set()
        capabilities: tuple[str, ...] = ()
        page_bits: int | None = None
        uuid: bytes | None = None
        while cursor.peek(1)[0] == c.QEMU_VM_SUBSECTION:
            name = _read_subsection(cursor, seen)
            if name == c.CONFIGURATION_CAPABILITIES:
                capabilities = _read_capabilities(cursor)
            elif name == c.CONFIGURATION_PAGE_BITS:
                at = cursor.offset
                page_bits = cursor.be32()
                equal("target page bits", c.TARGET_PAGE_BITS, page_bits, at=at)
            else:
                uuid = cursor.take(c.UUID_BYTES)
        return cls(machine, capabilities, page_bits, uuid)

    @classmethod
    def unpack(cls, data: bytes, *, at: int = 0) -> Self:
        """Read an item that is exactly ``data``; see `read`."""
        # Only the byte after a configuration tells that it has ended.
        return unpack_whole("configuration", cls.read, data, at=at, follower=b"\0")


_SUBSECTIONS: Final = (
    c.CONFIGURATION_PAGE_BITS,
    c.CONFIGURATION_CAPABILITIES,
    c.CONFIGURATION_UUID,
)


def _pack_subsection(name: str) -> bytes:
    """Open a subsection of the configuration."""
    version = BE32.pack(c.CONFIGURATION_SUBSECTION_VERSION)
    return bytes([c.QEMU_VM_SUBSECTION]) + pack_lstr(name) + version


def _read_subsection(cursor: Cursor, seen: set[str]) -> str:
    """Read the head of a subsection of the configuration, each at most once."""
    cursor.u8()
    at = cursor.offset
    name = cursor.lstr("name of a configuration subsection")
    if name not in _SUBSECTIONS:
        raise FormatError(
            "unknown configuration subsection", offset=at, expected=_SUBSECTIONS, found=name
        )
    if name in seen:
        raise FormatError("repeated configuration subsection", offset=at, found=name)
    seen.add(name)
    at = cursor.offset
    equal(f"version of {name}", c.CONFIGURATION_SUBSECTION_VERSION, cursor.be32(), at=at)
    return name


def _read_capabilities(cursor: Cursor) -> tuple[str, ...]:
    """Read the body of ``configuration/capabilities``."""
    at = cursor.offset
    count = cursor.be32()
    at_most("count of capabilities", c.CAPABILITIES_MAX, count, at=at)
    names: list[str] = []
    for _ in range(count):
        where = cursor.offset
        name = cursor.lstr("name of a capability")
        if name not in c.KNOWN_CAPABILITIES:
            raise FormatError(
                "unknown capability", offset=where, expected="one QEMU has", found=name
            )
        if name in names:
            raise FormatError("repeated capability", offset=where, found=name)
        names.append(name)
    if c.CAPABILITY_MAPPED_RAM in names and c.CAPABILITY_IGNORE_SHARED in names:
        # QEMU before 11.0 neither writes nor reads such a file: its reader takes the gpa of a
        # block for the version of its mapped-ram header.
        raise FormatError(
            f"{c.CAPABILITY_IGNORE_SHARED} together with {c.CAPABILITY_MAPPED_RAM}",
            offset=at,
            expected="one of the two",
            found="both",
        )
    return tuple(names)


class SectionHeader(msgspec.Struct, frozen=True):
    """What opens a START or FULL section.  QEMU: migration/savevm.c, save_section_header().

    Attributes:
        section_type: QEMU_VM_SECTION_START or QEMU_VM_SECTION_FULL.
        section_id: chosen by the source; the footer and PART and END repeat it.
        idstr: name of the device.
        instance_id: which of the devices of that name.
        version_id: version of its state.
    """

    section_type: int
    section_id: int
    idstr: str
    instance_id: int
    version_id: int

    STRUCT: ClassVar[Struct] = Struct(">II")

    def pack(self) -> bytes:
        """Write the header from its type byte on."""
        return (
            bytes([self.section_type])
            + BE32.pack(self.section_id)
            + pack_lstr(self.idstr)
            + self.STRUCT.pack(self.instance_id, self.version_id)
        )

    @classmethod
    def read(cls, cursor: Cursor) -> Self:
        """Read the header.

        Raises:
            FormatError: the type byte opens no such section, or the name is not text.
        """
        at = cursor.offset
        section_type = cursor.u8()
        if section_type not in (c.QEMU_VM_SECTION_START, c.QEMU_VM_SECTION_FULL):
            raise FormatError(
                "section type", offset=at, expected="START or FULL", found=f"{section_type:#04x}"
            )
        section_id = cursor.be32()
        idstr = cursor.lstr("name of a section")
        instance_id, version_id = cls.STRUCT.unpack(cursor.take(cls.STRUCT.size))
        return cls(section_type, section_id, idstr, instance_id, version_id)

    @classmethod
    def unpack(cls, data: bytes, *, at: int = 0) -> Self:
        """Read a header that is exactly ``data``; see `read`."""
        return unpack_whole("section header", cls.read, data, at=at)


class SectionFooter(msgspec.Struct, frozen=True):
    """What ends the body of every section.  QEMU: migration/savevm.c, save_section_footer()."""

    section_id: int

    STRUCT: ClassVar[Struct] = Struct(">BI")

    def pack(self) -> bytes:
        """Write the 5 bytes."""
        return self.STRUCT.pack(c.QEMU_VM_SECTION_FOOTER, self.section_id)

    @classmethod
    def unpack(cls, data: bytes, *, at: int = 0) -> Self:
        """Read the 5 bytes.

        Raises:
            FormatError: another marker stands there.
        """
        _exact("section footer", data, cls.STRUCT.size, at=at)
        marker, section_id = cls.STRUCT.unpack(data)
        equal("section footer missing", c.QEMU_VM_SECTION_FOOTER, marker, at=at)
        return cls(section_id)


class Command(msgspec.Struct, frozen=True):
    """A command to the loader; has no footer.  QEMU: savevm.c, qemu_savevm_command_send()."""

    command: int
    payload: bytes = b""

    STRUCT: ClassVar[Struct] = Struct(">BHH")

    def pack(self) -> bytes:
        """Write the item from its type byte on."""
        head = self.STRUCT.pack(c.QEMU_VM_COMMAND, self.command, len(self.payload))
        return head + self.payload

    @classmethod
    def read(cls, cursor: Cursor) -> Self:
        """Read the item.

        Raises:
            FormatError: a command other than OPEN_RETURN_PATH, PING and SWITCHOVER_START, or a
                payload of another length than the command has.
        """
        at = cursor.offset
        _, command, length = cls.STRUCT.unpack(cursor.take(cls.STRUCT.size))
        if command not in c.COMMAND_PAYLOAD_BYTES:
            name = c.COMMAND_NAMES.get(command, "unknown")
            raise FormatError(
                f"command {name} cannot be part of an image",
                offset=at + 1,
                expected=f"one of {', '.join(map(str, c.COMMAND_PAYLOAD_BYTES))}",
                found=command,
            )
        name = c.COMMAND_NAMES[command]
        equal(f"length of command {name}", c.COMMAND_PAYLOAD_BYTES[command], length, at=at + 3)
        return cls(command, cursor.take(length))

    @classmethod
    def unpack(cls, data: bytes, *, at: int = 0) -> Self:
        """Read an item that is exactly ``data``; see `read`."""
        return unpack_whole("command", cls.read, data, at=at)


class MappedRamHeader(msgspec.Struct, frozen=True):
    """Where one ramblock's bitmap and pages lie.  QEMU: migration/ram.c, MappedRamHeader.

    Attributes:
        page_size: bytes of a page; only `PAGE_SIZE` is accepted.
        bitmap_offset: absolute file offset of the bitmap.
        pages_offset: absolute file offset of page 0.
    """

    page_size: int
    bitmap_offset: int
    pages_offset: int

    STRUCT: ClassVar[Struct] = Struct(">IQQQ")

    def pack(self) -> bytes:
        """Write the 28 bytes, the version first."""
        return self.STRUCT.pack(
            c.MAPPED_RAM_HDR_VERSION, self.page_size, self.bitmap_offset, self.pages_offset
        )

    @classmethod
    def unpack(cls, data: bytes, *, at: int = 0, block: str | None = None) -> Self:
        """Read the 28 bytes of the block named ``block``.

        QEMU takes version 0 and any page size, and dies of a division by a page size of 0.

        Raises:
            FormatError: version or page size are others, pages not aligned to a page, or an
                offset no file can have.
        """
        _exact("mapped-ram header", data, cls.STRUCT.size, at=at)
        version, page_size, bitmap_offset, pages_offset = cls.STRUCT.unpack(data)
        equal("mapped-ram header version", c.MAPPED_RAM_HDR_VERSION, version, at=at, block=block)
        equal("mapped-ram page size", PAGE_SIZE, page_size, at=at + 4, block=block)
        at_most("bitmap offset", c.FILE_OFFSET_MAX, bitmap_offset, at=at + 12, block=block)
        at_most("pages offset", c.FILE_OFFSET_MAX, pages_offset, at=at + 20, block=block)
        if not is_aligned(pages_offset, PAGE_SIZE):
            raise FormatError(
                "pages offset",
                offset=at + 20,
                block=block,
                expected=f"a multiple of {PAGE_SIZE}",
                found=pages_offset,
            )
        return cls(page_size, bitmap_offset, pages_offset)


_Record = TypeVar("_Record")


def unpack_whole(
    what: str,
    read: Callable[[Cursor], _Record],
    data: bytes,
    *,
    at: int,
    follower: bytes = b"",
) -> _Record:
    """Read one record that is exactly ``data``; ``follower`` are bytes that it only peeks at.

    Raises:
        FormatError: what ``read`` refuses, a record that is cut, or bytes left over.
    """
    cursor = Cursor(data + follower, offset=at)
    try:
        record = read(cursor)
    except StarvedError:
        raise FormatError(f"{what} is cut", offset=at + len(data)) from None
    if cursor.position != len(data):
        raise FormatError(
            f"bytes after {what}", offset=cursor.offset, expected=cursor.position, found=len(data)
        )
    return record


def equal(what: str, expected: int, found: int, *, at: int, block: str | None = None) -> None:
    """Refuse a field that may hold one value only.

    Raises:
        FormatError: it holds another.
    """
    if found != expected:
        raise FormatError(what, offset=at, block=block, expected=expected, found=found)


def at_most(what: str, limit: int, found: int, *, at: int, block: str | None = None) -> None:
    """Refuse a field beyond a limit.

    Raises:
        FormatError: it is beyond.
    """
    if found > limit:
        raise FormatError(what, offset=at, block=block, expected=f"at most {limit}", found=found)


def _exact(what: str, data: bytes, size: int, *, at: int) -> None:
    """Refuse data of another length than the record; what struct says of it names no offset."""
    equal(f"length of {what}", size, len(data), at=at)
