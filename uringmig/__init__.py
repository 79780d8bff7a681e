"""QEMU's multifd + mapped-ram + direct-io writer, outside QEMU and on io_uring.

What is named here is public; everything else may change. A name is loaded when it is first asked
for: whoever wants one does not wait for the others, and the command line has its signals in order
before anything that takes time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uringmig.errors import (
        FormatError,
        HostError,
        MismatchError,
        PeerError,
        StateError,
        StorageError,
        UringmigError,
    )
    from uringmig.export.conversion import ConvertResult, convert_image
    from uringmig.export.difference import BlockDiff, DiffReport, diff_images
    from uringmig.format.device_state import DeviceState
    from uringmig.format.headers import Configuration
    from uringmig.memory.mapping import FileMemory
    from uringmig.options import ReadOptions, WriteOptions
    from uringmig.progress import Snapshot, TimeAccount
    from uringmig.qemu.saving import save_vm
    from uringmig.qemu.vmsave import VmSave
    from uringmig.reader import BlockInfo, MappedRamReader
    from uringmig.result import SaveResult
    from uringmig.verify import VerifyReport, verify
    from uringmig.writer import MappedRamWriter, RamBlock

__all__ = [
    "BlockDiff",
    "BlockInfo",
    "Configuration",
    "ConvertResult",
    "DeviceState",
    "DiffReport",
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
    "VmSave",
    "WriteOptions",
    "convert_image",
    "diff_images",
    "save_vm",
    "verify",
]

#: Where each name is; the same as is imported above, which only type checkers read.
_MODULE_OF: Final = {
    "BlockDiff": "uringmig.export.difference",
    "BlockInfo": "uringmig.reader",
    "Configuration": "uringmig.format.headers",
    "ConvertResult": "uringmig.export.conversion",
    "DeviceState": "uringmig.format.device_state",
    "DiffReport": "uringmig.export.difference",
    "FileMemory": "uringmig.memory.mapping",
    "FormatError": "uringmig.errors",
    "HostError": "uringmig.errors",
    "MappedRamReader": "uringmig.reader",
    "MappedRamWriter": "uringmig.writer",
    "MismatchError": "uringmig.errors",
    "PeerError": "uringmig.errors",
    "RamBlock": "uringmig.writer",
    "ReadOptions": "uringmig.options",
    "SaveResult": "uringmig.result",
    "Snapshot": "uringmig.progress",
    "StateError": "uringmig.errors",
    "StorageError": "uringmig.errors",
    "TimeAccount": "uringmig.progress",
    "UringmigError": "uringmig.errors",
    "VerifyReport": "uringmig.verify",
    "VmSave": "uringmig.qemu.vmsave",
    "WriteOptions": "uringmig.options",
    "convert_image": "uringmig.export.conversion",
    "diff_images": "uringmig.export.difference",
    "save_vm": "uringmig.qemu.saving",
    "verify": "uringmig.verify",
}


class _Package(ModuleType):
    """This package, which keeps a name for what is public.

    Loading a module of a package puts it there under its own name: `uringmig.verify`, which is a
    function, would become the module whenever somebody else loads that first.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(import_module(_MODULE_OF[name]), name)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
