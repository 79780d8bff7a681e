"""Contents as one plain stream, each window compared with its digest before a byte of it goes.

The stream's end, without which no loader starts a guest, comes after the last window. So whoever
takes the pieces has either a stream that is what was saved, or one that is cut and an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator

import numpy as np
from numpy.typing import NDArray

from uringmig.contents.comparing import Digests, compare_window
from uringmig.contents.source import Contents, WindowRead, all_rows
from uringmig.errors import MismatchError
from uringmig.format.plainstream import PlainComposer
from uringmig.options import PAGE_SIZE, WINDOW_BYTES
from uringmig.pages.zero import nonzero_pages


def plain_pieces(
    contents: Contents,
    *,
    digests: Digests | None = None,
    fresh: Collection[str] = (),
    before_end: Callable[[], None] = lambda: None,
) -> Generator[memoryview, None, None]:
    """Compose a plain stream; a piece is good until the next one is asked for.

    Args:
        contents: what to send.
        digests: what the windows should be; None compares nothing.
        fresh: idstrs of blocks whose memory the loader is known to have as zeros: pages of zeros
            are left out of them.
        before_end: called before the piece without which no loader starts a guest; what it raises
            keeps that piece back.

    Raises:
        MismatchError: a window is not what its digest says; names block, row and guest bytes.
        FormatError: the source breaks a rule.
        StorageError: it cannot be read.
    """
    if digests is not None:
        _check_shape(contents, digests)
    composer = PlainComposer(
        contents.configuration,
        [(block.idstr, block.used_length) for block in contents.blocks],
        section_id=contents.section_id,
        device_state=contents.device_state(),
    )
    yield memoryview(composer.setup())
    for read in contents.windows(all_rows(contents.blocks)):
        if digests is not None:
            mismatch = compare_window(
                read,
                digests[read.block_index][read.row],
                block=contents.blocks[read.block_index].idstr,
                path=contents.path,
            )
            if mismatch is not None:
                raise mismatch
        yield from composer.records(
            read.block_index,
            read.memory,
            present_pages(read),
            first_page=read.row * (WINDOW_BYTES // PAGE_SIZE),
            zeros=contents.blocks[read.block_index].idstr not in fresh,
        )
    trailer = memoryview(composer.trailer())
    before_end()
    yield trailer


def present_pages(read: WindowRead) -> NDArray[np.bool_]:
    """Which pages of a window hold anything but zeros, one bool each."""
    if read.data is None:
        return nonzero_pages(read.memory)
    present = np.zeros(len(read.memory) // PAGE_SIZE, np.bool_)
    for start, length in zip(read.data.start.tolist(), read.data.length.tolist(), strict=True):
        first = start // PAGE_SIZE
        present[first : first + length // PAGE_SIZE] = nonzero_pages(
            read.memory[start : start + length]
        )
    return present


def _check_shape(contents: Contents, digests: Digests) -> None:
    """Refuse digests of blocks of another shape."""
    expected = [block.row_count for block in contents.blocks]
    found = [len(rows) for rows in digests]
    if found != expected:
        raise MismatchError(
            f"{contents.path}: digests are of other blocks", expected=expected, found=found
        )
