"""Pages that an earlier image has already: shared by reflink instead of written again.

The earlier image's page areas are cloned into the new file (FICLONERANGE), which costs no data;
then only pages that differ from what now lies in their slots are written, and for these the file
system gives the new file blocks of its own. At the end the slots of pages that are zero by now are
made holes: no dead memory stays in the image, none of it keeps blocks of an image that is pruned,
and where the earlier image has rotted the new one can be read all the same. The image stays a plain
file.

All of it is for less room on the disk. Where it cannot be had the image is written whole, with a
warning: a large backup is better than none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from uringmig import signals
from uringmig.archive.intake import TakenWindow
from uringmig.errors import FormatError, StorageError, UringmigError
from uringmig.format.layout import ImageLayout
from uringmig.image.parse import parse_image
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, DirectMode
from uringmig.pages import bitmap
from uringmig.pages.runs import runs_from_bits
from uringmig.storage.directfile import open_direct
from uringmig.storage.engine import Operation
from uringmig.storage.imagetarget import NamedTarget
from uringmig.storage.mainfile import MainFile, open_for_reading
from uringmig.storage.nameless import nameless_file
from uringmig.transfer.plan import bridge_gaps
from uringmig.units import MiB, align_down, div_ceil, is_aligned

#: linux/fs.h: FICLONERANGE and struct file_clone_range.
_FICLONERANGE: Final = 0x4020940D
_CLONE_RANGE: Final = struct.Struct("=qQQQ")
#: linux/fs.h: FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, struct fsxattr, FS_XFLAG_COWEXTSIZE.
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_FSXATTR: Final = struct.Struct("=LLLLL8x")
_XFLAG_COWEXTSIZE: Final = 0x10000
#: linux/fiemap.h: FS_IOC_FIEMAP, struct fiemap, struct fiemap_extent.
_FIEMAP: Final = 0xC020660B
_FIEMAP_HEADER: Final = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT: Final = struct.Struct("=QQQQQLLLL")
_FIEMAP_FLAG_SYNC: Final = 0x1
_EXTENT_LAST: Final = 0x1
_EXTENT_SHARED: Final = 0x2000
_EXTENTS_AT_ONCE: Final = 512
#: What file systems say that cannot, or cannot for these two files, and what to do about it.
_ELSEWHERE: Final = ("this file system has no reflink", "archive to xfs or btrfs, or without dedup")
_NO_REFLINK: Final = {
    errno.EOPNOTSUPP: _ELSEWHERE,
    errno.ENOTTY: _ELSEWHERE,
    errno.EINVAL: (
        "not between these two files; only one of them is set to nodatacow (chattr +C), perhaps",
        "the next image can share with this one",
    ),
    errno.EXDEV: ("the earlier image is on another file system", "archive to that, or do without"),
}
_CLONED_AT_ONCE: Final = 1 << 30
_WORDS_PER_PAGE: Final = PAGE_SIZE // 8
#: Slots so far apart are read one by one: what is between them takes longer than another request.
_GAP_PAGES: Final = 16
#: Slots looked through in one go for what is to be freed, between two looks at signals.
_FREED_AT_ONCE: Final = 256 * MiB


class Earlier:
    """An earlier image to share pages with. Nothing that is wrong with it ever ends a copy.

    Args:
        path: of the image; None: there is none, and nothing is shared.

    Attributes:
        identity: names this very version of it; None: there is none to share with.
        warnings: why pages are not shared that were to be, one line each.
    """

    def __init__(self, path: Path | None) -> None:
        self.warnings: list[str] = []
        self.identity: str | None = None
        self._path = path
        if path is not None:
            try:
                self.identity = _identity(path)
            except StorageError as error:  # pruned meanwhile, perhaps
                self._give_up(error)

    def share(
        self, target: NamedTarget, layout: ImageLayout, mode: DirectMode, *, anew: bool
    ) -> SlotReader | None:
        """Share its pages with a new, sized file, and open what then lies in the slots there.

        Args:
            target: the file.
            layout: of the new image.
            mode: how to read the slots.
            anew: the file is empty; otherwise its pages have been shared before.

        Returns:
            What tells which pages need not be written; None: all of them are to be.

        Raises:
            StorageError: the file cannot be used.
        """
        if self._path is None or self.identity is None:
            return None
        try:
            if anew:
                clone_pages(self._path, layout, target.main)
            return SlotReader(target.partial_path, layout, mode, self.warnings)
        except UringmigError as error:
            self._give_up(error)
        if anew:
            # Some areas may be cloned already; what nobody writes is to be a hole all the same.
            target.main.set_size(min(place.pages_offset for place in layout.blocks))
            target.main.set_size(layout.trailer_offset)
        return None

    def free_unset(
        self,
        main: MainFile,
        layout: ImageLayout,
        bitmaps: Sequence[NDArray[np.uint8]],
        tell: Callable[[], object],
    ) -> None:
        """Make holes of the slots that may have been cloned and whose pages are not set.

        Args:
            main: the new file, all of whose pages are written.
            layout: of it.
            bitmaps: of its blocks, packed.
            tell: called now and then; what it raises ends this.
        """
        if self.identity is None:
            return
        trouble = None
        try:
            for place, packed in zip(layout.blocks, bitmaps, strict=True):
                area, end = place.pages_offset, place.pages_offset + place.used_length
                for start in range(area, end, _FREED_AT_ONCE):
                    tell()
                    stop = min(start + _FREED_AT_ONCE, end)
                    for offset, length in _unset_data(main, area, (start, stop), packed):
                        trouble = main.punch_hole(offset, length) or trouble
        except StorageError as error:
            trouble = error.errno
        if trouble:
            self.warnings.append(
                "blocks of the earlier image stay allocated under pages that are zero: "
                f"{os.strerror(trouble)}"
            )

    def shared_bytes(self, main: MainFile) -> int:
        """Bytes of the new file that another one has too; 0 if the file system does not tell."""
        try:
            return shared_bytes(main)
        except StorageError as error:
            self.warnings.append(f"it is not known how much is shared: {error}")
            return 0

    def _give_up(self, error: UringmigError) -> None:
        """Say why nothing is shared."""
        self.warnings.append(f"the image is written whole, sharing nothing: {error}")


def _unset_data(
    main: MainFile, area: int, within: tuple[int, int], packed: NDArray[np.uint8]
) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of slots that are no holes and whose bits are clear.

    Args:
        main: the file.
        area: offset of the first slot of the block.
        within: offsets of the slots that are looked at, from and to.
        packed: bits of the block's pages.

    Raises:
        StorageError: the kernel refused to tell.
    """
    for start, length in main.data_pieces(*within):
        # Blocks of the file system may be smaller than a page.
        first, end = (start - area) // PAGE_SIZE, div_ceil(start + length - area, PAGE_SIZE)
        runs = runs_from_bits(~bitmap.unpack(packed, first_page=first, page_count=end - first))
        for page, count in zip(runs.first_page.tolist(), runs.page_count.tolist(), strict=True):
            yield area + (first + page) * PAGE_SIZE, count * PAGE_SIZE


