"""The file a source is read from: has it changed, and a name for this very version of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from uringmig.errors import MismatchError
from uringmig.image.digest import StreamDigest
from uringmig.storage.mainfile import MainFile


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What tells one version of a file from another: device, inode, bytes, last change in ns."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: MainFile) -> Self:
        """Look at an open file."""
        status = os.fstat(file.fd)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, file: MainFile) -> None:
        """Refuse a file that is not the version it was.

        Raises:
            MismatchError: it changed meanwhile: what was read is a mixture.
        """
        found = FileVersion.of(file)
        if found != self:
            raise MismatchError(
                f"{file.path} changed while it was read", expected=self, found=found
            )

    def __str__(self) -> str:
        return f"{self.device:x}.{self.inode:x}.{self.size:x}.{self.mtime_ns:x}"


def digest_of(*pieces: bytes | memoryview) -> str:
    """Digest of pieces of a stream, each with its number and length; hex."""
    digest = StreamDigest()
    for number, piece in enumerate(pieces):
        digest.update(number, piece)
    return digest.hexdigest()
