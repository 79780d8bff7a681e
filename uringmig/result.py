"""What a finished save says of itself: its result, and what a manifest keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

from uringmig.image.manifest import Settings
from uringmig.options import WriteOptions
from uringmig.progress import TimeAccount


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


def describe_seconds(time: TimeAccount, *, stopped: float = 0.0) -> dict[str, float]:
    """Pick the seconds that a manifest keeps: all but those of naming the file, still to come.

    Args:
        time: of the save.
        stopped: how long a guest stood still for it; if it did, that is kept, too.
    """
    names = ("elapsed", "scan", "digest", "submit", "wait", "sync")
    seconds = {name: round(getattr(time, name), 6) for name in names}
    return seconds | ({"stopped": round(stopped, 6)} if stopped else {})
