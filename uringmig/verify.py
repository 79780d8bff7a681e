"""Is this image whole, and is it what was saved?

Structure and bounds first, as for every reader; then every byte outside the page areas, and every
window of every block, against the digests of the manifest. All damage is found, not only the
first, and each piece is named by block and file offset.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import msgspec

from uringmig.contents.comparing import Digests, compare_window
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.source import WindowRead, each_row, row_length
from uringmig.errors import MismatchError
from uringmig.image import manifest
from uringmig.image.parse import stream_digest
from uringmig.image.pieces import PieceTable
from uringmig.image.sidecar import load_sidecar, sidecar_path
from uringmig.options import WINDOW_BYTES, ReadOptions
from uringmig.progress import ChannelCounters, ProgressCallback, Teller
from uringmig.reader import MappedRamReader
from uringmig.storage.enginechoice import EngineChoice
from uringmig.units import div_ceil

#: Windows asked for in one go, 16 GiB: what is known of each takes memory too.
_ROWS_AT_ONCE: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        checked_bytes: guest memory compared with a digest; without a manifest, page slots read.
        mismatches: every difference found; empty if all is well.
        notes: what the operator should know, one line each; a missing manifest is one.
        seconds: elapsed.
    """

    path: str
    manifest_path: str | None
    checked_bytes: int
    mismatches: tuple[MismatchError, ...]
    notes: tuple[str, ...]
    seconds: float


