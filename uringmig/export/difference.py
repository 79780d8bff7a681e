"""How two images differ: blocks, ranges of pages, sections of devices.

Digests first: a window of which both images have the same digest is not read. Of all others both
are read, some rows of one and then the same rows of the other, so memory is bounded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.source import ContentsBlock, WindowRead, row_length
from uringmig.contents.streaming import present_pages
from uringmig.errors import naming
from uringmig.export.sources import Source, open_source
from uringmig.format.events import FullSection
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, ReadOptions
from uringmig.pages.runs import runs_from_bits
from uringmig.progress import ProgressCallback, Teller
from uringmig.storage.buffers import aligned_buffer

#: ``only-a``: the first image has something there, the second nothing but zeros, or no such place.
Kind = Literal["differs", "only-a", "only-b"]
KINDS: Final[tuple[Kind, ...]] = ("differs", "only-a", "only-b")
#: Rows of one image that are held while the other's are read; a buffer of 4 MiB each.
_ROWS_HELD: Final = 6
#: Ranges kept of a block; there may be millions, and nobody reads those.
RANGES_MAX: Final = 10_000
#: Equal parts of a block of which it is counted how many pages differ.
DENSITY_PARTS: Final = 1024
_WINDOW_PAGES: Final = WINDOW_BYTES // PAGE_SIZE
_FOOTER_BYTES: Final = 5

#: A block and its number in its image; None: the image has none of that name.
_Numbered = tuple[int, ContentsBlock] | None


@dataclass(frozen=True, slots=True)
class PageRange:
    """Adjacent pages of a block that differ in the same way; in bytes from the block's start."""

    start: int
    length: int
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDiff:
    """One ramblock of two images; sizes in bytes.

    Attributes:
        length_a: used length; None: the first image has no such block.
        length_b: likewise.
        differing_bytes: in pages that hold something in both, and not the same.
        only_a_bytes: in pages that hold something in the first only.
        only_b_bytes: likewise.
        ranges: the first `RANGES_MAX` of them, ascending.
        ranges_left_out: further ones.
        density: pages that differ in any way, in each of `DENSITY_PARTS` equal parts of the longer
            block, or in each page if it has fewer; empty if there is none.
    """

    idstr: str
    length_a: int | None
    length_b: int | None
    differing_bytes: int
    only_a_bytes: int
    only_b_bytes: int
    ranges: tuple[PageRange, ...]
    ranges_left_out: int
    density: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether it is the same block with the same memory."""
        pages = self.differing_bytes or self.only_a_bytes or self.only_b_bytes
        return self.length_a == self.length_b and not pages


@dataclass(frozen=True, slots=True)
class SectionDiff:
    """A section of device state that is not the same in both images."""

    idstr: str
    instance_id: int
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """What `diff_images` found.

    Attributes:
        equal: no difference in machine, blocks, memory or devices.
        blocks: every block, those of the first image first.
        sections: those that differ.
        read_bytes: guest memory of which bytes were compared, zeros included.
        digest_bytes: guest memory whose digests are the same in both, which was not read.
        notes: what the operator should know, one line each.
    """

    a: str
    b: str
    equal: bool
    machine_a: str
    machine_b: str
    blocks: tuple[BlockDiff, ...]
    sections: tuple[SectionDiff, ...]
    read_bytes: int
    digest_bytes: int
    notes: tuple[str, ...]
    seconds: float


def diff_images(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
) -> DiffReport:
    """Compare two images: memory by block and range, devices by section.

    Args:
        a: any file that `convert_image` takes, or ``ARCHIVE#NAME``.
        b: likewise, of the same kind or another.
        options: how both are read.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        StateError: no such entry.
        FormatError: an image or its manifest breaks a rule of its format.
        MismatchError: an image is not what its manifest says, or was changed meanwhile.
        StorageError: a read failed.
        HostError: io_uring is required and cannot be had.
    """
    started = time.monotonic()
    with (
        open_source(a, options=options) as first,
        open_source(b, options=options) as second,
    ):
        total = sum(block.used_length for block in first.contents.blocks)
        comparison = _Comparison(first, second, Teller(progress, total_bytes=total))
        blocks = tuple(comparison.blocks())
        sections = tuple(_compare_sections(first, second))
        machines = [one.contents.configuration.machine for one in (first, second)]
        return DiffReport(
            a=os.fspath(a),
            b=os.fspath(b),
            equal=machines[0] == machines[1]
            and not sections
            and all(block.equal for block in blocks),
            machine_a=machines[0],
            machine_b=machines[1],
            blocks=blocks,
            sections=sections,
            read_bytes=comparison.read_bytes,
            digest_bytes=comparison.digest_bytes,
            notes=tuple(dict.fromkeys((*first.notes, *second.notes))),
            seconds=time.monotonic() - started,
        )


@dataclass(slots=True)
class _Found:
    """What differs in one block of so many pages so far; rows come in their order."""

    page_count: int
    ranges: list[PageRange] = field(default_factory=list)
    left_out: int = 0
    bytes_of: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    _density: NDArray[np.int64] = field(init=False)
    _open: PageRange | None = None

    def __post_init__(self) -> None:
        self._density = np.zeros(min(DENSITY_PARTS, self.page_count), np.int64)

    @property
    def density(self) -> tuple[int, ...]:
        """See `BlockDiff`."""
        return tuple(self._density.tolist()) if self._density.any() else ()

    def add(self, row: int, kinds: dict[Kind, NDArray[np.bool_]]) -> None:
        """Note the pages of one row that differ, one bool a page for each kind."""
        found = []
        for kind, bits in kinds.items():
            runs = runs_from_bits(bits)
            self.bytes_of[kind] += PAGE_SIZE * int(runs.page_count.sum())
            parts = len(self._density)
            pages = np.flatnonzero(bits) + row * _WINDOW_PAGES
            self._density += np.bincount(pages * parts // self.page_count, minlength=parts)
            found += [
                PageRange(row * WINDOW_BYTES + first * PAGE_SIZE, count * PAGE_SIZE, kind)
                for first, count in zip(
                    runs.first_page.tolist(), runs.page_count.tolist(), strict=True
                )
            ]
        for one in sorted(found, key=lambda item: item.start):
            last = self._open
            if last is not None and (last.start + last.length, last.kind) == (one.start, one.kind):
                self._open = PageRange(last.start, last.length + one.length, one.kind)
            else:
                self.close()
                self._open = one

    def close(self) -> None:
        """The range that was open ends."""
        if self._open is None:
            return
        if len(self.ranges) < RANGES_MAX:
            self.ranges.append(self._open)
        else:
            self.left_out += 1
        self._open = None


@dataclass(slots=True)
class _Held:
    """One image's memory of a row: what may be looked at is where a page is present."""

    present: NDArray[np.bool_]
    memory: NDArray[np.uint8]


