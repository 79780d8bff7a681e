"""``uringmig inspect``: what an image holds, without reading a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.output import Output
from uringmig.cli.runlengths import RunLengths, run_lengths
from uringmig.cli.session import Session
from uringmig.cli.table import table_lines
from uringmig.errors import naming
from uringmig.format.constants import MAPPED_RAM_FILE_OFFSET_ALIGNMENT
from uringmig.image.guestfacts import GuestDisk, GuestFacts, how_kept
from uringmig.image.sidecar import guest_of_image, sidecar_path
from uringmig.options import PAGE_SIZE, ReadOptions
from uringmig.reader import BlockInfo, MappedRamReader
from uringmig.units import format_size, is_aligned


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """One ramblock; sizes and offsets in bytes, pages of 4 KiB, runs of set pages."""

    idstr: str
    used_length: int
    bitmap_offset: int
    pages_offset: int
    pages_set: int
    pages_zero: int
    runs: RunLengths


@dataclass(frozen=True, slots=True)
class SectionSummary:
    """One device section; ``size_bytes`` with its header and footer."""

    idstr: str
    instance_id: int
    version_id: int
    section_id: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """What `inspect` shows; ``manifest_path`` and ``guest`` are None where there is none."""

    path: str
    base: int
    file_size: int
    allocated_bytes: int
    machine: str
    capabilities: tuple[str, ...]
    section_id: int
    manifest_path: str | None
    blocks: tuple[BlockSummary, ...]
    sections: tuple[SectionSummary, ...]
    guest: GuestFacts | None


@command(parameters.image_file(), parameters.offset(), verbose=False)
def inspect(session: Session, *, file: Path, offset: int) -> int:
    """Show what an image holds: machine, blocks, pages, device sections, and what is unusual."""
    output = session.output
    # No page is read, so which engine could do it does not matter.
    with (
        naming(file),
        MappedRamReader(file, offset=offset, options=ReadOptions(engine="pwrite")) as reader,
    ):
        summary = _summarise(output, reader, file)
        _judge(output, reader)
    output.result("inspect", summary, _lines(summary))
    return output.exit_code


def _summarise(output: Output, reader: MappedRamReader, file: Path) -> ImageSummary:
    """Collect what is shown."""
    image = reader.image
    sidecar = sidecar_path(file)
    guest, notes = guest_of_image(file, reader.main, base=image.base, blocks=image.blocks)
    for note in notes:
        output.note(note)
    return ImageSummary(
        path=str(file),
        base=image.base,
        file_size=image.file_size,
        allocated_bytes=os.fstat(reader.main.fd).st_blocks * 512,
        machine=image.configuration.machine,
        capabilities=image.configuration.capabilities,
        section_id=image.section_id,
        manifest_path=str(sidecar) if os.path.exists(sidecar) else None,
        blocks=tuple(_block(reader, info) for info in reader.blocks),
        sections=tuple(
            SectionSummary(
                idstr=section.header.idstr,
                instance_id=section.header.instance_id,
                version_id=section.header.version_id,
                section_id=section.header.section_id,
                offset=section.offset,
                size_bytes=len(section.raw),
            )
            for section in image.sections
        ),
        guest=guest,
    )


def _block(reader: MappedRamReader, info: BlockInfo) -> BlockSummary:
    """Summarise one block."""
    layout = info.layout
    return BlockSummary(
        idstr=info.idstr,
        used_length=info.used_length,
        bitmap_offset=layout.bitmap_offset,
        pages_offset=layout.pages_offset,
        pages_set=info.pages_set,
        pages_zero=layout.page_count - info.pages_set,
        runs=run_lengths(reader.bitmap(info.idstr), page_count=layout.page_count),
    )


def _judge(output: Output, reader: MappedRamReader) -> None:
    """Say what is unusual; only what lies in the file itself is a warning."""
    for note in reader.notes:
        output.note(f"multifd with direct-io cannot load it from where it is: {note}")
    for info in reader.blocks:
        if not is_aligned(info.layout.pages_offset, MAPPED_RAM_FILE_OFFSET_ALIGNMENT):
            output.warn(
                f"ramblock {info.idstr!r}: the page area at {info.layout.pages_offset:#x} is not "
                "on a 1 MiB boundary, where QEMU puts it; direct-io may fail on other storage"
            )
        large = info.used_length > parameters.WRITE.dense_up_to
        if large and info.pages_set == info.layout.page_count:
            output.note(
                f"ramblock {info.idstr!r}: every page is set, so there was no zero page or none "
                "was left out"
            )


def _lines(summary: ImageSummary) -> list[str]:
    """The summary for people."""
    lines = [
        f"{summary.path}: mapped-ram image at offset {summary.base:#x} of "
        f"{format_size(summary.file_size)}, {format_size(summary.allocated_bytes)} allocated",
        f"machine {summary.machine}, capabilities {', '.join(summary.capabilities)}, "
        f"ram section {summary.section_id}",
        f"manifest {summary.manifest_path or 'none'}",
        "",
        *table_lines(
            [
                ["ramblock", "size", "set", "zero", "runs", "median", "longest", "bitmap", "pages"],
                *map(_block_row, summary.blocks),
            ],
            numbers=True,
        ),
        "",
    ]
    if summary.guest is not None:
        lines += [*_guest_lines(summary.guest), ""]
    sections = summary.sections
    total = sum(section.size_bytes for section in sections)
    lines.append(f"{len(sections)} device sections, {format_size(total)}")
    if sections:
        heading = ["section", "instance", "version", "bytes", "at"]
        lines += table_lines([heading, *map(_section_row, sections)], numbers=True)
    return lines


def _guest_lines(guest: GuestFacts) -> list[str]:
    """What the manifest says of the machine, and where its memory lay."""
    cpus = f"{guest.cpu_count or '?'} x {guest.cpu_type or 'unknown processor'}"
    words = [f"saved by QEMU {guest.qemu_version}", cpus, guest.name, guest.uuid]
    lines = [", ".join(word for word in words if word)]
    if guest.memory_map is not None:
        rows = [
            [
                f"{one.start:#x}",
                format_size(one.length),
                one.block or f"{one.region}, not in the image",
                f"{one.offset:#x}",
                "read-only" if one.read_only else "",
            ]
            for one in guest.memory_map
        ]
        lines += table_lines([["guest address", "size", "ramblock", "from", ""], *rows])
    if guest.disks:
        lines += [
            "",
            *table_lines([["disk", "size", "kept", "node", "file"], *_disk_rows(guest.disks)]),
        ]
    return lines


def _disk_rows(disks: Sequence[GuestDisk]) -> list[list[str]]:
    """A row for each file that a disk of the image's moment lies in."""
    return [
        row
        for one in disks
        for row in (
            [one.name, format_size(one.size), how_kept(one), one.node, one.files[0].path],
            *(["", "", "", "", f"over {behind.path}"] for behind in one.files[1:]),
        )
    ]


def _block_row(block: BlockSummary) -> list[str]:
    return [
        block.idstr,
        format_size(block.used_length),
        str(block.pages_set),
        str(block.pages_zero),
        str(block.runs.runs),
        format_size(block.runs.median_pages * PAGE_SIZE),
        format_size(block.runs.longest_pages * PAGE_SIZE),
        f"{block.bitmap_offset:#x}",
        f"{block.pages_offset:#x}",
    ]


def _section_row(section: SectionSummary) -> list[str]:
    return [
        section.idstr,
        str(section.instance_id),
        str(section.version_id),
        str(section.size_bytes),
        f"{section.offset:#x}",
    ]
