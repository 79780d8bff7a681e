"""The page records of a plain stream, taken many at a time, and an index of where each page lies.

QEMU: migration/ram.c, save_normal_page(), save_zero_page(). Rules: a `PageIndex` takes only records
that are whole and right beyond doubt; at anything else it stops, and `RamSection` judges that one.
So there is one place that refuses, and it gives the offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig.format import constants as c
from uringmig.format.cursor import BE64
from uringmig.options import PAGE_SIZE, WINDOW_BYTES

#: Instead of an offset, for a page without bytes in the stream: no record names it, or the last one
#: that does is a ZERO record. 0 can stand for that, since no page lies at the start of a stream.
ABSENT: Final = 0
_WORD: Final = BE64.size
_PAGE_RECORD: Final = _WORD + PAGE_SIZE
_ZERO_RECORD: Final = _WORD + 1
_ROW_PAGES: Final = WINDOW_BYTES // PAGE_SIZE
_FLAGS: Final = PAGE_SIZE - 1
_NAMELESS: Final = {
    c.RAM_SAVE_FLAG_PAGE | c.RAM_SAVE_FLAG_CONTINUE: _PAGE_RECORD,
    c.RAM_SAVE_FLAG_ZERO | c.RAM_SAVE_FLAG_CONTINUE: _ZERO_RECORD,
}
_KINDS: Final = (c.RAM_SAVE_FLAG_PAGE, c.RAM_SAVE_FLAG_ZERO)
#: How far a run of equal records is looked for at first, and the factor from look to look.
_LOOK_FIRST: Final = 8
_LOOK_GROWTH: Final = 8
#: Records of a run that are taken faster together than one by one.
_RUN_LEAST: Final = 6


class PageIndex:
    """Where the last bytes of each page lie in the stream; 8 bytes a page, in rows that have pages.

    A row is a window of a block. A row takes its 8 KiB when the first PAGE record of it comes, so
    an index is never larger than two times the stream, whatever the stream claims.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], NDArray[np.int64]] = {}

    def row(self, idstr: str, row: int) -> NDArray[np.int64] | None:
        """Absolute offset of each page's bytes, or `ABSENT`; int64, one for each page of a window.

        None is a row without a single page.
        """
        return self._rows.get((idstr, row))

    def page_count(self) -> int:
        """Pages that are present."""
        return sum(int(np.count_nonzero(row)) for row in self._rows.values())

    def take(
        self,
        data: bytearray,
        *,
        position: int,
        offset: int,
        used_lengths: Mapping[str, int],
        last_idstr: str | None,
    ) -> tuple[int, str | None]:
        """Take the whole records that begin at ``data[position]``.

        Args:
            data: bytes of the stream; not kept.
            position: where in ``data`` a record begins.
            offset: absolute offset of that record.
            used_lengths: bytes of each block.
            last_idstr: block of the record before, or None.

        Returns:
            The position of the first record not taken, and the block of the last one that was.
        """
        origin = offset - position
        while position + _ZERO_RECORD <= len(data):
            word = int.from_bytes(data[position : position + _WORD], "big")
            flags = word & _FLAGS
            kind, page_offset = flags & ~c.RAM_SAVE_FLAG_CONTINUE, word - flags
            if kind not in _KINDS:
                break
            at = position + _WORD
            idstr = last_idstr
            if not flags & c.RAM_SAVE_FLAG_CONTINUE:
                end = at + 1 + data[at]
                idstr = data[at + 1 : end].decode("latin-1")
                at = end
            end = at + (PAGE_SIZE if kind == c.RAM_SAVE_FLAG_PAGE else 1)
            if idstr is None or end > len(data):
                break
            if page_offset + PAGE_SIZE > used_lengths.get(idstr, 0):
                break
            if kind == c.RAM_SAVE_FLAG_PAGE:
                self._put_one(idstr, page_offset, origin + at)
            elif data[at]:
                break
            else:
                self._put_one(idstr, page_offset, ABSENT)
            last_idstr, position = idstr, end
            if _run_ahead(data, position):
                position = self._take_run(data, position, origin, idstr, used_lengths[idstr])
        return position, last_idstr

    def _take_run(
        self, data: bytearray, position: int, origin: int, idstr: str, used_length: int
    ) -> int:
        """Take records without a name, of equal kind and so of equal length."""
        look = _LOOK_FIRST
        while position + _WORD <= len(data):
            flags = _flags_at(data, position)
            stride = _NAMELESS.get(flags)
            if stride is None:
                break
            most = min(look, (len(data) - position) // stride)
            if not most:
                break
            words = np.ndarray((most,), ">u8", data, position, (stride,))
            good = (words & np.uint64(_FLAGS)) == flags
            page_offsets = words & np.uint64(~_FLAGS & (1 << 64) - 1)
            good &= page_offsets < used_length
            if stride == _ZERO_RECORD:
                good &= np.ndarray((most,), np.uint8, data, position + _WORD, (stride,)) == 0
            count = most if good.all() else int(np.argmin(good))
            if not count:
                break
            places = np.zeros(count, np.int64)
            if stride == _PAGE_RECORD:
                first = origin + position + _WORD
                places = np.arange(first, first + count * stride, stride, dtype=np.int64)
            self._put(idstr, page_offsets[:count].astype(np.int64), places)
            position += count * stride
            if count < look:
                break
            look *= _LOOK_GROWTH
        return position

    def _put_one(self, idstr: str, page_offset: int, place: int) -> None:
        """Note one page."""
        row, page = divmod(page_offset // PAGE_SIZE, _ROW_PAGES)
        places = self._rows.get((idstr, row))
        if places is None:
            if place == ABSENT:
                return
            places = self._rows[idstr, row] = np.zeros(_ROW_PAGES, np.int64)
        places[page] = place

    def _put(self, idstr: str, page_offsets: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Note pages in their order; all are present, or all absent."""
        rows, pages = np.divmod(page_offsets // PAGE_SIZE, _ROW_PAGES)
        # Pages come mostly in ascending order: few stretches of one row.
        starts = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            key = idstr, int(rows[start])
            row = self._rows.get(key)
            if row is None:
                if places[start] == ABSENT:
                    continue
                row = self._rows[key] = np.zeros(_ROW_PAGES, np.int64)
            # Where a page comes twice in a stretch, numpy keeps the last value.
            row[pages[start:end]] = places[start:end]


def _flags_at(data: bytearray, position: int) -> int:
    """Flags of the word at ``position``."""
    return (data[position + 6] << 8 | data[position + 7]) & _FLAGS


def _run_ahead(data: bytearray, position: int) -> bool:
    """Say whether records without a name and of one kind seem to follow, enough to pay for numpy.

    Two words are looked at; `PageIndex._take_run` looks at all of them.
    """
    if position + _WORD > len(data):
        return False
    flags = _flags_at(data, position)
    stride = _NAMELESS.get(flags)
    if stride is None:
        return False
    later = position + _RUN_LEAST * stride
    return later + _WORD <= len(data) and _flags_at(data, later) == flags
