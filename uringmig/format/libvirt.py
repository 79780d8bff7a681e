"""What libvirt's ``virsh save`` puts in front of QEMU's stream.

libvirt: src/qemu/qemu_saveimage.h, struct _virQEMUSaveHeader. The header is in the byte order of
the host that saved. No field says which; the version, a small number, gives it away. Then come the
domain's XML and perhaps a cookie, texts that nothing here interprets, padded for later edits; and
then the stream, up to the end of the file. In the sparse form it is mapped-ram, whose offsets are
those in the whole file.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from uringmig.errors import FormatError
from uringmig.format.headers import at_most, equal
from uringmig.units import MiB

MAGIC: Final = b"LibvirtQemudSave"
#: Stands in place of the magic until the image is whole.
MAGIC_PART: Final = b"LibvirtQemudPart"
VERSION_MAX: Final = 2
#: virQEMUSaveFormat, by number; the stream of 1 to 5 went through that program.
FORMATS: Final = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
FORMAT_RAW: Final = 0
FORMAT_SPARSE: Final = 6
#: A domain's XML with its cookie and libvirt's 64 KiB to spare; large ones have some 100 KiB.
DATA_BYTES_MAX: Final = 64 * MiB


@dataclass(frozen=True, slots=True)
class LibvirtHeader:
    """The 92 bytes at the start of an image; offsets and lengths in bytes.

    Attributes:
        version: 1 or 2.
        data_length: bytes between the header and the stream.
        was_running: the guest ran when it was saved.
        format: number of the stream's form, see `FORMATS`.
        cookie_offset: of the cookie's text from the end of the header; 0 is none.
    """

    version: int
    data_length: int
    was_running: bool
    format: int
    cookie_offset: int

    STRUCT: ClassVar[Struct] = Struct("<16s5I56x")
    SWAPPED: ClassVar[Struct] = Struct(">16s5I56x")

    @property
    def stream_offset(self) -> int:
        """Absolute offset of QEMU's stream."""
        return self.STRUCT.size + self.data_length

    @property
    def sparse(self) -> bool:
        """Whether the stream is mapped-ram."""
        return self.format == FORMAT_SPARSE

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read the header of an image whose stream can be read: raw or sparse.

        Raises:
            FormatError: it is none, incomplete, of another version, compressed, or a length in
                it is out of proportion.
        """
        magic = data[: len(MAGIC)]
        if magic == MAGIC_PART:
            raise FormatError(
                "libvirt image that was never completed", offset=0, expected=MAGIC, found=magic
            )
        if magic != MAGIC:
            raise FormatError("not a libvirt save image", offset=0, expected=MAGIC, found=magic)
        equal("length of libvirt's header", cls.STRUCT.size, len(data), at=0)
        fields = cls.STRUCT.unpack(data)
        if fields[1] > VERSION_MAX:
            swapped = cls.SWAPPED.unpack(data)
            fields = swapped if swapped[1] <= VERSION_MAX else fields
        _, version, data_length, was_running, form, cookie_offset = fields
        if not 1 <= version <= VERSION_MAX:
            raise FormatError(
                "version of libvirt's header", offset=16, expected="1 or 2", found=version
            )
        at_most("length of libvirt's XML", DATA_BYTES_MAX, data_length, at=20)
        at_most("was-running flag", 1, was_running, at=24)
        _check_format(form)
        at_most("offset of libvirt's cookie", data_length, cookie_offset, at=32)
        return cls(version, data_length, bool(was_running), form, cookie_offset)


def _check_format(form: int) -> None:
    """Refuse a stream that only another program can make readable."""
    if form in (FORMAT_RAW, FORMAT_SPARSE):
        return
    name = FORMATS[form] if form < len(FORMATS) else "unknown"
    raise FormatError(
        f"libvirt image in format {name}: its stream cannot be read as it lies",
        offset=28,
        expected=f"{FORMAT_RAW} (raw) or {FORMAT_SPARSE} (sparse)",
        found=form,
    )
