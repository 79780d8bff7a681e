"""Which device and file system a folder is on, told so that it can be recognised later.

A device is named as sysfs does: ``major:minor``.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from uringmig.errors import StorageError

#: The folder of each block device, by its number.
BLOCK_DEVICES: Final = Path("/sys/dev/block")
_BY_ID: Final = "/dev/disk/by-id"


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device and the file system on it.

    Attributes:
        filesystem: its kind, as in ``/proc/mounts``.
        device: its number; of a file system without a device, the kernel's number for it.
        source: what is mounted, such as ``/dev/vda1`` or ``server:/export``.
        identity: what stays the same over a reboot: by-id link, serial number, or None.
        model: as the device says, or None.
    """

    filesystem: str
    device: str
    source: str
    identity: str | None = None
    model: str | None = None

    def matches(self, other: Place) -> bool:
        """Say whether both are the same place; numbers count only where there is no identity."""
        if self.filesystem != other.filesystem:
            return False
        if self.identity is not None and other.identity is not None:
            return self.identity == other.identity
        return (self.device, self.model) == (other.device, other.model)


@dataclass(frozen=True, slots=True)
class Mount:
    """What is mounted somewhere.

    Attributes:
        filesystem: its kind.
        number: that the kernel gave the file system; btrfs and overlays have some of their own.
        source: what was mounted.
        device: number of the block device that ``source`` is; None if it is none.
    """

    filesystem: str
    number: str
    source: str
    device: str | None


def place_of(folder: str) -> Place:
    """Find out what a folder is on.

    Raises:
        StorageError: the folder cannot be opened, or the kernel does not tell.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError("cannot open the folder", errno=error.errno, path=folder) from None
    try:
        mount = mount_of(fd, folder)
    finally:
        os.close(fd)
    source = mount.source
    if mount.device is None:
        return Place(
            filesystem=mount.filesystem, device=mount.number, source=source, identity=source
        )
    return Place(
        filesystem=mount.filesystem,
        device=mount.device,
        source=source,
        identity=_identity(mount.device),
        model=_attribute(whole_disk(BLOCK_DEVICES / mount.device), "device/model"),
    )


def mount_of(fd: int, path: str) -> Mount:
    """Find the mount that a descriptor is on (proc(5)).

    Raises:
        StorageError: the kernel does not tell; names ``path``.
    """
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    number = re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # id parent major:minor root point options [optional fields] - kind source options
        before, _, after = line.partition(" - ")
        fields = before.split()
        if number is not None and fields[0] == number[1]:
            kind, source = after.split(" ")[:2]
            source = _unescape(source)
            return Mount(kind, fields[2], source, _device_at(source))
    raise StorageError("cannot tell which file system this is", path=path)


def device_name(number: int) -> str:
    """A device's number, ``st_dev`` or ``st_rdev``, as sysfs writes it."""
    return f"{os.major(number)}:{os.minor(number)}"


def whole_disk(device: Path) -> Path:
    """The folder of the whole disk that a block device, by its folder, is, or is a part of."""
    folder = device.resolve()
    return folder.parent if os.path.exists(folder / "partition") else folder


def _device_at(source: str) -> str | None:
    """Number of the device that was mounted; None where it was none."""
    try:
        status = os.stat(source)
    except OSError:
        return None
    return device_name(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _unescape(text: str) -> str:
    """Undo the octal escapes of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _identity(device: str) -> str | None:
    """What a block device is called by itself: by-id link, mapper id, or the disk's serial."""
    name = (BLOCK_DEVICES / device).resolve().name
    links = Path(_BY_ID)
    if os.path.isdir(links):
        for link in sorted(links.iterdir()):
            if link.resolve().name == name:
                return link.name
    disk = whole_disk(BLOCK_DEVICES / device)
    # The backing file says which loop device it is; its number is whichever was free.
    for attribute in ("dm/uuid", "loop/backing_file", "wwid", "device/serial", "serial"):
        value = _attribute(disk, attribute)
        if value is not None:
            part = _attribute(BLOCK_DEVICES / device, "partition")
            return value if part is None else f"{value}-part{part}"
    return None


def _attribute(folder: Path, name: str) -> str | None:
    """Read an attribute of /sys; None if there is none or it is empty."""
    try:
        return (folder / name).read_text(errors="replace").strip() or None
    except OSError:
        return None
