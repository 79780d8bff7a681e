"""An entry's image, opened with what its manifest says of it, whatever its tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from uringmig import digest, manifest
from uringmig.archive.coldread import open_cold
from uringmig.archive.entry import Entry, read_manifest
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import Contents, Row, WindowRead
from uringmig.errors import FormatError, MismatchError
from uringmig.options import WINDOW_BYTES, ReadOptions
from uringmig.verify import compare_shape, compare_stream, window_mismatch


@dataclass(frozen=True, slots=True)
class OpenedEntry:
    """An entry whose structure and manifest fit each other; a context manager.

    Attributes:
        contents: its memory; windows are not compared with the manifest by themselves.
        stream_damage: what differs outside the windows.
        expected: hex digest of a window, by the manifest.
        offset: where a window's bytes are in the image's file.
    """

    contents: Contents
    stream_damage: tuple[MismatchError, ...]
    expected: Callable[[Row], str]
    offset: Callable[[Row], int]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.contents.close()

    def mismatch(self, window: WindowRead) -> MismatchError | None:
        """Compare a window with the manifest's word; None is: it is what was saved."""
        found = _digest_of(window)
        row = (window.block_index, window.row)
        expected = self.expected(row)
        if found == expected:
            return None
        idstr = self.contents.blocks[window.block_index].idstr
        start = self.offset(row) - window.row * WINDOW_BYTES
        return window_mismatch(idstr, start, window.row, expected, found)

    def checked_windows(self, rows: Sequence[Row]) -> Iterator[WindowRead]:
        """As the contents' `windows`, each compared before it is handed out.

        Raises:
            MismatchError: one is not what was saved; or as for the contents.
        """
        for window in self.contents.windows(rows):
            mismatch = self.mismatch(window)
            if mismatch is not None:
                raise mismatch
            yield window


def open_entry(
    entry: Entry,
    *,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> OpenedEntry:
    """Open an entry's image and compare everything but its pages with its manifest.

    Raises:
        FormatError: image or manifest breaks a rule of its format.
        MismatchError: blocks are other than the manifest's, so that nothing can be compared.
        StorageError: one of the files cannot be read.
        HostError: io_uring is required and cannot be had.
    """
    if entry.tier == "cold":
        return _open_cold(entry, options)
    return _open_hot(entry, options)


def _open_hot(entry: Entry, options: ReadOptions) -> OpenedEntry:
    """A mapped-ram image; its digests are in the manifest."""
    said = manifest.decode(read_manifest(Path(entry.manifest)))
    with ExitStack() as stack:
        contents = stack.enter_context(MappedRamContents(entry.image, options=options))
        reader = contents.reader
        shape = compare_shape(reader, said)
        if shape:
            raise shape[0]
        digests = [block.digests for block in said.blocks]
        damage = compare_stream(reader, said) or _compare_content(entry, contents, digests)
        reader.main.drop_cache()
        areas = [block.pages_offset for block in reader.image.blocks]
        stack.pop_all()
    return OpenedEntry(
        contents,
        tuple(damage),
        expected=lambda row: digests[row[0]][row[1]],
        offset=lambda row: areas[row[0]] + row[1] * WINDOW_BYTES,
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
        expected=lambda row: digests[row[0]][row[1]],
        offset=lambda row: row[1] * WINDOW_BYTES,
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


def _digest_of(window: WindowRead) -> str:
    """Digest of a window's memory, of which only what may be nonzero is read."""
    if window.data is None:
        return digest.window_digest(window.memory).hex()
    if not len(window.data.start):
        return digest.zero_digest(len(window.memory)).hex()
    start, length = window.data.start.tolist(), window.data.length.tolist()
    return digest.sparse_digest(window.memory, start, length).hex()
