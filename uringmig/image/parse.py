"""One mapped-ram file's main stream, parsed whole: where everything is, checked against the file.

The decoding is `format.mainstream`'s; this feeds it from a file and keeps what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig import signals
from uringmig.errors import FormatError, StateError
from uringmig.format.constants import TAIL_BYTES_MAX, VMDESCRIPTION_BYTES_MAX
from uringmig.format.cursor import BE32
from uringmig.format.device_state import DeviceState
from uringmig.format.events import (
    ConfigurationRead,
    Event,
    FullSection,
    RamBlockRead,
    RamStarted,
)
from uringmig.format.headers import Configuration
from uringmig.format.layout import BlockLayout
from uringmig.format.mainstream import MainStreamReader
from uringmig.format.vmdescription import VmDescription, find_vmdescription
from uringmig.image.digest import StreamDigest
from uringmig.pages import bitmap
from uringmig.storage.mainfile import READ_BYTES, MainFile
from uringmig.units import MiB, TiB

#: Bytes outside page areas and bitmaps that an image may have: padding of 1 MiB a block, and more.
_STREAM_BYTES_MAX: Final = TAIL_BYTES_MAX + 4096 * MiB
_PIECE_BYTES: Final = MiB
#: Where the vmdescription is looked for first, and the factor from look to look; it has 100 KiB.
_DESCRIPTION_LOOK: Final = MiB
_DESCRIPTION_LOOK_GROWTH: Final = 8
#: Largest guest whose image is read: its bitmaps, held in memory, are 1 GiB then. Far beyond
#: QEMU's hosts of today, and it keeps a sparse file's claims in proportion.
MEMORY_BYTES_MAX: Final = 32 * TiB


@dataclass(slots=True)
class ParsedImage:
    """What the main stream of an image says; offsets are absolute, sizes in bytes.

    Attributes:
        blocks: in the order of the stream.
        device_state: everything after ram's START section.
        sections: the device sections, in their order.
    """

    base: int
    file_size: int
    configuration: Configuration = field(init=False)
    section_id: int = field(init=False)
    blocks: list[BlockLayout] = field(default_factory=list)
    device_state: DeviceState = field(init=False)
    sections: list[FullSection] = field(default_factory=list)


def parse_image(file: MainFile, *, base: int = 0) -> ParsedImage:
    """Read and check the main stream of a mapped-ram file.

    Args:
        file: the image, or a file that holds it from ``base`` on, to its end.
        base: QEMU's ``offset=``.

    Raises:
        StateError: ``base`` is negative.
        FormatError: it is not a whole mapped-ram image; names block, offset, expected and found.
        StorageError: it cannot be read.
    """
    image = ParsedImage(base=base, file_size=file.size)
    if base < 0:
        raise StateError(f"offset {base} is negative")
    if base > image.file_size:  # perhaps more than the kernel takes for an offset
        raise FormatError(
            "stream is cut in its header", offset=base,
            expected="an offset in the file", found=f"a file of {image.file_size} bytes",
        )  # fmt: skip
    reader = MainStreamReader(base=base, file_size=image.file_size)
    while not reader.finished:
        data = file.read_at(reader.offset, READ_BYTES)
        if data:
            reader.feed(data)
        else:
            reader.end_of_input()
        for event in reader.events():
            _note(event, image)
    assert reader.tail_offset is not None, "a stream ended before ram's START section did"
    tail_length = reader.offset - reader.tail_offset
    image.device_state = DeviceState(file.read_at(reader.tail_offset, tail_length))
    return image


def read_description(file: MainFile, *, base: int = 0) -> VmDescription:
    """Find the vmdescription that ends a file; with it at hand a stream is read in one go.

    Args:
        file: a file that ends with a stream.
        base: where the stream begins.

    Raises:
        FormatError: the file does not end with one.
        StorageError: it cannot be read.
    """
    size = file.size
    head = 1 + BE32.size
    most = min(size - base, head + VMDESCRIPTION_BYTES_MAX)
    look = _DESCRIPTION_LOOK
    while True:
        start = max(base, size - look)
        tail = file.read_at(start, size - start)
        place = find_vmdescription(tail)
        if place is not None:
            return VmDescription.parse(tail[place + head :], at=start + place + head)
        if look >= most:
            raise FormatError(
                "vmdescription missing, cut, or followed by other bytes",
                offset=size,
                expected="one that ends here",
            )
        look = min(most, look * _DESCRIPTION_LOOK_GROWTH)


def read_bitmap(file: MainFile, block: BlockLayout) -> NDArray[np.uint8]:
    """Read one block's bitmap; packed uint8, little bit order, ``block.bitmap_bytes`` long.

    Only data is read: a sparse file that claims a huge block costs no more than it holds.

    Raises:
        FormatError: a bit is set past the last page, or the file ends inside the bitmap.
        StorageError: it cannot be read.
    """
    packed = np.zeros(block.bitmap_bytes, np.uint8)
    end = block.bitmap_offset + block.bitmap_bytes
    for start, length in file.data_pieces(block.bitmap_offset, end):
        data = file.read_at(start, length)
        if len(data) != length:
            raise FormatError("the file ends inside a bitmap", offset=start, block=block.idstr)
        at = start - block.bitmap_offset
        packed[at : at + length] = np.frombuffer(data, np.uint8)
    stray = bitmap.first_bit_from(packed, page_count=block.page_count)
    if stray is not None:
        raise FormatError(
            "bitmap has a bit past the end of the block", block=block.idstr,
            offset=block.bitmap_offset + stray // 8,
            expected=f"pages 0 to {block.page_count - 1}", found=f"page {stray}",
        )  # fmt: skip
    return packed


def stream_digest(file: MainFile, *, base: int, blocks: Sequence[BlockLayout]) -> str:
    """Digest every byte of an image outside its page areas, in file order; hex.

    Raises:
        FormatError: there is more of it than any image has.
        StorageError: it cannot be read.
    """
    digest = StreamDigest()
    areas = sorted((block.pages_offset, block.pages_end) for block in blocks)
    starts = [base, *(end for _, end in areas)]
    ends = [*(start for start, _ in areas), file.size]
    total = sum(ends) - sum(starts) - sum(block.bitmap_bytes for block in blocks)
    if total > _STREAM_BYTES_MAX:
        raise FormatError("too much between the page areas", found=f"{total} bytes")
    for start, end in zip(starts, ends, strict=True):
        for at in range(start, end, _PIECE_BYTES):
            signals.look()
            digest.update(at, file.read_at(at, min(_PIECE_BYTES, end - at)))
    return digest.hexdigest()


def _note(event: Event, image: ParsedImage) -> None:
    """Keep what one event says."""
    match event:
        case ConfigurationRead():
            image.configuration = event.configuration
        case RamStarted():
            image.section_id = event.section_id
            if event.total_bytes > MEMORY_BYTES_MAX:
                raise FormatError(
                    "total of the ramblocks", offset=event.offset,
                    expected=f"at most {MEMORY_BYTES_MAX}", found=event.total_bytes,
                )  # fmt: skip
        case RamBlockRead(mapped_ram=None):
            raise FormatError(
                "not a mapped-ram file but a plain migration stream", offset=event.offset
            )
        case RamBlockRead(mapped_ram=header):
            assert header is not None
            image.blocks.append(
                BlockLayout(
                    event.idstr, event.used_length, header.bitmap_offset, header.pages_offset
                )
            )
        case FullSection():
            image.sections.append(event)
