"""As much of a qcow2 file as tells what its disk is: headers of the file and of its snapshots.

QEMU: docs/interop/qcow2.txt; all big-endian. The table L1 says where the tables are that say where
each cluster is. A table that a snapshot refers to is not written to any more, a new one takes its
place in L1: so two L1 with the same entries are the same disk, and one without any is all of what
is behind the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from uringmig.errors import FormatError
from uringmig.format.headers import at_most
from uringmig.units import MiB

MAGIC: Final = b"QFI\xfb"
#: QEMU: block/qcow2.h, QCOW_MAX_L1_SIZE, QCOW_MAX_SNAPSHOTS.
L1_BYTES_MAX: Final = 32 * MiB
SNAPSHOTS_MAX: Final = 65536
#: Files are shorter, and the kernel takes no larger number.
OFFSET_MAX: Final = 1 << 62
#: What one takes in the list at most, with QEMU's limits of its name, number and what follows.
SNAPSHOT_BYTES_MAX: Final = 40 + 1024 + 128 + 256 + 8
#: Of an entry of L1: where its table is. The others are flags, of which one tells whether the table
#: is shared and so changes with the snapshots that are made and deleted.
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
_ALIGNMENT: Final = 8


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The beginning of a file; sizes and offsets in bytes.

    Attributes:
        size: of the disk.
        l1_offset: of the table L1, which has ``l1_entries`` of 8 bytes.
        snapshots_offset: of the list of ``snapshots``.
    """

    size: int
    l1_entries: int
    l1_offset: int
    snapshots: int
    snapshots_offset: int

    STRUCT: ClassVar[Struct] = Struct(">4sIQIIQIIQQIIQ")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read the header.

        Raises:
            FormatError: it is none, of another version, or a count is out of bounds.
        """
        if len(data) < cls.STRUCT.size or data[:4] != MAGIC:
            raise FormatError("not a qcow2 file", offset=0, expected=MAGIC, found=data[:4])
        fields = cls.STRUCT.unpack(data[: cls.STRUCT.size])
        _, version, _, _, _, size, _, entries, l1_offset, _, _, snapshots, snapshots_offset = fields
        if version not in (2, 3):
            raise FormatError("version of qcow2", offset=4, expected="2 or 3", found=version)
        at_most("entries of qcow2's L1", L1_BYTES_MAX // 8, entries, at=36)
        at_most("offset of qcow2's L1", OFFSET_MAX, l1_offset, at=40)
        at_most("snapshots of a qcow2 file", SNAPSHOTS_MAX, snapshots, at=60)
        at_most("offset of qcow2's snapshots", OFFSET_MAX, snapshots_offset, at=64)
        return cls(size, entries, l1_offset, snapshots, snapshots_offset)


@dataclass(frozen=True, slots=True)
class Qcow2Snapshot:
    """One internal snapshot.

    Attributes:
        id: its number, as text.
        name: as it was given.
        l1_offset: of its table L1, which has ``l1_entries``.
        size: of the disk then, in bytes; None in old files.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    size: int | None

    STRUCT: ClassVar[Struct] = Struct(">QIHHIIQII")
    #: Of the part that follows: bytes of state, and of the disk.
    EXTRA: ClassVar[Struct] = Struct(">QQ")

    @classmethod
    def unpack_all(cls, data: bytes, count: int, *, at: int) -> list[Self]:
        """Read a list of snapshots.

        Args:
            data: from where the list begins, at least to where it ends.
            count: of them.
            at: offset of ``data`` in the file.

        Raises:
            FormatError: it ends too early, or a length is out of bounds.
        """
        found, position = [], 0
        for _ in range(count):
            snapshot, position = cls._unpack(data, position, at)
            found.append(snapshot)
        return found

    @classmethod
    def _unpack(cls, data: bytes, position: int, at: int) -> tuple[Self, int]:
        """One of them, and where the next begins."""
        texts = position + cls.STRUCT.size
        if texts > len(data):
            raise FormatError("list of qcow2's snapshots ends too early", offset=at + position)
        fields = cls.STRUCT.unpack_from(data, position)
        l1_offset, entries, id_length, name_length, _, _, _, _, extra = fields
        at_most("entries of a snapshot's L1", L1_BYTES_MAX // 8, entries, at=at + position + 8)
        at_most("offset of a snapshot's L1", OFFSET_MAX, l1_offset, at=at + position)
        size = None
        if extra >= cls.EXTRA.size and texts + cls.EXTRA.size <= len(data):
            size = cls.EXTRA.unpack_from(data, texts)[1]
        texts += extra
        end = texts + id_length + name_length
        if end > len(data):
            raise FormatError("list of qcow2's snapshots ends too early", offset=at + position)
        words = data[texts:end]
        snapshot = cls(
            id=words[:id_length].decode(errors="replace"),
            name=words[id_length:].decode(errors="replace"),
            l1_offset=l1_offset,
            l1_entries=entries,
            size=size,
        )
        return snapshot, end + -end % _ALIGNMENT
