"""What a finished save says of itself: its result, and the manifest that goes beside the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.format.layout import BlockLayout
from uringmig.image.manifest import Manifest, ManifestBlock, Settings
from uringmig.options import WriteOptions
from uringmig.progress import TimeAccount
from uringmig.scan import SavedBlock

WRITER: Final = "uringmig"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """A published image, and how it came about; sizes in bytes.

    Attributes:
        memory_bytes: guest memory the image holds.
        pages_set: pages with a set bit, over all blocks.
        written_bytes: moved to the page areas, bridged gaps and later rounds included.
        bounced: whether unaligned memory had to be copied for O_DIRECT.
        notes: what the operator should know, such as a fallback; one line each.
    """

    path: str
    manifest_path: str | None
    file_size: int
    memory_bytes: int
    pages_set: int
    zero_bytes: int
    written_bytes: int
    requests: int
    engine: str
    direct: bool
    bounced: bool
    block_size: int
    channels: int
    time: TimeAccount
    notes: tuple[str, ...]


def describe_save(
    result: SaveResult,
    blocks: Sequence[SavedBlock],
    *,
    pages_set: Sequence[int],
    machine: str,
    base: int,
    stream_digest: str,
    options: WriteOptions,
) -> Manifest:
    """Describe an image whose bytes are durable, for the manifest beside it.

    Args:
        result: as far as it is known; giving the file its name is still to come.
        blocks: as they were saved.
        pages_set: pages with a set bit, of each block.
        machine: machine type the image names.
        base: where the image begins in its file.
        stream_digest: of every byte outside the page areas, hex.
        options: as given.
    """
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        writer=WRITER,
        machine=machine,
        base=base,
        file_size=result.file_size,
        stream_digest=stream_digest,
        blocks=[
            describe_block(block.layout, pages_set=count, digests=block.digests)
            for block, count in zip(blocks, pages_set, strict=True)
        ],
        settings=describe_settings(options, engine=result.engine, direct=result.direct),
        seconds=describe_seconds(result.time),
        notes=list(result.notes),
    )


def describe_block(
    layout: BlockLayout, *, pages_set: int, digests: NDArray[np.uint8]
) -> ManifestBlock:
    """Describe one block of a mapped-ram image; ``digests`` is (rows, 16), as of `SavedBlock`."""
    return ManifestBlock(
        idstr=layout.idstr,
        used_length=layout.used_length,
        bitmap_offset=layout.bitmap_offset,
        pages_offset=layout.pages_offset,
        pages_set=pages_set,
        digests=[row.tobytes().hex() for row in digests],
    )


def describe_settings(options: WriteOptions, *, engine: str, direct: bool) -> Settings:
    """Describe how a file was written: ``engine`` and ``direct`` are what really ran."""
    return Settings(
        engine=engine,
        direct=direct,
        channels=options.channels,
        depth=options.depth,
        block_size=options.block_size,
        bridge=options.bridge,
        rate=options.rate,
    )


def describe_seconds(time: TimeAccount) -> dict[str, float]:
    """Pick the seconds that a manifest keeps; giving the file its name is still to come."""
    names = ("elapsed", "scan", "digest", "submit", "wait", "sync")
    return {name: round(getattr(time, name), 6) for name in names}
