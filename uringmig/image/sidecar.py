"""The manifest beside an image: found, read, and taken for the image's own only if it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from uringmig.errors import BytesError, StorageError
from uringmig.format.layout import BlockLayout
from uringmig.image import manifest
from uringmig.image.guestfacts import GuestFacts
from uringmig.image.parse import stream_digest
from uringmig.storage.folder import beside
from uringmig.storage.mainfile import MainFile, open_for_reading


def sidecar_path(image: str | os.PathLike[str]) -> Path:
    """Where an image's manifest is."""
    return Path(beside(image, manifest.SUFFIX))


def load_sidecar(path: Path) -> bytes | None:
    """Read a manifest's file; None is: there is none.

    Raises:
        StorageError: it cannot be read, or is too large to be a manifest.
    """
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
        return file.read_at(0, size)


def guest_of_image(
    path: str | os.PathLike[str], main: MainFile, *, base: int, blocks: Sequence[BlockLayout]
) -> tuple[GuestFacts | None, tuple[str, ...]]:
    """What an image's manifest says of the machine, if it is this very image's manifest.

    A manifest that cannot be used stands in nobody's way here: who must have it reads it himself.

    Args:
        path: the image.
        main: its file.
        base: where the image begins in it.
        blocks: where everything lies.

    Returns:
        The facts, None if there are none, and a note where there may be some that cannot be used.
    """
    sidecar = sidecar_path(path)
    try:
        text = load_sidecar(sidecar)
        if text is None:
            return None, ()
        said = manifest.decode(text)
        if not said.guest:
            return None, ()
        fits = said.stream_digest == stream_digest(main, base=base, blocks=blocks)
        main.drop_cache()
    except (BytesError, StorageError) as error:
        return None, (f"{sidecar}: not used: {error}",)
    return (said.guest, ()) if fits else (None, (_other_image(sidecar),))


def guest_of_cold(
    path: str | os.PathLike[str], index_digest: str
) -> tuple[GuestFacts | None, tuple[str, ...]]:
    """As `guest_of_image`, of a cold image.

    Args:
        path: the image.
        index_digest: of its index, hex.
    """
    sidecar = sidecar_path(path)
    try:
        text = load_sidecar(sidecar)
        if text is None:
            return None, ()
        said = manifest.decode_cold(text)
    except (BytesError, StorageError) as error:
        return None, (f"{sidecar}: not used: {error}",)
    if not said.guest:
        return None, ()
    return (
        (said.guest, ()) if said.index_digest == index_digest else (None, (_other_image(sidecar),))
    )


def _other_image(sidecar: Path) -> str:
    return f"{sidecar}: not used: it is another image's manifest"
