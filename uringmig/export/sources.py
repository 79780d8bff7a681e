"""What is converted or compared, opened: a file of any kind, or ``ARCHIVE#NAME``, an entry.

Where digests of the memory are known, every window is compared with its own before it is given
out: of what has rotted no copy is made that looks whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from uringmig.archive.coldformat import MAGIC as COLD_MAGIC
from uringmig.archive.coldread import open_cold
from uringmig.archive.directory import Archive
from uringmig.archive.opening import CheckedContents, OpenedEntry, open_entry
from uringmig.contents.comparing import Digests
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.opening import open_contents
from uringmig.contents.source import Contents
from uringmig.errors import MismatchError, StateError, naming
from uringmig.format.events import FullSection
from uringmig.format.plainstream import read_devices
from uringmig.image import manifest
from uringmig.image.sidecar import load_sidecar, sidecar_path
from uringmig.options import WINDOW_BYTES, ReadOptions
from uringmig.storage.mainfile import open_for_reading
from uringmig.verify import compare_shape, compare_stream, piece_tables

#: Between the folder of an archive and the name of an entry.
_ENTRY_MARK = "#"


@dataclass(frozen=True, slots=True)
class Source:
    """Opened contents, and what is known of them.

    Attributes:
        path: of the image's file.
        contents: compared on the way where there are digests.
        digests: of every row of every block, by manifest or index; None: nothing says.
        archive: the folder of the archive that it is an entry of.
    """

    path: str
    contents: Contents
    digests: Digests | None
    archive: Path | None
    _inner: Contents

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator should know, complete when all has been read."""
        return self._inner.notes

    def devices(self) -> tuple[Sequence[FullSection], bytes]:
        """The sections of device state, in their order, and the text that describes them."""
        contents = self.contents
        blocks = [(block.idstr, block.used_length) for block in contents.blocks]
        return read_devices(
            contents.configuration,
            blocks,
            section_id=contents.section_id,
            device_state=contents.device_state(),
        )


@contextmanager
def open_source(
    name: str | os.PathLike[str],
    *,
    offset: int | None = None,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> Iterator[Source]:
    """Open a file, or an entry of an archive.

    Args:
        name: a mapped-ram image, a plain stream, a libvirt image, a cold image; or
            ``ARCHIVE#NAME``, unless there is a file of that very name.
        offset: where QEMU's image begins in the file; None is at its start, or where libvirt's
            header says.
        options: how to read.

    Raises:
        StateError: no such entry, or an offset for what has none.
        FormatError: the image or its manifest breaks a rule of its format.
        MismatchError: the image is not what its manifest says.
        StorageError: it cannot be read.
        HostError: io_uring is required and cannot be had.
    """
    text = os.fspath(name)
    folder, mark, entry_name = text.rpartition(_ENTRY_MARK)
    with ExitStack() as stack:
        if mark and folder and os.path.isdir(folder) and not os.path.lexists(text):
            if offset is not None:
                raise StateError("an entry of an archive has no offset")
            archive = stack.enter_context(Archive.open(folder, write=False))
            entry = archive.find(entry_name)
            with naming(entry.image):
                opened = stack.enter_context(open_entry(entry, options=options))
                source = _checked(opened, entry.image, archive.path)
        else:
            with naming(text):
                source = _open_file(text, offset, options, stack)
        yield source


def _open_file(path: str, offset: int | None, options: ReadOptions, stack: ExitStack) -> Source:
    """Open a file of any kind; it is closed with ``stack``."""
    if offset is None and _is_cold(path):
        cold = stack.enter_context(open_cold(path, options=options))
        digests = [
            [cold.memory_digest((number, row)).hex() for row in range(block.row_count)]
            for number, block in enumerate(cold.blocks)
        ]
        return Source(path, cold, digests, None, cold)
    contents = stack.enter_context(open_contents(path, offset=offset, options=options))
    opened = _with_manifest(contents) if isinstance(contents, MappedRamContents) else None
    if opened is None:
        return Source(path, contents, None, None, contents)
    return _checked(opened, path, None)


def _checked(opened: OpenedEntry, path: str, archive: Path | None) -> Source:
    """A source that gives only what its manifest says."""
    return Source(path, CheckedContents(opened), opened.digests, archive, opened.contents)


def _is_cold(path: str) -> bool:
    """Whether a file begins as a cold image does."""
    with closing(open_for_reading(path)) as main:
        return main.read_at(0, len(COLD_MAGIC)) == COLD_MAGIC


def _with_manifest(contents: MappedRamContents) -> OpenedEntry | None:
    """An image with the manifest beside it; None: there is none.

    Raises:
        FormatError: the manifest breaks a rule.
        MismatchError: the manifest and what is not memory do not fit each other.
        StorageError: it cannot be read.
    """
    reader = contents.reader
    text = load_sidecar(sidecar_path(contents.path))
    if text is None:
        return None
    said = manifest.decode(text)
    for mismatch in compare_shape(reader, said) or compare_stream(reader, said):
        raise mismatch
    reader.main.drop_cache()
    damage: list[MismatchError] = []
    tables = piece_tables(reader, said, damage)
    areas = [block.pages_offset for block in reader.image.blocks]
    return OpenedEntry(
        contents,
        tuple(damage),
        [block.digests for block in said.blocks],
        offset_of=lambda row: areas[row[0]] + row[1] * WINDOW_BYTES,
        tables=tables,
    )
