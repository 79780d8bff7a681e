"""What both tiers have in common: the copied blocks, the entry's words, the result."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uringmig.archive.copyjournal import Chunk
from uringmig.archive.record import CopyFigures
from uringmig.contents.source import Contents, ContentsBlock, Row, all_rows, window_of
from uringmig.format.layout import bitmap_length
from uringmig.image import digest
from uringmig.image.manifest import ArchiveFields, ArchiveManifest, Tier
from uringmig.image.pieces import ROW_PIECES, no_digests, piece_table
from uringmig.options import PAGE_SIZE
from uringmig.pages import bitmap


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryLabel:
    """What an entry of an archive is called.

    Attributes:
        name: of the entry.
        vm: whose memory it is.
        host: where it was made.
        source_kind: what it was read from; None is the contents' own kind.
        source_path: where that was; None is the contents' own path.
    """

    name: str
    vm: str
    host: str
    source_kind: str | None = None
    source_path: str | None = None


class TierResult(CopyFigures, frozen=True, kw_only=True):
    """A published image of an archive, see `CopyFigures` too.

    Attributes:
        written_bytes: moved to the file by this copy.
        notes: what the operator should know, one line each.
        warnings: what went amiss although the image is whole.
    """

    path: str
    manifest_path: str
    tier: Tier
    written_bytes: int
    manifest: ArchiveManifest
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class CopiedBlock:
    """One block of a copy; windows of different channels never share a byte of it.

    Attributes:
        bitmap: packed, as on disk; a bit is set for a page that is stored.
        digests: uint8, (rows, 16), of each window's memory.
        pieces: as `pieces.no_digests`, of each piece of it, where the tier keeps those.
    """

    block: ContentsBlock
    bitmap: NDArray[np.uint8] = field(init=False)
    digests: NDArray[np.uint8] = field(init=False)
    pieces: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self.bitmap = np.zeros(bitmap_length(self.block.used_length), np.uint8)
        self.digests = np.zeros((self.block.row_count, digest.DIGEST_BYTES), np.uint8)
        self.pieces = no_digests(self.block.used_length)


class CopiedGuest:
    """Bits and digests of everything that is copied, by row.

    Args:
        contents: what is copied.
    """

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.blocks = [CopiedBlock(block) for block in contents.blocks]
        self.resumed_bytes = 0

    @property
    def memory_bytes(self) -> int:
        """Guest memory."""
        return sum(block.used_length for block in self.contents.blocks)

    @property
    def stored_bytes(self) -> int:
        """Guest memory in pages that are set."""
        return PAGE_SIZE * sum(bitmap.set_bit_count(block.bitmap) for block in self.blocks)

    def note(self, row: Row, bits: NDArray[np.bool_]) -> None:
        """Store the bits of a window's pages."""
        window = window_of(self.contents.blocks, row)
        bitmap.store(self.blocks[row[0]].bitmap, first_page=window.first_page, bits=bits)

    def note_digest(self, row: Row, value: bytes) -> None:
        """Store the digest of a window's memory."""
        self.blocks[row[0]].digests[row[1]] = np.frombuffer(value, np.uint8)

    def note_pieces(self, row: Row, found: NDArray[np.uint8]) -> None:
        """Store the digests of the pieces of a window's memory."""
        first = row[1] * ROW_PIECES
        self.blocks[row[0]].pieces[first : first + len(found)] = found

    def pieces(self, row: Row) -> NDArray[np.uint8]:
        """The digests of the pieces of a window's memory, as noted."""
        first = row[1] * ROW_PIECES
        return self.blocks[row[0]].pieces[first : first + ROW_PIECES]

    def piece_tables(self) -> list[bytes] | None:
        """Of every block; None if the copy went on from a journal, which does not have them."""
        if self.resumed_bytes:
            return None
        return [
            piece_table(copied.pieces, copied.bitmap, copied.block.used_length)
            for copied in self.blocks
        ]

    def bits(self, row: Row) -> NDArray[np.bool_]:
        """The bits of a window's pages."""
        window = window_of(self.contents.blocks, row)
        return bitmap.unpack(
            self.blocks[row[0]].bitmap, first_page=window.first_page, page_count=window.page_count
        )

    def digest(self, row: Row) -> bytes:
        """The digest of a window's memory."""
        value: bytes = self.blocks[row[0]].digests[row[1]].tobytes()
        return value

    def take_over(self, chunks: Sequence[Chunk]) -> list[Row]:
        """Store what a journal says; returns the rows that are still to be copied.

        Raises:
            StateError: a chunk is of a row that the contents do not have.
        """
        durable: set[Row] = set()
        for chunk in chunks:
            row = (chunk.block_index, chunk.row)
            window = window_of(self.contents.blocks, row)
            packed = np.frombuffer(chunk.bits, np.uint8)
            self.note(row, bitmap.unpack(packed, first_page=0, page_count=window.page_count))
            self.note_digest(row, chunk.digest)
            if row not in durable:
                durable.add(row)
                self.resumed_bytes += window.length_bytes
        return [row for row in all_rows(self.contents.blocks) if row not in durable]

    def content_digest(self, device_state: bytes) -> str:
        """Digest of the whole guest."""
        return digest.content_digest(
            machine=self.contents.configuration.machine,
            blocks=[
                (
                    copied.block.idstr,
                    copied.block.used_length,
                    [row.tobytes() for row in copied.digests],
                )
                for copied in self.blocks
            ],
            device_state=device_state,
        )


def describe_entry(
    guest: CopiedGuest, out: Path, tier: Tier, label: EntryLabel | None, content_digest: str
) -> ArchiveFields:
    """Say what makes the image an entry of an archive."""
    if label is None:
        name = out.stem
        label = EntryLabel(name=name, vm=name, host=socket.gethostname())
    contents = guest.contents
    return ArchiveFields(
        name=label.name,
        vm=label.vm,
        tier=tier,
        host=label.host,
        source_kind=label.source_kind or contents.kind,
        source_path=label.source_path or contents.path,
        source_fingerprint=contents.fingerprint(),
        content_digest=content_digest,
        memory_bytes=guest.memory_bytes,
        stored_bytes=guest.stored_bytes,
    )
