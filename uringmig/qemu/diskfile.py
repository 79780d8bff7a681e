"""A qcow2 file looked into: whether it holds anything itself, and what its snapshots are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import FormatError
from uringmig.format.qcow2 import OFFSET_MASK, SNAPSHOT_BYTES_MAX, Qcow2Header, Qcow2Snapshot
from uringmig.storage.mainfile import MainFile


@dataclass(frozen=True, slots=True)
class Qcow2Look:
    """What a file's disk is, by its tables.

    Attributes:
        header: of the file.
        snapshots: all of them.
    """

    file: MainFile
    header: Qcow2Header
    snapshots: tuple[Qcow2Snapshot, ...]

    @property
    def is_empty(self) -> bool:
        """Nothing was ever written to it: its disk is that of the file behind it."""
        return not self._table(self.header.l1_offset, self.header.l1_entries).any()

    def named(self, name: str) -> Qcow2Snapshot | None:
        """The snapshot of a name."""
        return next((one for one in self.snapshots if one.name == name), None)

    def is_at(self, snapshot: Qcow2Snapshot) -> bool:
        """Whether the disk is what it was when a snapshot was taken: all of it, to the byte."""
        if snapshot.size not in (None, self.header.size):
            return False
        now = self._table(self.header.l1_offset, self.header.l1_entries)
        then = self._table(snapshot.l1_offset, snapshot.l1_entries)
        shared = min(len(now), len(then))
        same = np.array_equal(now[:shared], then[:shared])
        return same and not now[shared:].any() and not then[shared:].any()

    def _table(self, offset: int, entries: int) -> NDArray[np.uint64]:
        """Where the tables of a table L1 are.

        Raises:
            FormatError: it goes on past the file's end.
        """
        data = self.file.read_at(offset, 8 * entries)
        if len(data) < 8 * entries:
            raise FormatError("qcow2's L1 ends past the file", offset=offset)
        return np.frombuffer(data, ">u8").astype(np.uint64) & np.uint64(OFFSET_MASK)


def look_at_qcow2(file: MainFile) -> Qcow2Look:
    """Read a file's headers; its tables are read as they are asked for.

    Raises:
        FormatError: it is no qcow2 file, or its headers break a rule.
        StorageError: it cannot be read.
    """
    header = Qcow2Header.unpack(file.read_at(0, Qcow2Header.STRUCT.size))
    snapshots: list[Qcow2Snapshot] = []
    if header.snapshots:
        at = header.snapshots_offset
        data = file.read_at(at, SNAPSHOT_BYTES_MAX * header.snapshots)
        snapshots = Qcow2Snapshot.unpack_all(data, header.snapshots, at=at)
    return Qcow2Look(file, header, tuple(snapshots))
