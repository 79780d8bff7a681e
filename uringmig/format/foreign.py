"""What a file is that is no migration stream, by its first bytes: for messages only."""

from __future__ import annotations

from typing import Final

#: As many bytes are enough for every name here.
HEAD_BYTES: Final = 16

#: Beginnings, the longer before the shorter of the same.
_KINDS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"LibvirtQemudSave", "a libvirt save image (virsh save), which archive jobs read"),
    (b"LibvirtQemudPart", "a libvirt save image that was never completed"),
    (b"Libv", "a libvirt save image (virsh save), which archive jobs read"),
    (b"uringmig cold", "a cold image of an archive, which the archive commands read"),
    (b"uringmig partial", "an archive's copy that was interrupted"),
    (b"uringmig journal", "the journal of an archive's copy"),
    (b"urin", "a file of an archive of uringmig"),
    (b"makedumpfile", "a flattened kdump file (makedumpfile -F)"),
    (b"KDUMP", "a kdump file"),
    (b"PAGEDU", "a Windows crash dump"),
    (b"\x7fELF", "an ELF file, such as a core dump"),
    (b"EMiL", "a LiME memory dump"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"KDMV", "a VMDK disk image"),
    (b"LibxenFmt", "a Xen save image"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x89LZO", "compressed by lzop: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"\x04\x22\x4d\x18", "compressed by lz4: unpack it first"),
    (b"SQLite format 3", "an SQLite database"),
    (b"{", "a text, perhaps an image's manifest"),
)


def kind_of(head: bytes) -> str | None:
    """Name the kind of a file.

    Args:
        head: its first bytes, `HEAD_BYTES` or as many as there are.
    """
    for beginning, kind in _KINDS:
        if head.startswith(beginning):
            return kind
    if head and not any(head):
        return "zeros: raw memory, or an image that begins at an offset (--offset)"
    return None
