"""What a plain stream shows at its two ends, for plans: nothing in between is read.

To know the pages of a stream it must be read whole, at a rate and while its disk has room for that,
which is for whoever copies it. A plan makes do with what the length of the file allows at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, Self

from uringmig.contents.source import ContentsBlock
from uringmig.contents.sourcefile import FileVersion, digest_of
from uringmig.errors import FormatError
from uringmig.format.events import RamSectionEnded
from uringmig.format.mainstream import MainStreamReader
from uringmig.format.plainrecords import PageIndex
from uringmig.format.plainstate import PlainState
from uringmig.format.plainstream import read_opening
from uringmig.image.parse import MEMORY_BYTES_MAX, read_description
from uringmig.options import PAGE_SIZE
from uringmig.storage.mainfile import READ_BYTES, MainFile, open_for_reading
from uringmig.units import MiB, TiB, align_down

#: Memory a stream may claim beyond what its length accounts for. QEMU leaves out pages that a
#: device says are of no use (virtio-mem, free page hints), and has at least a ZERO record of 9
#: bytes for every other: a short file that claims more is not a guest.
_UNNAMED_BYTES_MAX: Final = 4 * TiB
_RECORD_BYTES_LEAST: Final = 9
#: The list of the ramblocks is there by then: 4096 of them, each with a name of 255 bytes.
_HEAD_BYTES_MAX: Final = 4 * MiB
#: Pieces of the file that are read to guess how well it compresses, and the share of it they are.
_SAMPLES: Final = 8
_SAMPLED_SHARE: Final = 1 / 64
_SAMPLE_BYTES_MAX: Final = MiB


class PlainLook:
    """A plain stream in a file, looked at; a context manager.

    Args:
        path: the file.
        offset: where the stream begins; it ends with the file.
        kind: what the operator is told it is.

    Attributes:
        blocks: in the order of the stream.

    Raises:
        FormatError: it is no plain stream, is cut, or breaks a rule where it is looked at.
        StorageError: it cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, offset: int = 0, kind: str = "plain"
    ) -> None:
        self.kind = kind
        self._base = offset
        self._main = open_for_reading(os.fspath(path))
        try:
            self._version = FileVersion.of(self._main)
            self._fingerprint = stream_fingerprint(kind, self._version, self._main, offset)
            self.blocks = tuple(ContentsBlock(*block) for block in self._listed())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stored_bytes(self) -> int:
        """Bytes in pages that the stream has as data, at most: as many as fit into the file."""
        total = sum(block.used_length for block in self.blocks)
        return min(total, align_down(max(0, self._version.size - self._base), PAGE_SIZE))

    def fingerprint(self) -> str:
        """That of the contents, when they are opened."""
        return self._fingerprint

    def samples(self) -> Iterator[bytes]:
        """Some pieces from all over the file, a small share of it: pages, records and all."""
        length = self._version.size - self._base
        piece = min(_SAMPLE_BYTES_MAX, align_down(int(length * _SAMPLED_SHARE), PAGE_SIZE))
        for number in range(_SAMPLES):
            yield self._main.read_at(self._base + number * (length // _SAMPLES), piece)

    def close(self) -> None:
        """Close the file, and leave nothing of it in the page cache."""
        if self._main.fd >= 0:
            self._main.drop_cache()
        self._main.close()

    def _listed(self) -> list[tuple[str, int]]:
        """Read as far as the list of ramblocks goes."""
        reader, state = begin_reading(self._main, self._base, self._version.size, PageIndex())
        while reader.offset - self._base < _HEAD_BYTES_MAX:
            data = self._main.read_at(reader.offset, READ_BYTES)
            if data:
                reader.feed(data)
            else:
                reader.end_of_input()
            for event in reader.events():
                state.note(event)
                if isinstance(event, RamSectionEnded):
                    return state.blocks
        raise FormatError(
            f"no list of ramblocks in the first {_HEAD_BYTES_MAX} bytes", offset=self._base
        )


def begin_reading(
    main: MainFile, base: int, size: int, index: PageIndex
) -> tuple[MainStreamReader, PlainState]:
    """Begin to read a plain stream from its first byte, with the vmdescription at its end at hand.

    Raises:
        FormatError: it is no plain stream, or does not end as one.
        StorageError: it cannot be read.
    """
    if read_opening(main.read_at(base, READ_BYTES), at=base).mapped_ram:
        raise FormatError("not a plain migration stream but mapped-ram", offset=base)
    named = size // _RECORD_BYTES_LEAST * PAGE_SIZE
    state = PlainState(min(MEMORY_BYTES_MAX, _UNNAMED_BYTES_MAX + named))
    reader = MainStreamReader(base=base, file_size=size, index=index)
    reader.set_description(read_description(main, base=base))
    return reader, state


def stream_fingerprint(kind: str, version: FileVersion, main: MainFile, base: int) -> str:
    """Text for `Contents.fingerprint`: the file's version, and how the stream in it begins.

    All of it can be had without reading the stream: a plan asks whether the source has changed.
    """
    return f"{kind} {version} {base:x} {digest_of(main.read_at(base, READ_BYTES))}"
