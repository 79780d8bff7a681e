"""An entry's image, opened with what its manifest says of it, whatever its tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from uringmig.archive.coldread import open_cold
from uringmig.archive.entry import Entry, read_manifest
from uringmig.contents.comparing import Digests, compare_window
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import Contents, Row, WindowRead
from uringmig.errors import FormatError, MismatchError
from uringmig.image import digest, manifest
from uringmig.image.pieces import PieceTable
from uringmig.options import WINDOW_BYTES, ReadOptions
from uringmig.verify import compare_shape, compare_stream, piece_tables


@dataclass(frozen=True, slots=True)
class OpenedEntry:
    """An entry whose structure and manifest fit each other; a context manager.

    Attributes:
        contents: its memory; windows are not compared with the manifest by themselves.
        stream_damage: what differs outside the windows.
        digests: of every row of every block, by the manifest.
        offset_of: where a row is in the image's file; None where it has no place.
        tables: digests of pieces of each block, where the manifest has them.
    """

    contents: Contents
    stream_damage: tuple[MismatchError, ...]
    digests: Digests
    offset_of: Callable[[Row], int | None]
    tables: Sequence[PieceTable | None] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.contents.close()

    def mismatch(self, window: WindowRead) -> MismatchError | None:
        """Compare a window with the manifest's word; None is: it is what was saved."""
        return compare_window(
            window,
            self.digests[window.block_index][window.row],
            block=self.contents.blocks[window.block_index].idstr,
            offset=self.offset_of((window.block_index, window.row)),
            table=self.tables[window.block_index] if self.tables else None,
        )


class CheckedContents:
    """An opened entry as contents that give only what its manifest says; see `Contents`.

    Raises:
        MismatchError: something outside the windows differs.
    """

    def __init__(self, opened: OpenedEntry) -> None:
        if opened.stream_damage:
            raise opened.stream_damage[0]
        self._opened = opened
        contents = self._contents = opened.contents
        self.kind = contents.kind
        self.path = contents.path
        self.configuration = contents.configuration
        self.section_id = contents.section_id
        self.blocks = contents.blocks
        self.notes = contents.notes
        self.device_state = contents.device_state
        self.stored_bytes = contents.stored_bytes
        self.guest = contents.guest
        self.fingerprint = contents.fingerprint
        self.close = contents.close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """See `Contents`; each window is compared before it is handed out.

        Raises:
            MismatchError: one is not what was saved; or as for the contents.
        """
        for window in self._contents.windows(rows):
            mismatch = self._opened.mismatch(window)
            if mismatch is not None:
                raise mismatch
            yield window


def open_entry(
    entry: Entry,
    *,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    compared: bool = False,
) -> OpenedEntry:
    """Open an entry's image and compare everything but its pages with its manifest.

    Args:
        entry: of an archive.
        options: how to read.
        compared: windows are only compared, and may come without memory.

    Raises:
        FormatError: image or manifest breaks a rule of its format.
        MismatchError: blocks are other than the manifest's, so that nothing can be compared.
        StorageError: one of the files cannot be read.
        HostError: io_uring is required and cannot be had.
    """
    if entry.tier == "cold":
        return _open_cold(entry, options)
    return _open_hot(entry, options, compared)


def _open_hot(entry: Entry, options: ReadOptions, compared: bool) -> OpenedEntry:
    """A mapped-ram image; its digests are in the manifest."""
    said = manifest.decode(read_manifest(Path(entry.manifest)))
    with ExitStack() as stack:
        contents = stack.enter_context(
            MappedRamContents(entry.image, options=options, compared=compared)
        )
        reader = contents.reader
        shape = compare_shape(reader, said)
        if shape:
            raise shape[0]
        digests = [block.digests for block in said.blocks]
        damage = compare_stream(reader, said)
        tables = [] if damage else piece_tables(reader, said, damage)
        damage = damage or _compare_content(entry, contents, digests)
        reader.main.drop_cache()
        areas = [block.pages_offset for block in reader.image.blocks]
        stack.pop_all()
    return OpenedEntry(
        contents,
        tuple(damage),
        digests,
        offset_of=lambda row: areas[row[0]] + row[1] * WINDOW_BYTES,
        tables=tables,
    )


def _open_cold(entry: Entry, options: ReadOptions) -> OpenedEntry:
    """A cold image; its digests are in its index, of which the manifest has one."""
    said = manifest.decode_cold(read_manifest(Path(entry.manifest)))
    with ExitStack() as stack:
        contents = stack.enter_context(open_cold(entry.image, options=options))
        found = contents.header.index_digest.hex()
        if found != said.index_digest:
            raise MismatchError(
                f"{entry.image}: the index is not the manifest's",
                offset=contents.header.index_offset, expected=said.index_digest, found=found,
            )  # fmt: skip
        digests = [
            [contents.memory_digest((number, row)).hex() for row in range(block.row_count)]
            for number, block in enumerate(contents.blocks)
        ]
        damage = _compare_content(entry, contents, digests)
        stack.pop_all()
    return OpenedEntry(
        contents,
        tuple(damage),
        digests,
        offset_of=contents.frame_offset,
    )


def _compare_content(
    entry: Entry, contents: Contents, digests: list[list[str]]
) -> list[MismatchError]:
    """Compare the digest of the whole guest, which covers machine and device state too."""
    try:
        found = digest.content_digest(
            machine=contents.configuration.machine,
            blocks=[
                (block.idstr, block.used_length, [bytes.fromhex(one) for one in mine])
                for block, mine in zip(contents.blocks, digests, strict=True)
            ],
            device_state=contents.device_state().tail,
        )
    except ValueError:
        raise FormatError(f"{entry.manifest}: a digest is not hexadecimal") from None
    if found == entry.content_digest:
        return []
    return [
        MismatchError(
            "digest of the whole guest is not the entry's",
            expected=entry.content_digest,
            found=found,
        )
    ]
