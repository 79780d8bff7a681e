"""The only defaults of the package; validated once, on construction, and printable."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal, TypeVar, get_args

from uringmig.errors import StateError
from uringmig.units import GiB, KiB, MiB, div_ceil, is_aligned

EngineName = Literal["auto", "io_uring", "pwrite"]
DirectMode = Literal["required", "preferred", "off"]
Kind = TypeVar("Kind", bound="TransferOptions")

#: Target page size of x86 guests; QEMU's TARGET_PAGE_SIZE, the unit of bitmaps and slots.
PAGE_SIZE: Final = 4 * KiB
#: Memory is digested, and goes through the buffers of archives, in windows of this size: small
#: enough to stay in the last-level cache.
WINDOW_BYTES: Final = 4 * MiB
#: A channel of a save or a load takes several windows at a time, since it holds no buffer for them:
#: Python costs some 0.2 ms each time, a fifth of a save's processor time with one window.
SPAN_BYTES: Final = 4 * WINDOW_BYTES
#: Same limit as QEMU's multifd-channels (migration/options.c, 1..255).
CHANNELS_MAX: Final = 255
#: io_uring's own limit on entries is 32768 (IORING_MAX_ENTRIES, io_uring/io_uring.c).
DEPTH_MAX: Final = 4096
#: Compression of a cold image: zstd's own default, and its largest.
COLD_LEVEL: Final = 3
COLD_LEVEL_MAX: Final = 22
#: More than this in flight makes no disk faster.
_HELD_BYTES_MAX: Final = GiB
#: Threads that compress.
COLD_WORKERS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """How bytes move between memory and a file; the base of `WriteOptions` and `ReadOptions`.

    Attributes:
        channels: multifd channels: threads, each with an engine of its own.
        depth: requests one channel keeps in flight.
        block_size: largest request in bytes, a multiple of the page size.
        engine: ``io_uring``, ``pwrite``, or ``auto`` (io_uring where it can be had).
        direct: O_DIRECT ``required``, ``preferred`` or ``off``.
        bridge: a gap of unwanted pages shorter than this many bytes does not split a request; never
            more than ``block_size``, to which a larger one is cut, so that no caller has to know.
        rate: limit in bytes per second over all channels; 0 is none.
    """

    channels: int = 2
    depth: int = 8
    block_size: int = MiB
    engine: EngineName = "auto"
    direct: DirectMode = "preferred"
    bridge: int = 16 * KiB
    rate: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range, and fit the bridge to the block.

        Raises:
            StateError: names the option, the value and what is allowed.
        """
        _in_range("channels", self.channels, 1, CHANNELS_MAX)
        _in_range("depth", self.depth, 1, DEPTH_MAX)
        _in_range("block_size", self.block_size, PAGE_SIZE, WINDOW_BYTES)
        _in_range("bridge", self.bridge, 0, WINDOW_BYTES)
        object.__setattr__(self, "bridge", min(self.bridge, self.block_size))  # it is frozen
        _in_range("rate", self.rate, 0, 1 << 62)
        if not is_aligned(self.block_size, PAGE_SIZE):
            raise StateError(f"block_size {self.block_size} is not a multiple of {PAGE_SIZE}")
        if self.engine not in get_args(EngineName):
            raise StateError(f"engine {self.engine!r} is none of {', '.join(get_args(EngineName))}")
        if self.direct not in get_args(DirectMode):
            raise StateError(f"direct {self.direct!r} is none of {', '.join(get_args(DirectMode))}")

    @property
    def windows_held(self) -> int:
        """Windows that a channel has buffers for, where pages go through buffers.

        As many as requests in flight can fill, and one that is being looked at; but over all
        channels no more than any disk needs, so that no settings ask for more memory than there is.
        """
        most = _HELD_BYTES_MAX // (self.channels * WINDOW_BYTES)
        return min(div_ceil(self.depth * self.block_size, WINDOW_BYTES) + 1, max(2, most))

    def like(self, kind: type[Kind]) -> Kind:
        """The same settings for the other direction; what only ``kind`` has is its default."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(TransferOptions)})


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions(TransferOptions):
    """How an image is written.

    Attributes:
        dense_up_to: blocks of at most this many bytes (ROMs, ACPI tables) are written whole, every
            bit set: QEMU's loader never zeroes, so start-up content of the destination would
            survive under a clear bit.
        manifest: write ``NAME.manifest.json`` with settings, timings and digests beside the image.
    """

    dense_up_to: int = 8 * MiB
    manifest: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range, as the base class does."""
        TransferOptions.__post_init__(self)
        _in_range("dense_up_to", self.dense_up_to, 0, 1 << 62)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions(TransferOptions):
    """How an image is read; nothing beyond `TransferOptions`."""


def _in_range(name: str, value: int, least: int, most: int) -> None:
    """Refuse a number outside ``least..most``, by the option's name."""
    if not least <= value <= most:
        raise StateError(f"{name} must be from {least} to {most}, not {value}")
