"""QEMU's multifd + mapped-ram + direct-io writer, outside QEMU and on io_uring.

What is named here is public; everything else may change.
"""

from uringmig.errors import (
    FormatError,
    HostError,
    MismatchError,
    PeerError,
    StateError,
    StorageError,
    UringmigError,
)
from uringmig.format.device_state import DeviceState
from uringmig.format.headers import Configuration
from uringmig.memory.mapping import FileMemory
from uringmig.options import ReadOptions, WriteOptions
from uringmig.progress import Snapshot, TimeAccount
from uringmig.reader import BlockInfo, MappedRamReader
from uringmig.result import SaveResult
from uringmig.verify import VerifyReport, verify
from uringmig.writer import MappedRamWriter, RamBlock

__all__ = [
    "BlockInfo",
    "Configuration",
    "DeviceState",
    "FileMemory",
    "FormatError",
    "HostError",
    "MappedRamReader",
    "MappedRamWriter",
    "MismatchError",
    "PeerError",
    "RamBlock",
    "ReadOptions",
    "SaveResult",
    "Snapshot",
    "StateError",
    "StorageError",
    "TimeAccount",
    "UringmigError",
    "VerifyReport",
    "WriteOptions",
    "verify",
]