def verify(
    path: str | os.PathLike[str],
    *,
    offset: int = 0,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
    engine: EngineChoice | None = None,
) -> VerifyReport:
    """Check an image's structure, then its bytes against its manifest if there is one.

    Without a manifest every page that is set is still read, so that a bad sector is found.

    Args:
        path: the image; its manifest is ``path.manifest.json``.
        offset: where the image begins in the file, QEMU's ``offset=``.
        options: how to read.
        progress: called with a `Snapshot` about ten times a second.
        engine: an engine of the caller's instead of ``options.engine``.

    Raises:
        FormatError: the image or the manifest breaks a rule; nothing further is looked at.
        MismatchError: the file was changed meanwhile.
        StorageError: a read failed.
        HostError: io_uring is required and cannot be had.
    """
    started = time.monotonic()
    with MappedRamContents(
        path, offset=offset, options=options, compared=True, engine=engine
    ) as contents:
        reader = contents.reader
        sidecar = sidecar_path(path)
        text = load_sidecar(sidecar)
        expected = None if text is None else manifest.decode(text)
        notes = list(contents.notes)
        mismatches: list[MismatchError] = []
        if expected is None:
            notes.append(f"no {sidecar.name}: structure checked and pages read, nothing compared")
        else:
            mismatches += compare_shape(reader, expected)
        # With blocks of another shape the digests are of something else altogether.
        digests = None
        tables: list[PieceTable | None] = [None] * len(reader.blocks)
        if expected is not None and not mismatches:
            mismatches += compare_stream(reader, expected)
            digests = [block.digests for block in expected.blocks]
            # With other bits the table would be of other pieces; windows are compared all the same.
            if not mismatches:
                tables = piece_tables(reader, expected, mismatches)
        found = _read_windows(contents, digests, tables, progress)
        mismatches += sorted(found, key=lambda item: item.offset or 0)
        checked = contents.stored_bytes()
        if digests is not None:
            checked = sum(block.used_length for block in contents.blocks)
    return VerifyReport(
        path=os.fspath(path),
        manifest_path=None if expected is None else str(sidecar),
        checked_bytes=checked,
        mismatches=tuple(mismatches),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def piece_tables(
    reader: MappedRamReader, expected: manifest.Manifest, mismatches: list[MismatchError]
) -> list[PieceTable | None]:
    """The manifest's digests of pieces, of each block; None where it has none that can be used.

    Args:
        reader: of an image with the manifest's shape and bits.
        expected: its manifest.
        mismatches: what is wrong with the digests is added here.
    """
    tables: list[PieceTable | None] = []
    for said in expected.blocks:
        table = None
        if said.pieces is not msgspec.UNSET:
            packed = reader.bitmap(said.idstr)
            try:
                table = PieceTable(said.pieces, packed, said.used_length, idstr=said.idstr)
            except MismatchError as error:
                mismatches.append(error)
        tables.append(table)
    return tables


def _read_windows(
    contents: MappedRamContents,
    digests: Digests | None,
    tables: Sequence[PieceTable | None],
    progress: ProgressCallback | None,
) -> list[MismatchError]:
    """Read all windows that may differ, and compare them if there are digests."""
    blocks, places = contents.blocks, contents.reader.image.blocks
    # Without digests nothing can be seen in windows without a set bit, which are not read.
    rows = contents.stored_rows() if digests is None else each_row(blocks)
    total = sum(block.used_length for block in blocks)
    teller = Teller(progress, total_bytes=contents.stored_bytes() if digests is None else total)
    found = []
    while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        with closing(contents.windows(some)) as windows:
            for read in windows:
                if digests is not None:
                    mismatch = compare_window(
                        read,
                        digests[read.block_index][read.row],
                        block=blocks[read.block_index].idstr,
                        offset=places[read.block_index].pages_offset + read.row * WINDOW_BYTES,
                        table=tables[read.block_index],
                    )
                    found += [mismatch] if mismatch is not None else []
                length = row_length(blocks[read.block_index], read.row)
                _count(teller.counters, read, length, all_of_it=digests is not None)
                teller.tell("verify", now=False)
    teller.tell("verify")
    return found


def _count(counters: ChannelCounters, read: WindowRead, length: int, *, all_of_it: bool) -> None:
    """Count a window of ``length`` bytes as gone through: all of it, or what of it is stored."""
    stored = length if read.data is None else read.data.total_bytes
    length = length if all_of_it else stored
    counters.scanned_bytes += length
    counters.finished_bytes += length
    counters.zero_bytes += length - stored
    counters.completed_bytes += stored


def compare_shape(reader: MappedRamReader, expected: manifest.Manifest) -> list[MismatchError]:
    """Compare what the manifest says of size, place and pages of everything."""
    image = reader.image
    pairs: list[tuple[str, str | None, object, object]] = [
        ("base of the image", None, expected.base, image.base),
        ("file size", None, expected.file_size, image.file_size),
        ("machine", None, expected.machine, image.configuration.machine),
        (
            "ramblocks",
            None,
            [block.idstr for block in expected.blocks],
            [block.idstr for block in image.blocks],
        ),
    ]
    if pairs[-1][2] == pairs[-1][3]:
        for said, info in zip(expected.blocks, reader.blocks, strict=True):
            layout = info.layout
            pairs += [
                ("used_length", info.idstr, said.used_length, info.used_length),
                ("bitmap_offset", info.idstr, said.bitmap_offset, layout.bitmap_offset),
                ("pages_offset", info.idstr, said.pages_offset, layout.pages_offset),
                ("pages set", info.idstr, said.pages_set, info.pages_set),
                (
                    "number of digests",
                    info.idstr,
                    len(said.digests),
                    div_ceil(info.used_length, WINDOW_BYTES),
                ),
            ]
    return [
        MismatchError(f"{what} is not the manifest's", block=block, expected=one, found=other)
        for what, block, one, other in pairs
        if one != other
    ]


def compare_stream(reader: MappedRamReader, expected: manifest.Manifest) -> list[MismatchError]:
    """Compare headers, bitmaps and device state."""
    found = stream_digest(reader.main, base=reader.image.base, blocks=reader.image.blocks)
    if found == expected.stream_digest:
        return []
    return [
        MismatchError(
            "the main stream (headers, bitmaps or device state) differs",
            expected=expected.stream_digest,
            found=found,
        )
    ]
