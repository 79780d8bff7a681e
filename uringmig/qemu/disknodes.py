"""The disks of a running QEMU's guest, and the files behind them; nothing is changed here.

Counted is what a device of the guest may write to. QEMU names a file as it was told to: relative to
its own folder, or as a description in JSON where a name does not say all. A file is taken for known
if QEMU holds it open under the name that is found.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from uringmig.errors import FormatError
from uringmig.image.guestfacts import DiskFile, GuestDisk
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.qmp import CommandError

#: Flash is in the image as memory, and QEMU writes it to its file again when it loads that.
#: QEMU: hw/block/pflash_cfi01.c, postload_update_cb.
_IN_THE_IMAGE: Final = ("cfi.pflash01", "cfi.pflash02")
#: Devices whose disk another process writes to, of which QEMU knows nothing.
_ELSEWHERE: Final = ("vhost-user-blk", "vhost-user-scsi", "vhost-scsi")
#: Protocols under which a disk is a plain file or a block device.
PROTOCOLS: Final = ("file", "host_device")
_JSON: Final = "json:"
_DEVICES: Final = ("/machine/peripheral", "/machine/peripheral-anon")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNode:
    """A disk that the guest may write to, and what QEMU says of it.

    Attributes:
        facts: for the manifest.
        device_type: QOM type of the guest's device.
        driver: of the node that the device writes to; a format, a protocol, or a filter.
        named: QEMU has its file, and all behind it, open under the names that are told.
        info: its ``inserted`` of query-block; empty for a disk that QEMU does not know.
    """

    facts: GuestDisk
    device_type: str
    driver: str
    named: bool
    info: Mapping[str, Any]

    @property
    def snapshots(self) -> list[tuple[str, str]]:
        """Its internal snapshots: name and number."""
        return [(str(one["name"]), str(one["id"])) for one in _image(self.info, "snapshots", [])]

    @property
    def at_risk(self) -> bool:
        """Whether the image alone does not hold it."""
        return self.facts.kept != "image"


def writable_disks(monitor: Monitor) -> list[DiskNode]:
    """The disks that devices of the guest may write to; drives without medium are none.

    Raises:
        PeerError: QEMU went away.
        FormatError: what QEMU says of them is not understood.
    """
    place = _Place(monitor.peer_pid)
    try:
        found = [
            _disk(monitor, place, entry, entry["inserted"])
            for entry in monitor.execute("query-block")
            if entry.get("inserted") and not entry["inserted"]["ro"] and entry.get("qdev")
        ]
        return [*found, *_disks_elsewhere(monitor)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # msgspec's is a ValueError
        raise FormatError(f"QEMU's list of its disks is not understood: {error!r}") from None


def _disk(
    monitor: Monitor, place: _Place, entry: Mapping[str, Any], info: Mapping[str, Any]
) -> DiskNode:
    """One entry of query-block."""
    device = str(entry["qdev"])
    kind = _type_of(monitor, device)
    files = list(_chain(place, info))
    facts = GuestDisk(
        device=device,
        backend=entry["device"] or None,
        node=info["node-name"],
        size=info["image"]["virtual-size"],
        kept="image" if kind in _IN_THE_IMAGE else "none",
        files=[file for file, _ in files],
    )
    return DiskNode(
        # A manifest that holds it must be readable again.
        facts=msgspec.convert(msgspec.to_builtins(facts), GuestDisk),
        device_type=kind,
        driver=str(info["drv"]),
        named=all(held for _, held in files),
        info=info,
    )


def plain_name(name: str) -> str | None:
    """The file in what QEMU calls a node; None is a node that is no plain file.  Pure."""
    if not name.startswith(_JSON):
        # What has a colon before its first slash names another protocol (path_has_protocol).
        path = name.removeprefix("file:")
        head, colon, _ = path.partition(":")
        return path if path and (not colon or "/" in head) else None
    try:
        node = json.loads(name.removeprefix(_JSON))
    except (ValueError, RecursionError):
        return None
    while isinstance(node, dict):
        driver = node.get("driver")
        found = node.get("filename", node.get("file.filename"))
        if isinstance(found, str) and (driver in PROTOCOLS or "file.filename" in node):
            return found if node.get("file.driver", "file") in PROTOCOLS else None
        node = node.get("file")
    return None


class _Place:
    """Where QEMU's process is: its folder, its root, and the files that it has open."""

    def __init__(self, pid: int) -> None:
        self._root = f"/proc/{pid}/root"
        self._held = _open_files(pid)
        try:
            folder = str(Path(f"/proc/{pid}/cwd").readlink())
            folder.encode()
        except (OSError, UnicodeEncodeError):  # a name that no manifest can hold
            self._folder: str | None = None
        else:
            self._folder = folder

    def absolute(self, name: str) -> str:
        """A name as an absolute one, if that can be told."""
        if not name.startswith("/") and self._folder is not None:
            name = f"{self._folder}/{name}"
        return os.path.normpath(name)

    def status(self, path: str) -> os.stat_result | None:
        """What QEMU would see under that name, if it is what it has open."""
        try:
            status = Path(self._root + path).stat() if path.startswith("/") else None
        except (OSError, ValueError):
            return None
        return status if status is not None and _identity(status) in self._held else None


def _chain(place: _Place, info: Mapping[str, Any]) -> Iterator[tuple[DiskFile, bool]]:
    """The files of a node, from the one that is written to down to the last that is behind it.

    With each, whether QEMU has it open under that name.
    """
    image, behind = info.get("image"), False
    while isinstance(image, dict):
        name = str(image["filename"])
        plain = plain_name(name)
        path = name if plain is None else place.absolute(plain)
        form = str(image["format"]) if image.get("format") else None
        status = None if plain is None else place.status(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            yield (
                DiskFile(
                    path=path,
                    format=form,
                    inode=status.st_ino,
                    # The first is being written to: what it is now, it is not for long.
                    size=status.st_size if behind else None,
                    modified_ns=status.st_mtime_ns if behind else None,
                ),
                True,
            )
        else:
            yield DiskFile(path=path, format=form), status is not None
        image, behind = image.get("backing-image"), True


def _disks_elsewhere(monitor: Monitor) -> Iterator[DiskNode]:
    """Disks of which QEMU knows only the device."""
    for folder in _DEVICES:
        for entry in monitor.execute("qom-list", path=folder):
            kind = str(entry["type"]).removeprefix("child<").removesuffix(">")
            if kind.startswith(_ELSEWHERE):
                facts = GuestDisk(
                    device=f"{folder}/{entry['name']}", backend=None, node="-", size=0, kept="none",
                    files=[DiskFile(path=f"({kind})", format=None)],
                )  # fmt: skip
                yield DiskNode(facts=facts, device_type=kind, driver="", named=False, info={})


def _type_of(monitor: Monitor, device: str) -> str:
    """QOM type of a device, or "" where QEMU does not tell."""
    path = device if device.startswith("/") else f"/machine/peripheral/{device}"
    try:
        return str(monitor.execute("qom-get", path=path, property="type"))
    except CommandError:
        return ""


def _image(info: Mapping[str, Any], name: str, missing: Any) -> Any:
    """A member of what QEMU says of a node's image."""
    return info.get("image", {}).get(name, missing)


def _open_files(pid: int) -> frozenset[tuple[int, int]]:
    """Device and inode of all that a process has open; nothing where it may not be looked at."""
    found = set()
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(_identity(fd.stat()))
    return frozenset(found)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
