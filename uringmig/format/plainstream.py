"""A plain migration stream as bytes in order: what every QEMU loads from a file or a descriptor.

QEMU: migration/ram.c, ram_save_iterate(), ram_load_precopy(). Unlike a mapped-ram file a plain
stream makes the loader clear zero pages and compare the lengths of blocks. Its pages stand in one
PART section of their own, behind the device sections that must come before memory (virtio-mem);
the empty PART and END of the device state follow it unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import FormatError
from uringmig.format import constants as c
from uringmig.format.cursor import BE32, BE64, Cursor, StarvedError
from uringmig.format.device_state import DeviceState
from uringmig.format.events import DescriptionRead, FullSection, RamSectionEnded
from uringmig.format.headers import Configuration, SectionFooter, StreamHeader, pack_lstr
from uringmig.format.layout import pack_start
from uringmig.format.mainstream import MainStreamReader
from uringmig.options import PAGE_SIZE


def read_opening(data: bytes, *, at: int) -> Configuration:
    """Read how a stream begins: whether it is one, and what its configuration says.

    Args:
        data: its first bytes; 64 KiB are always enough.
        at: absolute offset of the first.

    Raises:
        FormatError: it is no migration stream, or its configuration breaks a rule or is cut.
    """
    cursor = Cursor(data, offset=at)
    try:
        StreamHeader.read(cursor)
        return Configuration.read(cursor)
    except StarvedError:
        raise FormatError(
            "stream is cut in its header or configuration",
            offset=at + len(data),
            expected="more bytes",
            found="none",
        ) from None


class PlainComposer:
    """Composes one plain stream: `setup`, then `records` of every window once, then `trailer`.

    Args:
        configuration: of a mapped-ram image or a plain stream; the capability mapped-ram is left
            out of what is written.
        blocks: (idstr, used_length in bytes) in the order of the stream.
        section_id: of the ram section, as the device state has it.
        device_state: what follows ram's START section.

    Raises:
        StateError: a name or a configuration that no stream can have.
        FormatError: the device state is not one that can follow such a START section.
    """

    def __init__(
        self,
        configuration: Configuration,
        blocks: Sequence[tuple[str, int]],
        *,
        section_id: int,
        device_state: DeviceState,
    ) -> None:
        self._blocks = tuple(blocks)
        self._footer = SectionFooter(section_id).pack()
        self._start = _plain_start(configuration, blocks, section_id)
        self._early = _early_bytes(self._start, device_state.tail)
        self._tail = device_state.tail
        self._part = bytes([c.QEMU_VM_SECTION_PART]) + BE32.pack(section_id)
        self._last_block: int | None = None

    def setup(self) -> bytes:
        """The stream up to the first page record."""
        return self._start + self._tail[: self._early] + self._part

    def records(
        self,
        block_index: int,
        memory: NDArray[np.uint8],
        present: NDArray[np.bool_],
        *,
        first_page: int,
        zeros: bool = True,
    ) -> Iterator[memoryview]:
        """Write the records of some pages of a block, each piece good until the next.

        Args:
            block_index: which block.
            memory: uint8, whole pages; read only where ``present``.
            present: one bool a page: it goes as it is; the others go as zero.
            first_page: page of the block that ``memory`` begins with.
            zeros: write records of zero pages, which make the loader clear them; without them its
                memory must be known to be zero.
        """
        pages = memory.reshape(-1, PAGE_SIZE)
        for kind, bits in ((c.RAM_SAVE_FLAG_PAGE, present), (c.RAM_SAVE_FLAG_ZERO, ~present)):
            if kind == c.RAM_SAVE_FLAG_ZERO and not zeros:
                continue
            numbers = np.flatnonzero(bits)
            if not len(numbers):
                continue
            is_page = kind == c.RAM_SAVE_FLAG_PAGE
            records = np.zeros((len(numbers), BE64.size + (PAGE_SIZE if is_page else 1)), np.uint8)
            words = (numbers + first_page) * PAGE_SIZE | kind | c.RAM_SAVE_FLAG_CONTINUE
            records[:, : BE64.size] = words.astype(">i8").view(np.uint8).reshape(-1, BE64.size)
            if is_page:
                records[:, BE64.size :] = pages if len(numbers) == len(pages) else pages[bits]
            flat = records.reshape(-1)
            if self._last_block != block_index:
                # CONTINUE means the block of the record before.
                self._last_block = block_index
                word = int(words[0]) & ~c.RAM_SAVE_FLAG_CONTINUE
                yield memoryview(BE64.pack(word) + pack_lstr(self._blocks[block_index][0]))
                flat = flat[BE64.size :]
            yield flat.data

    def trailer(self) -> bytes:
        """The stream from the end of the pages to its own end."""
        return BE64.pack(c.RAM_SAVE_FLAG_EOS) + self._footer + self._tail[self._early :]


def read_devices(
    configuration: Configuration,
    blocks: Sequence[tuple[str, int]],
    *,
    section_id: int,
    device_state: DeviceState,
) -> tuple[tuple[FullSection, ...], bytes]:
    """Read the sections of devices of a stream, in their order; arguments as `PlainComposer`.

    Returns:
        The sections, and the text of the vmdescription.

    Raises:
        FormatError: the device state is not one that can follow such a START section.
    """
    start = _plain_start(configuration, blocks, section_id)
    reader = MainStreamReader(file_size=len(start) + len(device_state.tail))
    reader.feed(start + device_state.tail)
    sections, description = [], b""
    for event in reader.events():
        if isinstance(event, FullSection):
            sections.append(event)
        elif isinstance(event, DescriptionRead):
            description = event.description.raw
    return tuple(sections), description


def _plain_start(
    configuration: Configuration, blocks: Sequence[tuple[str, int]], section_id: int
) -> bytes:
    """A plain stream from its first byte to the end of the list of blocks."""
    plain = replace(
        configuration,
        capabilities=tuple(
            name for name in configuration.capabilities if name != c.CAPABILITY_MAPPED_RAM
        ),
    )
    total = sum(used_length for _, used_length in blocks)
    return b"".join(
        (
            pack_start(plain, section_id=section_id, total_bytes=total),
            *(pack_lstr(idstr) + BE64.pack(length) for idstr, length in blocks),
            BE64.pack(c.RAM_SAVE_FLAG_EOS),
            SectionFooter(section_id).pack(),
        )
    )


def _early_bytes(start: bytes, tail: bytes) -> int:
    """Bytes of the device sections before the end of RAM; 0 where ram ends nowhere in the tail.

    The whole stream, but for its pages, is read for it as a loader would.
    """
    reader = MainStreamReader(file_size=len(start) + len(tail))
    reader.feed(start + tail)
    early = 0
    for event in reader.events():
        if isinstance(event, FullSection):
            early = event.offset + len(event.raw) - len(start)
        elif isinstance(event, RamSectionEnded) and event.section_type != c.QEMU_VM_SECTION_START:
            return early
    return 0