class _Comparison:
    """Goes over the blocks of two images."""

    def __init__(self, first: Source, second: Source, teller: Teller) -> None:
        self.read_bytes = 0
        self.digest_bytes = 0
        self._first = first
        self._second = second
        self._teller = teller
        self._buffers = [aligned_buffer(WINDOW_BYTES) for _ in range(_ROWS_HELD)]

    def blocks(self) -> Iterator[BlockDiff]:
        """Compare each block of either image."""
        ones, others = (_by_name(one.contents.blocks) for one in (self._first, self._second))
        for idstr in dict.fromkeys((*ones, *others)):
            yield self._block(idstr, ones.get(idstr), others.get(idstr))

    def _block(self, idstr: str, one: _Numbered, other: _Numbered) -> BlockDiff:
        """Compare one block's memory."""
        lengths = [None if block is None else block[1].used_length for block in (one, other)]
        found = _Found(max(length or 0 for length in lengths) // PAGE_SIZE)
        rows = max(0 if block is None else block[1].row_count for block in (one, other))
        unsettled = (row for row in range(rows) if not self._settled(one, other, row))
        while some := list(islice(unsettled, _ROWS_HELD)):
            self._rows(one, other, some, found)
            self._teller.tell("read", now=False)
        found.close()
        self._teller.tell("read")
        return BlockDiff(
            idstr=idstr,
            length_a=lengths[0],
            length_b=lengths[1],
            differing_bytes=found.bytes_of["differs"],
            only_a_bytes=found.bytes_of["only-a"],
            only_b_bytes=found.bytes_of["only-b"],
            ranges=tuple(found.ranges),
            ranges_left_out=found.left_out,
            density=found.density,
        )

    def _settled(self, one: _Numbered, other: _Numbered, row: int) -> bool:
        """Whether both digests of a row are known, of as many bytes, and the same."""
        length = 0 if one is None else max(0, row_length(one[1], row))
        said = [self._first.digests, self._second.digests]
        if one is None or other is None or length != row_length(other[1], row):
            return False
        if said[0] is None or said[1] is None or said[0][one[0]][row] != said[1][other[0]][row]:
            return False
        self.digest_bytes += length
        self._count(length)
        return True

    def _rows(self, one: _Numbered, other: _Numbered, rows: Sequence[int], found: _Found) -> None:
        """Compare some rows byte by byte."""
        held: dict[int, _Held] = {}
        buffers = iter(self._buffers)
        for read in _windows(self._first, one, rows):
            present = present_pages(read)
            buffer = next(buffers)[: len(read.memory)] if present.any() else read.memory[:0]
            pages = read.memory.reshape(-1, PAGE_SIZE)
            if len(buffer):
                buffer.reshape(-1, PAGE_SIZE)[present] = pages[present]
            held[read.row] = _Held(present, buffer)
        kinds = {}
        for read in _windows(self._second, other, rows):
            kinds[read.row] = _compare(held.get(read.row), _Held(present_pages(read), read.memory))
        for row in rows:
            if row not in kinds:
                kinds[row] = _compare(held.get(row), None)
            found.add(row, kinds[row])
            lengths = [0 if block is None else row_length(block[1], row) for block in (one, other)]
            self.read_bytes += max(*lengths)
            self._count(max(0, lengths[0]))

    def _count(self, length: int) -> None:
        """Count memory of the first image as gone through."""
        counters = self._teller.counters
        counters.scanned_bytes += length
        counters.finished_bytes += length


def _by_name(blocks: Sequence[ContentsBlock]) -> dict[str, tuple[int, ContentsBlock]]:
    """Each block with its number."""
    return {block.idstr: (number, block) for number, block in enumerate(blocks)}


def _windows(source: Source, block: _Numbered, rows: Sequence[int]) -> Iterator[WindowRead]:
    """Those of the rows that the block has."""
    if block is None:
        return
    number, here = block
    with naming(source.path):
        yield from source.contents.windows([(number, row) for row in rows if row < here.row_count])


def _compare(one: _Held | None, other: _Held | None) -> dict[Kind, NDArray[np.bool_]]:
    """Which pages of a row differ, and how; a row that is not there has none present."""
    count = max(0 if held is None else len(held.present) for held in (one, other))
    present = [np.zeros(count, np.bool_), np.zeros(count, np.bool_)]
    for bits, held in zip(present, (one, other), strict=True):
        if held is not None:
            bits[: len(held.present)] = held.present
    both = present[0] & present[1]
    differs = np.zeros(count, np.bool_)
    index = np.flatnonzero(both)
    if len(index):
        assert one is not None, "present in both"
        assert other is not None, "present in both"
        pages = [held.memory.view(np.uint64).reshape(-1, PAGE_SIZE // 8) for held in (one, other)]
        differs[index] = (pages[0][index] != pages[1][index]).any(axis=1)
    return {
        "differs": differs,
        "only-a": present[0] & ~present[1],
        "only-b": present[1] & ~present[0],
    }


def _compare_sections(first: Source, second: Source) -> Iterator[SectionDiff]:
    """Compare device sections by name and instance, whatever number they have in their stream."""
    sides = []
    for source in (first, second):
        with naming(source.path):
            sides.append(
                {(one.header.idstr, one.header.instance_id): one for one in source.devices()[0]}
            )
    for key in dict.fromkeys((*sides[0], *sides[1])):
        one, other = sides[0].get(key), sides[1].get(key)
        if one is None or other is None:
            yield SectionDiff(*key, "only-b" if one is None else "only-a")
        elif (one.header.version_id, _body(one)) != (other.header.version_id, _body(other)):
            yield SectionDiff(*key, "differs")


def _body(section: FullSection) -> bytes:
    """A section without header and footer, which name its number."""
    return section.raw[len(section.header.pack()) : -_FOOTER_BYTES]
