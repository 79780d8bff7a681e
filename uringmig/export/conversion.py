"""An image made into another kind of file: for QEMU, or for tools that look into guest memory."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, get_args

from uringmig.archive.hot import write_hot
from uringmig.contents.streamfile import write_stream
from uringmig.errors import StateError, StorageError, naming
from uringmig.export.elfcore import ElfPlace, note
from uringmig.export.guestmap import GuestMap, derived_map, said_map
from uringmig.export.placed import PlacedCopy, pieces_of
from uringmig.export.registers import processor_notes, read_registers
from uringmig.export.sources import Source, open_source
from uringmig.export.vmcoreinfo import VmcoreinfoSearch
from uringmig.image import manifest
from uringmig.image.sidecar import sidecar_path
from uringmig.options import PAGE_SIZE, ReadOptions, WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.storage.enginechoice import EngineChoice, choose_engine
from uringmig.storage.folder import final_name
from uringmig.storage.imagetarget import NamedTarget

#: ``mapped-ram`` and ``stream`` are loaded by QEMU; the others hold memory by physical address.
TargetFormat = Literal["mapped-ram", "stream", "raw", "elf", "lime"]
#: By the suffix of a file's name.
_BY_SUFFIX: Final[dict[str, TargetFormat]] = {
    ".mig": "mapped-ram",
    ".stream": "stream",
    ".raw": "raw",
    ".elf": "elf",
    ".core": "elf",
    ".vmcore": "elf",
    ".lime": "lime",
}
#: LiME: src/lime.h; magic, version, first and last address of the range, reserved.
_LIME: Final = struct.Struct("<IIQQQ")
_LIME_MAGIC: Final = 0x4C694D45
_LIME_VERSION: Final = 1
#: The kernel's is a page, header included.
_VMCOREINFO_ROOM: Final = 2 * PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """A converted file; sizes in bytes.

    Attributes:
        source_kind: what it was made of.
        to: what it is.
        memory_bytes: guest memory of the source.
        written_bytes: moved to the file.
        segments: pieces of memory by physical address; 0 where the format has none.
        derived_map: the addresses are those of the machine type, not QEMU's own word.
        processors: whose registers are in it.
        vmcoreinfo: the guest's VMCOREINFO is in it.
        notes: what the operator should know, one line each.
    """

    source_path: str
    source_kind: str
    path: str
    to: TargetFormat
    memory_bytes: int
    written_bytes: int
    file_bytes: int
    allocated_bytes: int
    segments: int
    derived_map: bool
    processors: int
    vmcoreinfo: bool
    seconds: float
    notes: tuple[str, ...]


def convert_image(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: TargetFormat | None = None,
    offset: int | None = None,
    read: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    write: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
    engine: EngineChoice | None = None,
) -> ConvertResult:
    """Make an image into another kind of file, which appears whole or not at all.

    Args:
        source: a mapped-ram image, a plain stream, a libvirt image, a cold image, or
            ``ARCHIVE#NAME``, an entry of an archive.
        out: the file's final name.
        to: ``mapped-ram`` (with its manifest) or ``stream`` (a plain migration stream), which QEMU
            loads; ``raw`` (memory at its physical address), ``elf`` (a core file) or ``lime``,
            which tools of forensics read. None goes by the suffix of ``out``.
        offset: where QEMU's image begins in the source; None is at its start, or where libvirt's
            header says.
        read: how the source is read.
        write: how the file is written.
        progress: called with a `Snapshot` about ten times a second.
        engine: an engine of the caller's for writing pages; for tests and benches.

    Raises:
        StateError: no such entry, no such format, or a name for the file that cannot be.
        FormatError: the source breaks a rule of its format, or does not say where its memory lies
            and is not of a machine of which that is known.
        MismatchError: the source is not what its manifest says, or was changed meanwhile.
        StorageError: reading or writing failed; nothing is published.
        HostError: io_uring is required and cannot be had.
    """
    chosen = to or format_of(out)
    if chosen not in get_args(TargetFormat):
        raise StateError(f"format {chosen!r} is none of {', '.join(get_args(TargetFormat))}")
    started = time.monotonic()
    path = Path(final_name(out))
    with open_source(source, offset=offset, options=read) as opened:
        _check_place(opened, path)
        with naming(opened.path):
            made = _Conversion(opened, path, chosen, write, progress, engine).run()
        status = path.stat()
        return ConvertResult(
            source_path=opened.path,
            source_kind=opened.contents.kind,
            path=str(path),
            to=chosen,
            memory_bytes=sum(block.used_length for block in opened.contents.blocks),
            written_bytes=made.written_bytes,
            file_bytes=status.st_size,
            allocated_bytes=status.st_blocks * 512,
            segments=made.segments,
            derived_map=made.derived_map,
            processors=made.processors,
            vmcoreinfo=made.vmcoreinfo,
            seconds=time.monotonic() - started,
            notes=tuple(dict.fromkeys((*opened.notes, *made.notes))),
        )


def format_of(out: str | os.PathLike[str]) -> TargetFormat:
    """The format that a file's name asks for.

    Raises:
        StateError: it asks for none.
    """
    found = _BY_SUFFIX.get(Path(out).suffix)
    if found is None:
        raise StateError(
            f"{os.fspath(out)}: its name does not say what it is to be; "
            f"known are {', '.join(_BY_SUFFIX)}, else name the format"
        )
    return found


def _check_place(source: Source, out: Path) -> None:
    """Refuse to write over the source or its manifest, or into its archive."""
    for taken in (source.path, sidecar_path(source.path)):
        if os.path.exists(taken) and os.path.exists(out) and os.path.samefile(taken, out):  # noqa: PTH121
            raise StateError(f"{out} is the image itself, or its manifest; name another file")
    if source.archive is not None and out.parent.resolve() == source.archive.resolve():
        raise StateError(f"{out} would be in the archive itself; name another folder")


@dataclass(frozen=True, slots=True)
class _Made:
    """What came of the writing."""

    written_bytes: int
    notes: tuple[str, ...]
    segments: int = 0
    derived_map: bool = False
    processors: int = 0
    vmcoreinfo: bool = False


class _Conversion:
    """One conversion, with its source open."""

    def __init__(
        self,
        source: Source,
        out: Path,
        to: TargetFormat,
        options: WriteOptions,
        progress: ProgressCallback | None,
        engine: EngineChoice | None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._contents = source.contents
        self._out = out
        self._to = to
        self._options = options
        self._progress = progress

    def run(self) -> _Made:
        """Write the file and give it its name."""
        contents, out, options = self._contents, self._out, self._options
        if self._to == "mapped-ram":
            done = write_hot(
                contents, out, options=options, progress=self._progress, engine=self._engine
            )
            return _Made(done.written_bytes, done.notes + done.warnings)
        if self._to == "stream":
            size, notes = write_stream(contents, out, options=options, progress=self._progress)
            return _Made(size, notes)
        guest = contents.guest()
        lengths = {block.idstr: block.used_length for block in contents.blocks}
        if guest is not None and guest.memory_map is not None:
            where = said_map(guest.memory_map, lengths)
        else:
            where = derived_map(contents.configuration.machine, lengths)
        if self._to == "elf":
            return self._elf(where, None if guest is None else guest.target)
        if self._to == "lime":
            return self._lime(where)
        offsets = [one.start for one in where.segments]
        return self._placed(where, offsets, where.segments[-1].end)

    def _lime(self, where: GuestMap) -> _Made:
        """A header before each range: nothing in such a file is aligned."""
        if self._options.direct == "required":
            raise StorageError(
                "O_DIRECT is required, but in a LiME file no page is aligned",
                path=self._out,
                cure="allow --direct preferred, or write raw or elf",
            )
        heads, offsets, at = [], [], 0
        for one in where.segments:
            heads.append((at, _LIME.pack(_LIME_MAGIC, _LIME_VERSION, one.start, one.end - 1, 0)))
            offsets.append(at + _LIME.size)
            at += _LIME.size + one.length
        self._options = replace(self._options, direct="off")
        return self._placed(where, offsets, at, heads=lambda: heads)

    def _elf(self, where: GuestMap, target: str | None) -> _Made:
        """Registers first; the notes are whole when all memory has been seen."""
        sections, description = self._source.devices()
        registers, word = read_registers(sections, description, target=target)
        notes = processor_notes(registers)
        place = ElfPlace(where.segments, notes_room=len(notes) + _VMCOREINFO_ROOM)
        search = VmcoreinfoSearch()

        def heads() -> list[tuple[int, bytes]]:
            found, _ = search.settle()
            more = b"" if found is None else note(b"VMCOREINFO", 0, found)
            return [(0, place.head(notes + more))]

        made = self._placed(where, place.offsets, place.size, heads=heads, search=search)
        found, missing = search.settle()
        words = tuple(one for one in (word, missing) if one is not None)
        return replace(
            made,
            processors=len(registers),
            vmcoreinfo=found is not None,
            notes=made.notes + words,
        )

    def _placed(
        self,
        where: GuestMap,
        offsets: Sequence[int],
        size: int,
        *,
        heads: Callable[[], Sequence[tuple[int, bytes]]] = lambda: [],
        search: VmcoreinfoSearch | None = None,
    ) -> _Made:
        """Write memory by its address; ``heads`` is asked when all of it has been seen."""
        engine = self._engine or choose_engine(self._options.engine)
        target = NamedTarget(self._out, mode=self._options.direct, sidecar_suffix=manifest.SUFFIX)
        try:
            copy = PlacedCopy(
                self._contents,
                target,
                pieces_of(where.segments, offsets),
                size=size,
                options=self._options,
                engine=engine,
                progress=self._progress,
                search=search,
            )
            copy.run()
            copy.finish(heads()).publish(None)
        finally:
            target.close()
        notes = (*where.notes, engine.note, *target.notes)
        return _Made(
            written_bytes=sum(item.completed_bytes for item in copy.counters),
            notes=tuple(one for one in notes if one is not None),
            segments=len(where.segments),
            derived_map=where.derived,
        )
