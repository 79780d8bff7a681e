"""Is this image whole, and is it what was saved?

Structure and bounds first, as for every reader; then every byte outside the page areas, and every
window of every block, against the digests of the manifest. All damage is found, not only the
first, and each piece is named by block and file offset.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uringmig.errors import MismatchError, StorageError
from uringmig.image import digest, manifest
from uringmig.image.parse import stream_digest
from uringmig.iobatch import IoPlan
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, ReadOptions
from uringmig.pages import bitmap
from uringmig.plan import Window
from uringmig.progress import ProgressCallback
from uringmig.reader import MappedRamReader, plan_reads, zero_clear_pages
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.choice import EngineChoice
from uringmig.storage.folder import beside
from uringmig.storage.mainfile import open_for_reading
from uringmig.units import div_ceil

_WINDOW_PAGES = WINDOW_BYTES // PAGE_SIZE


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
        StorageError: a read failed.
        HostError: io_uring is required and cannot be had.
    """
    started = time.monotonic()
    with MappedRamReader(
        path, offset=offset, options=options, progress=progress, engine=engine
    ) as reader:
        sidecar = Path(beside(path, manifest.SUFFIX))
        expected = _load_manifest(sidecar)
        notes = list(reader.notes)
        mismatches: list[MismatchError] = []
        if expected is None:
            notes.append(f"no {sidecar.name}: structure checked and pages read, nothing compared")
        else:
            mismatches += compare_shape(reader, expected)
        # With blocks of another shape the digests are of something else altogether.
        digests = None
        if expected is not None and not mismatches:
            mismatches += compare_stream(reader, expected)
            digests = [block.digests for block in expected.blocks]
        checked, found = _read_windows(reader, digests, options)
        mismatches += sorted(found, key=lambda item: item.offset or 0)
    return VerifyReport(
        path=os.fspath(path),
        manifest_path=None if expected is None else str(sidecar),
        checked_bytes=checked,
        mismatches=tuple(mismatches),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


class VerifyWork:
    """One channel's side of a verification: windows are read into buffers of its own."""

    def __init__(
        self,
        reader: MappedRamReader,
        digests: list[list[str]] | None,
        options: ReadOptions,
        found: list[MismatchError],
    ) -> None:
        # As many windows as requests in flight can fill, and one that is being digested.
        self.windows_max = div_ceil(options.depth * options.block_size, WINDOW_BYTES) + 1
        self._reader = reader
        self._digests = digests
        self._options = options
        self._found = found
        self._free = [aligned_buffer(WINDOW_BYTES) for _ in range(self.windows_max)]
        self._used: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def plan(self, window: Window) -> IoPlan:
        """Plan the reads of the window's set pages into a free buffer."""
        buffer = self._free.pop()
        self._used[window.block_index, window.first_page] = buffer
        block = self._reader.image.blocks[window.block_index]
        return plan_reads(
            self._bits(window),
            address=buffer.ctypes.data,
            file_offset=block.pages_offset + window.start_bytes,
            options=self._options,
        )

    def submitted(self, window: Window) -> None:
        """Nothing can be done beside the device: what is read is not there yet."""

    def finished(self, window: Window) -> None:
        """Compare the window's digest."""
        buffer = self._used.pop((window.block_index, window.first_page))
        if self._digests is not None:
            memory = buffer[: window.length_bytes]
            zero_clear_pages(memory, self._bits(window))
            row = window.first_page // _WINDOW_PAGES
            self._compare(window, digest.window_digest(memory).hex(), row)
        self._free.append(buffer)

    def _compare(self, window: Window, found: str, row: int) -> None:
        """Note a difference; appending is safe from several threads."""
        assert self._digests is not None
        expected = self._digests[window.block_index][row]
        if found != expected:
            block = self._reader.image.blocks[window.block_index]
            self._found.append(
                _window_mismatch(block.idstr, block.pages_offset, row, expected, found)
            )

    def _bits(self, window: Window) -> NDArray[np.bool_]:
        """The window's bits."""
        idstr = self._reader.image.blocks[window.block_index].idstr
        return bitmap.unpack(
            self._reader.bitmap(idstr),
            first_page=window.first_page,
            page_count=window.page_count,
        )


def _read_windows(
    reader: MappedRamReader, digests: list[list[str]] | None, options: ReadOptions
) -> tuple[int, list[MismatchError]]:
    """Read every window with a set bit; windows without one are zero and cost no reading."""
    found: list[MismatchError] = []
    windows: list[Window] = []
    checked = 0
    for number, block in enumerate(reader.image.blocks):
        rows = _rows_with_bits(reader.bitmap(block.idstr))
        windows += [
            Window(
                number,
                row * _WINDOW_PAGES,
                min(_WINDOW_PAGES, block.page_count - row * _WINDOW_PAGES),
            )
            for row in rows.tolist()
        ]
        if digests is not None:
            found += _compare_zero_windows(
                block.idstr, block.pages_offset, block.used_length, digests[number], rows
            )
            checked += block.used_length
    if digests is None:
        checked = sum(info.pages_set for info in reader.blocks) * PAGE_SIZE
    shared = reader.channel_file(bounce_for=0)
    for _ in reader.run(
        "verify", windows, shared, lambda _: VerifyWork(reader, digests, options, found)
    ):
        pass
    return checked, found


def _rows_with_bits(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers of the windows in which any bit is set."""
    starts = np.arange(0, len(packed), _WINDOW_PAGES // 8)
    return np.flatnonzero(np.bitwise_or.reduceat(packed, starts))


def _compare_zero_windows(
    idstr: str, pages_offset: int, used_length: int, digests: list[str], rows: NDArray[np.int64]
) -> list[MismatchError]:
    """Check that windows without a set bit were zero when saved."""
    with_bits = set(rows.tolist())
    found = []
    for row, expected in enumerate(digests):
        if row in with_bits:
            continue
        length = min(WINDOW_BYTES, used_length - row * WINDOW_BYTES)
        zero = digest.zero_digest(length).hex()
        if expected != zero:
            found.append(_window_mismatch(idstr, pages_offset, row, expected, zero))
    return found


def differing_chunk(row: int) -> str:
    """Say that a window differs, so that it can be found."""
    return f"contents differ in chunk {row} (guest bytes from {row * WINDOW_BYTES:#x})"


def _window_mismatch(
    idstr: str, pages_offset: int, row: int, expected: str, found: str
) -> MismatchError:
    """Name one window that differs."""
    return MismatchError(
        differing_chunk(row),
        block=idstr,
        offset=pages_offset + row * WINDOW_BYTES,
        expected=expected,
        found=found,
    )


def _load_manifest(path: Path) -> manifest.Manifest | None:
    """Read the sidecar, if there is one and it is a file of a sane size."""
    try:
        file = open_for_reading(os.fspath(path))
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    with closing(file):
        size = file.size
        if size > manifest.BYTES_MAX:
            raise StorageError(f"larger than {manifest.BYTES_MAX} bytes", path=path)
        return manifest.decode(file.read_at(0, size))


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