def sharing_trouble(folder: Path, previous: Path | None) -> str | None:
    """Say why a new image in a folder could share nothing, found by trying; None: nothing is known.

    Args:
        folder: where images go; a file without a name is made there for a moment.
        previous: the earlier image; None: there is none yet, but there will be.
    """
    with ExitStack() as stack:
        try:
            main = stack.enter_context(nameless_file(str(folder)))
        except StorageError:
            return None  # whether anything can be written there is not the question
        try:
            length = _block_bytes(main)
            if previous is None:
                source = stack.enter_context(nameless_file(str(folder)))
                source.write_at(0, bytes(length))
            else:
                source = open_for_reading(str(previous))
                stack.callback(source.close)
            main.set_size(length)
            _clone(source, 0, length, main, 0)
        except StorageError as error:
            return str(error)
    return None


def _identity(path: Path) -> str:
    """Name this very version of an image.

    Raises:
        StorageError: it cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise StorageError("cannot look at", errno=error.errno, path=path) from None
    return f"{status.st_dev:x}.{status.st_ino:x}.{status.st_size:x}.{status.st_mtime_ns:x}"


def clone_pages(previous: Path, layout: ImageLayout, main: MainFile) -> None:
    """Clone the page areas of blocks that both images have into the new, sized file.

    Raises:
        FormatError: the earlier file is no whole mapped-ram image.
        StorageError: the file system cannot, with the reason.
    """
    source = open_for_reading(str(previous))
    try:
        areas = {block.idstr: block for block in parse_image(source).blocks}
        block_bytes = _block_bytes(main)
        _break_single_blocks(main, block_bytes)
        for place in layout.blocks:
            area = areas.get(place.idstr)
            if area is None or not is_aligned(area.pages_offset, block_bytes):
                continue
            length = align_down(min(area.used_length, place.used_length), block_bytes)
            # In pieces: one of many extents takes the kernel seconds.
            for at in range(0, length, _CLONED_AT_ONCE):
                signals.look()
                piece = min(_CLONED_AT_ONCE, length - at)
                _clone(source, area.pages_offset + at, piece, main, place.pages_offset + at)
        source.drop_cache()
    finally:
        source.close()


class SlotReader:
    """Reads what lies in the slots of the image being written; used by several channels.

    Args:
        path: the image.
        layout: of it.
        mode: O_DIRECT or not.
        warnings: a line is added if what lies there cannot be read.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(
        self, path: str, layout: ImageLayout, mode: DirectMode, warnings: list[str]
    ) -> None:
        self._layout = layout
        self._warnings = warnings
        self._failed = False
        self._file = open_direct(path, Operation.READ, mode)
        self._path = path

    def differing(
        self, held: TakenWindow, bits: NDArray[np.bool_], buffer: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Say which pages of a window are not yet what lies in their slots.

        Args:
            held: the window, in memory that may be read where ``bits`` are set.
            bits: the pages that matter.
            buffer: for the slots, a window long.
        """
        block_index, row = held.row
        slots = buffer[: len(held.memory)]
        offset = self._layout.blocks[block_index].pages_offset + row * WINDOW_BYTES
        try:
            # Pages far apart are not read for what lies between them.
            near = bridge_gaps(bits, bridgeable=np.ones_like(bits), gap_pages=_GAP_PAGES)
            runs = runs_from_bits(near)
            for first, count in zip(
                (runs.first_page * PAGE_SIZE).tolist(),
                (runs.page_count * PAGE_SIZE).tolist(),
                strict=True,
            ):
                self._read(slots[first : first + count], offset + first)
        except (StorageError, FormatError) as error:
            # The earlier image has rotted there: the new one gets blocks of its own.
            if not self._failed:
                self._failed = True
                self._warnings.append(
                    f"written anew where the earlier image cannot be read: {error}"
                )
            return bits.copy()
        differing = np.zeros_like(bits)
        pages = np.flatnonzero(bits)
        ours = held.memory.view(np.uint64).reshape(-1, _WORDS_PER_PAGE)
        theirs = slots.view(np.uint64).reshape(-1, _WORDS_PER_PAGE)
        if len(pages) == len(bits):
            differing[:] = np.not_equal(ours, theirs).any(axis=1)
        else:
            differing[pages] = np.not_equal(ours[pages], theirs[pages]).any(axis=1)
        return differing

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._file.fd)

    def _read(self, slots: NDArray[np.uint8], offset: int) -> None:
        """Fill ``slots``; the image has its full length, so all of it is there."""
        done = 0
        while done < len(slots):
            try:
                count = os.preadv(self._file.fd, [slots[done:].data], offset + done)
            except OSError as error:
                raise StorageError(
                    "read failed", errno=error.errno, path=self._path, offset=offset + done
                ) from None
            if count == 0:
                raise FormatError("the file ends inside a page area", offset=offset + done)
            done += align_down(count, PAGE_SIZE) or count


def shared_bytes(main: MainFile) -> int:
    """Count the bytes of a file's blocks that another file has too, as the file system tells.

    Raises:
        StorageError: it does not tell.
    """
    start, shared = 0, 0
    while True:
        signals.look()
        request = bytearray(_FIEMAP_HEADER.size + _EXTENTS_AT_ONCE * _FIEMAP_EXTENT.size)
        _FIEMAP_HEADER.pack_into(
            request, 0, start, (1 << 63) - 1 - start, _FIEMAP_FLAG_SYNC, 0, _EXTENTS_AT_ONCE, 0
        )
        try:
            fcntl.ioctl(main.fd, _FIEMAP, request)
        except OSError as error:
            raise StorageError(
                "cannot ask for the file's extents", errno=error.errno, path=main.path
            ) from None
        count = _FIEMAP_HEADER.unpack_from(request)[3]
        for number in range(count):
            logical, _, length, _, _, flags, *_ = _FIEMAP_EXTENT.unpack_from(
                request, _FIEMAP_HEADER.size + number * _FIEMAP_EXTENT.size
            )
            start = logical + length
            if flags & _EXTENT_SHARED:
                shared += length
            if flags & _EXTENT_LAST:
                return shared
        if count == 0:
            return shared


def _block_bytes(main: MainFile) -> int:
    """What is cloned comes in blocks of this size; some file systems do not tell."""
    return max(os.fstatvfs(main.fd).f_bsize, PAGE_SIZE)


def _break_single_blocks(main: MainFile, block_bytes: int) -> None:
    """Ask xfs to give one block for one written block of a shared extent.

    Its default is 128 KiB at a time: 5 % of the pages changed at random took 80 % of the image.
    Other file systems have no such setting, and need none.
    """
    attributes = bytearray(_FSXATTR.size)
    with contextlib.suppress(OSError):
        fcntl.ioctl(main.fd, _FSGETXATTR, attributes)
        flags, extent, count, project, _ = _FSXATTR.unpack(attributes)
        flags |= _XFLAG_COWEXTSIZE
        fcntl.ioctl(main.fd, _FSSETXATTR, _FSXATTR.pack(flags, extent, count, project, block_bytes))


def _clone(source: MainFile, offset: int, length: int, main: MainFile, to: int) -> None:
    """Share one range."""
    try:
        fcntl.ioctl(main.fd, _FICLONERANGE, _CLONE_RANGE.pack(source.fd, offset, length, to))
    except OSError as error:
        reason, cure = _NO_REFLINK.get(error.errno or 0, (f"at offset {to:#x}", None))
        raise StorageError(
            f"cannot share blocks with {source.path}: {reason}",
            errno=error.errno,
            path=main.path,
            cure=cure,
        ) from None
