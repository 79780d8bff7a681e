"""The end of an image, one for whoever wrote its pages: bits, stream, sync, name.

A set bit promises bytes that are there, so bitmaps are written only after everything has drained;
a name promises a whole and durable file, so only what is `Durable` can be given one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec
import numpy as np
from numpy.typing import NDArray

from uringmig.format.compose import compose_setup
from uringmig.format.headers import Configuration
from uringmig.format.layout import ImageLayout
from uringmig.image import manifest
from uringmig.image.digest import PIECE_BYTES
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.manifest import (
    WRITER,
    ArchiveFields,
    ArchiveManifest,
    Manifest,
    ManifestBlock,
    Settings,
)
from uringmig.image.parse import parse_image, stream_digest
from uringmig.image.pieces import TABLES_BYTES_MAX
from uringmig.options import PAGE_SIZE
from uringmig.pages import bitmap
from uringmig.progress import Phase
from uringmig.storage.mainfile import MainFile

#: Told of each step before it begins; what it raises ends the draft, and nothing is published.
Tell = Callable[[Phase], object]
#: Gives a file its name, and the sidecar, if there is one, beside it; returns the sidecar's path.
Publish = Callable[[bytes | None], str | None]


class Durable(msgspec.Struct, frozen=True):
    """A file whose every byte is on the disk; only its name is missing.

    Attributes:
        sync_seconds: how long that took.
    """

    sync_seconds: float
    _publish: Publish

    def publish(self, described: ArchiveManifest | None) -> str | None:
        """Give the file its name, with the manifest beside it; returns the manifest's path.

        Raises:
            StorageError: the name does not exist, or still holds its former content.
        """
        return self._publish(None if described is None else manifest.encode(described))


def make_durable(main: MainFile, tell: Tell, publish: Publish) -> Durable:
    """Sync all that was written to a file, and let go of its page cache.

    Args:
        main: any descriptor of the file; nothing is written to it any more.
        tell: told of ``sync``, then of ``publish``.
        publish: how the file gets its name.

    Raises:
        StorageError: nothing may be said to be safe after this.
    """
    tell("sync")
    began = time.monotonic()
    main.sync()
    seconds = time.monotonic() - began
    main.drop_cache()
    tell("publish")
    return Durable(seconds, publish)


class FinishedImage(msgspec.Struct, frozen=True):
    """An image without a name.

    Attributes:
        durable: its file.
        pages_set: pages with a set bit, of each block.
        stream_digest: of every byte outside the page areas, hex.
    """

    durable: Durable
    pages_set: tuple[int, ...]
    stream_digest: str


class ImageDraft:
    """An image on its way: first the file's length, then pages by others, then all that is left.

    Args:
        main: the buffered descriptor; the pages go another way.
        configuration: machine type and such.
        layout: where everything lies in the file.
        section_id: id of the ram section.
    """

    def __init__(
        self, main: MainFile, configuration: Configuration, layout: ImageLayout, *, section_id: int
    ) -> None:
        self._main = main
        self._configuration = configuration
        self._layout = layout
        self._section_id = section_id

    def begin(self, *, keep: bool = False) -> None:
        """Give the file its full length: a page write then lands inside and never extends it.

        Args:
            keep: what the file holds stays. Otherwise all of it from the image's beginning on is
                dropped, and every slot reads as zeros.

        Raises:
            StorageError: for example EFBIG.
        """
        base = self._layout.base
        if not keep and self._main.size > base:
            self._main.set_size(base)
        self._main.set_size(self._layout.trailer_offset)

    def finish(
        self, bitmaps: Sequence[NDArray[np.uint8]], tail: bytes, *, tell: Tell, publish: Publish
    ) -> FinishedImage:
        """Write all that is not pages, and make the file durable; every page write has completed.

        Args:
            bitmaps: of each block, packed, as long as the layout says; one bit of an empty guest's
                is set here.
            tail: all that follows ram's START section.
            tell: told of ``bitmaps``, ``devices``, ``sync`` and ``publish``.
            publish: how the file gets its name.

        Raises:
            FormatError: the tail does not make a readable stream.
            StorageError: nothing may be said to be safe after this.
        """
        main, layout = self._main, self._layout
        tell("bitmaps")
        self._settle_empty(bitmaps)
        for place, packed in zip(layout.blocks, bitmaps, strict=True):
            main.write_at(place.bitmap_offset, packed.data)
        tell("devices")
        end = 0
        for offset, data in compose_setup(self._configuration, layout, section_id=self._section_id):
            main.write_at(offset, data)
            end = offset + len(data)
        main.write_at(end, tail)
        # What we could not read back ourselves, nobody is told to be safe.
        parse_image(main, base=layout.base)
        digest = stream_digest(main, base=layout.base, blocks=layout.blocks)
        return FinishedImage(
            durable=make_durable(main, tell, publish),
            pages_set=tuple(bitmap.set_bit_count(packed) for packed in bitmaps),
            stream_digest=digest,
        )

    def describe(
        self,
        finished: FinishedImage,
        digests: Sequence[NDArray[np.uint8]],
        *,
        settings: Settings,
        seconds: dict[str, float],
        notes: Sequence[str],
        pieces: Sequence[bytes] | None = None,
        archive: ArchiveFields | None = None,
        guest: GuestFacts | None = None,
    ) -> Manifest:
        """Describe the durable image, for the manifest beside it.

        Args:
            finished: what `finish` gave.
            digests: of every window of each block: uint8, (windows, 16).
            settings: what really ran.
            seconds: where the time went; giving the file its name is still to come.
            notes: what the operator should know, one line each.
            pieces: of every block, see `pieces.piece_table`; None are not known.
            archive: if the image is an entry of an archive.
            guest: if the memory is that of a QEMU's guest.
        """
        if pieces is not None and sum(map(len, pieces)) > TABLES_BYTES_MAX:
            notes = [*notes, "the manifest has no digests of pieces: there would be too many"]
            pieces = None
        return Manifest(
            version=manifest.version_of(guest, pieces=pieces is not None),
            piece_bytes=msgspec.UNSET if pieces is None else PIECE_BYTES,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            writer=WRITER,
            machine=self._configuration.machine,
            base=self._layout.base,
            file_size=self._main.size,
            stream_digest=finished.stream_digest,
            blocks=[
                ManifestBlock(
                    idstr=place.idstr,
                    used_length=place.used_length,
                    bitmap_offset=place.bitmap_offset,
                    pages_offset=place.pages_offset,
                    pages_set=pages_set,
                    digests=[row.tobytes().hex() for row in rows],
                    pieces=msgspec.UNSET if pieces is None else pieces[number],
                )
                for number, (place, pages_set, rows) in enumerate(
                    zip(self._layout.blocks, finished.pages_set, digests, strict=True)
                )
            ],
            settings=settings,
            seconds=seconds,
            notes=list(notes),
            archive=msgspec.UNSET if archive is None else archive,
            guest=msgspec.UNSET if guest is None else guest,
        )

    def _settle_empty(self, bitmaps: Sequence[NDArray[np.uint8]]) -> None:
        """Let an empty guest's image hold one page.

        Readers take an image without a single bit for QEMU's background-snapshot fault. The page
        is written: in its slot may lie what an earlier round put there, or an earlier image.
        """
        if not any(packed.any() for packed in bitmaps):
            self._main.write_at(self._layout.blocks[0].pages_offset, bytes(PAGE_SIZE))
            bitmaps[0][0] = 1
