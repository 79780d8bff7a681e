"""What a finished save says of itself: its result, and the manifest that goes beside the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from uringmig.manifest import Manifest, ManifestBlock, Settings
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
            ManifestBlock(
                idstr=block.layout.idstr,
                used_length=block.layout.used_length,
                bitmap_offset=block.layout.bitmap_offset,
                pages_offset=block.layout.pages_offset,
                pages_set=count,
                digests=[row.tobytes().hex() for row in block.digests],
            )
            for block, count in zip(blocks, pages_set, strict=True)
        ],
        settings=Settings(
            engine=result.engine,
            direct=result.direct,
            channels=options.channels,
            depth=options.depth,
            block_size=options.block_size,
            bridge=options.bridge,
            rate=options.rate,
        ),
        seconds={
            name: round(getattr(result.time, name), 6)
            for name in ("elapsed", "scan", "digest", "submit", "wait", "sync")
        },
        notes=list(result.notes),
    )
