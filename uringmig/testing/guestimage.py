"""A real guest that can tell: Linux and busybox that remember their memory and say so.

The guest fills memory with random bytes, prints a digest of it on its serial console, keeps a
counter going in its own memory, and answers questions on the same console. After a restore it can
be asked again: an equal digest says that it remembers, a higher count that it goes on.

Its lines (each ends with CR LF, as serial consoles do)::

    UM digest=<md5 of all that was filled>    once filled, and as the answer to "digest"
    UM count=<n>                              every second, and as the answer to "count"
    UM ready                                  after the first digest: questions are read now
    UM ran=<status>                           after what the shell was told by "run <words>"
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uringmig.units import MiB, align_up

#: Where ci/setup puts the kernel and busybox: in the checkout, unpacked and not installed.
GUEST_FOLDER: Final = Path(__file__).resolve().parents[2] / ".cache" / "guest"

_INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /mem /state
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo
echo 1 >/proc/sys/kernel/printk
fill=0
least=0
modules=
for word in $(cat /proc/cmdline); do
    case $word in
        fill=*) fill=${word#fill=} ;;
        least=*) least=${word#least=} ;;
        modules=*) modules=${word#modules=} ;;
    esac
done
echo online >/sys/devices/system/memory/auto_online_blocks
for module in $(echo $modules | tr , ' '); do
    insmod /modules/$module.ko || echo "UM no module $module"
done
# Memory that a device brings in comes some time after its driver.
while [ $(awk '/^MemTotal/ { print $2 }' /proc/meminfo) -lt $((least * 1024)) ]; do
    sleep 0.1
done
mount -t tmpfs -o size=100%,nr_inodes=0 tmpfs /mem
mount -t tmpfs tmpfs /state

# The page cache of files in /mem is the memory that is filled; a digest reads all of it.
digest() { echo "UM digest=$(cat /mem/* | md5sum | cut -d' ' -f1)"; }

n=0
while [ $n -lt $fill ]; do
    dd if=/dev/urandom of=/mem/$(printf %05d $n) bs=1M count=1 2>/dev/null || echo "UM full at $n"
    n=$((n + 1))
done
echo 0 >/state/count
digest
# In one process, so that no two lines mix; the count is in the shell's own memory too.
(
    n=0
    while sleep 1; do
        n=$((n + 1))
        echo $n >/state/count.new && mv /state/count.new /state/count
        echo "UM count=$n"
    done
) &
# Writes two files in turn, and makes sure of the one when it has written the other.
busy() {
    n=0
    sum=
    while :; do
        dd if=/dev/urandom of=/state/busy.$((n % 2)) bs=1M count=4 2>/dev/null
        new=$(md5sum </state/busy.$((n % 2)))
        if [ -n "$sum" ] && [ "$(md5sum </state/busy.$(((n + 1) % 2)))" != "$sum" ]; then
            echo torn >/state/busy
            break
        fi
        sum=$new
        n=$((n + 1))
        echo $n >/state/busy.new && mv /state/busy.new /state/busy
    done
}

echo "UM ready"
while read -r line; do
    case $line in
        digest*) digest ;;
        run*) eval "${line#run }"; echo "UM ran=$?" ;;
        count*) echo "UM count=$(cat /state/count)" ;;
        busy*)
            [ -e /state/busy ] || { echo 0 >/state/busy; busy & }
            echo "UM busy=$(cat /state/busy)"
            ;;
        off*) poweroff -f ;;
    esac
done
"""

#: What virtio devices on a PCI bus need, in the order it is loaded.
_VIRTIO: Final = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
)


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What QEMU boots.

    Attributes:
        kernel: a Linux bzImage.
        initramfs: an uncompressed cpio archive with busybox, our /init and virtio's drivers.
    """

    kernel: Path
    initramfs: Path

    def command_line(
        self, *, fill_bytes: int, drivers: Sequence[str] = (), least_bytes: int = 0
    ) -> str:
        """The kernel command line.

        Args:
            fill_bytes: how much memory to fill; rounded up to whole MiB.
            drivers: virtio drivers to load first, for example ``virtio_mem``.
            least_bytes: memory to wait for, which devices bring in.
        """
        fill, least = align_up(fill_bytes, MiB) // MiB, least_bytes // MiB
        modules = ",".join([*_VIRTIO, *drivers] if drivers else [])
        return (
            f"console=ttyS0 quiet loglevel=1 panic=-1 fill={fill} least={least} modules={modules}"
        )


def build_guest(folder: Path) -> GuestImage | None:
    """Build the initramfs in ``folder`` from what ci/setup fetched; None if that is not there.

    The environment variables URINGMIG_KERNEL and URINGMIG_BUSYBOX name other files to use; another
    kernel's drivers are not known.
    """
    kernel = Path(os.environ.get("URINGMIG_KERNEL", GUEST_FOLDER / "vmlinuz"))
    busybox = Path(os.environ.get("URINGMIG_BUSYBOX", GUEST_FOLDER / "busybox"))
    if not (os.path.isfile(kernel) and os.path.isfile(busybox)):
        return None
    drivers = [] if "URINGMIG_KERNEL" in os.environ else sorted(GUEST_FOLDER.glob("modules/*.ko"))
    initramfs = folder / "initramfs.cpio"
    initramfs.write_bytes(
        _cpio(
            [
                ("bin", 0o040755, b""),
                ("bin/busybox", 0o100755, busybox.read_bytes()),
                ("init", 0o100755, _INIT.encode()),
                ("modules", 0o040755, b""),
                *((f"modules/{one.name}", 0o100644, one.read_bytes()) for one in drivers),
            ]
        )
    )
    return GuestImage(kernel, initramfs)


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive of (name, mode, content).  Linux: usr/gen_init_cpio.c.

    The kernel adds /dev/console by itself (its built-in initramfs).
    """
    archive = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = [inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
