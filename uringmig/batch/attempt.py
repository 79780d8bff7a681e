"""One order carried out, in the process of a worker: examine, measure, archive.

Nothing is decided here: the order says what to do, and the runner whether to try again. Errors are
those of the tree, and every one leaves nothing under the entry's name.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import zstandard

from uringmig.archive.cold import write_cold
from uringmig.archive.coldread import is_cold, open_cold
from uringmig.archive.copied import EntryLabel, TierResult
from uringmig.archive.hot import write_hot
from uringmig.archive.record import CopyFigures
from uringmig.archive.removing import remove_files
from uringmig.batch.disks import disks_of
from uringmig.batch.job import ImageSource, Job, MemoryFilesSource, QmpSource
from uringmig.batch.messages import (
    Archived,
    Attempt,
    Estimate,
    Examine,
    Measure,
    MeasuredDepth,
    Order,
    OrderResult,
)
from uringmig.batch.planning import PlanRow, free_space, make_plan, taken_by_partial
from uringmig.bench.depth import measure_depth
from uringmig.contents.live import LiveContents
from uringmig.contents.memoryfiles import MemoryFileBlock, open_memory
from uringmig.contents.opening import look_at, open_contents
from uringmig.contents.plainfile import PlainFileContents
from uringmig.contents.plainlook import PlainLook
from uringmig.contents.source import Contents, all_rows
from uringmig.errors import BytesError, PeerError, StateError
from uringmig.options import PAGE_SIZE, ReadOptions
from uringmig.progress import ProgressCallback, Snapshot
from uringmig.qemu.disks import DiskMoment
from uringmig.qemu.diskway import DisksWay
from uringmig.qemu.guestcontents import open_guest
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.vmcontents import VmContents
from uringmig.qemu.vmsave import state_to_save
from uringmig.signals import Interrupted, after_commit, look
from uringmig.units import MiB, div_ceil
from uringmig.verify import verify

#: Windows that are compressed to guess how small a cold image gets; 32 MiB are read for it.
_SAMPLED_WINDOWS: Final = 8
#: Headers, device state and the manifest: more than a machine with many devices has.
_OVERHEAD_BYTES: Final = 4 * MiB


def carry_out(order: Order, tell: Callable[[Snapshot], None]) -> OrderResult:
    """Do what an order says.

    Raises:
        UringmigError: nothing has the entry's name.
    """
    match order:
        case Examine():
            return examine(order.job)
        case Measure():
            found = measure_depth(order.path, depth_max=order.depth_max)
            return MeasuredDepth(depth=found.depth, rate=found.rate)
        case Attempt():
            return archive(order, tell)


def examine(job: Job) -> Estimate:
    """Look at a job's source and say what archiving it takes; a guest runs on meanwhile.

    Raises:
        UringmigError: the source cannot be read.
    """
    if isinstance(job.source, QmpSource):
        with Monitor(job.source.qmp) as monitor, open_guest(monitor) as guest:
            return _examined(job, guest, kind="qmp")
    with _look_at_source(job) as source:
        return _examined(job, source, kind=source.kind)


def _examined(job: Job, source: Contents | PlainLook, *, kind: str) -> Estimate:
    """What archiving an opened source takes."""
    sizes = [block.used_length for block in source.blocks]
    dense_up_to = job.options(rate=0).dense_up_to
    live = isinstance(source, LiveContents)
    only_looked_at = isinstance(source, PlainLook)
    return _estimate(
        job,
        kind=kind,
        total=sum(sizes),
        stored=source.stored_bytes(),
        dense=sum(size for size in sizes if size <= dense_up_to),
        ratio=1.0 if live or job.tier == "hot" else _sampled_ratio(source, job.level),
        fingerprint="" if live else source.fingerprint(),
        at_most=only_looked_at,
    )


def _look_at_source(job: Job) -> Contents | PlainLook:
    """Open a source for a plan: no more is read of it than a few MiB, whatever its size."""
    if isinstance(job.source, ImageSource):
        image, offset = job.source.image, job.source.offset
        if offset or not is_cold(image):
            look = look_at(image, offset=offset or None)
            if look is not None:
                return look
    return open_source(job, rate=0)


def open_source(job: Job, *, rate: int) -> Contents:
    """Open the source of a job that needs no running QEMU; the caller closes it.

    Args:
        job: whose.
        rate: at which it may be read, in opening too; 0 is as the job says.

    Raises:
        UringmigError: it cannot be read.
    """
    options = job.options(rate=rate).like(ReadOptions)
    match job.source:
        case ImageSource(image, offset):
            if not offset and is_cold(image):
                return open_cold(image, options=options)
            return open_contents(image, offset=offset or None, options=options)
        case MemoryFilesSource(memory, device_state):
            blocks = [
                MemoryFileBlock(idstr, file.path, file.offset, file.length)
                for idstr, file in memory.items()
            ]
            return open_memory(blocks, device_state)
        case QmpSource():
            raise StateError("a running guest is not opened without its monitor")


def archive(order: Attempt, tell: ProgressCallback) -> Archived:
    """Write one entry, and read it back if the job says so.

    Raises:
        UringmigError: nothing has the entry's name.
    """
    source = order.job.source
    if not isinstance(source, QmpSource):
        with open_source(order.job, rate=order.rate) as contents:
            if isinstance(contents, PlainFileContents):
                _check_room(order, contents)
            return _archived(order, contents, _write(order, contents, tell), tell)
    way = DisksWay.parse(order.job.disks)
    with Monitor(source.qmp) as monitor, DiskMoment(monitor, way, order.image) as disks:
        _, healed = state_to_save(monitor)
        with open_guest(monitor, disks=disks, notes=healed) as guest:
            written = _write(order, guest, tell)
            guest.notes += disks.notes(goes_on=_runs(guest))
        if disks.are_kept:
            # Only then: they go with an entry that differs when it is read back.
            archived = _archived_guest(order, guest, written, tell)
            disks.keep()
            return archived
    return _archived_guest(order, guest, written, tell)


def _runs(guest: VmContents) -> bool:
    """Whether the guest goes on, for a note: a QEMU that has ended takes nothing back any more."""
    try:
        return guest.runs()
    except PeerError:
        return False


def _archived_guest(
    order: Attempt, guest: VmContents, written: TierResult, tell: ProgressCallback
) -> Archived:
    """As `_archived`, of a running VM."""
    return _archived(
        order,
        guest,
        written,
        tell,
        stopped_seconds=guest.stopped_seconds,
        warnings=[f"the image is whole and durable, but: {warning}" for warning in guest.warnings],
    )


def _check_room(order: Attempt, contents: PlainFileContents) -> None:
    """Refuse a stream that does not fit, now that its pages are counted; its plan could not know.

    Raises:
        StorageError: names what is needed and what is free.
    """
    job = order.job
    if job.tier == "cold" or order.previous is not None:
        return  # how much it compresses, or shares, shows only in writing it
    total = sum(block.used_length for block in contents.blocks)
    row = PlanRow(
        job=job.name,
        entry=order.entry,
        archive=job.archive,
        tier=job.tier,
        file_bytes=_file_bytes(contents.stored_bytes(), total),
    )
    unfinished = {job.archive: taken_by_partial(order.image)}
    make_plan([row], {job.archive: free_space(job.archive)}, unfinished=unfinished).check()


def _write(order: Attempt, contents: Contents, tell: ProgressCallback) -> TierResult:
    """Write contents in the job's tier."""
    job = order.job
    image, journal = Path(order.image), Path(order.journal)
    live = isinstance(job.source, QmpSource)
    label = EntryLabel(
        name=order.entry,
        vm=job.vm,
        host=job.host or socket.gethostname(),
        source_kind="qmp" if live else None,
    )
    options = job.options(rate=order.rate)
    if job.tier == "cold":
        return write_cold(
            contents, image, level=job.level, workers=job.channels, options=options, label=label,
            resume=journal, progress=tell,
        )  # fmt: skip
    previous = None if order.previous is None else Path(order.previous)
    return write_hot(
        contents, image, options=options, label=label, resume=journal, previous=previous,
        progress=tell,
    )  # fmt: skip


def _archived(
    order: Attempt,
    contents: Contents,
    written: TierResult,
    tell: ProgressCallback,
    *,
    stopped_seconds: float = 0.0,
    warnings: list[str] | None = None,
) -> Archived:
    """The outcome, after reading the entry back if the job says so."""
    fields = written.manifest.archive
    assert fields, "a tier's manifest is that of an entry"
    verified, warnings = False, list(warnings or ())
    read_back: tuple[str, ...] = ()
    if order.job.verify:
        try:
            with after_commit():
                read_back = _read_back(order, tell)
            verified = True
        except Interrupted as interrupted:
            # The entry has its name: it stays, and the job is done but for this.
            warnings.append(f"the entry was not read back to its end: {interrupted}")
    return Archived(
        image=written.path,
        kind=fields.source_kind,
        content_digest=fields.content_digest,
        fingerprint="" if isinstance(contents, LiveContents) else fields.source_fingerprint,
        **{name: getattr(written, name) for name in CopyFigures.__struct_fields__},
        stopped_seconds=stopped_seconds,
        verified=verified,
        notes=tuple(dict.fromkeys((*contents.notes, *written.notes, *read_back))),
        warnings=(*written.warnings, *warnings),
    )


def _read_back(order: Attempt, tell: ProgressCallback) -> tuple[str, ...]:
    """Read a new entry from the disk and compare; one that differs is removed.

    Returns:
        What the operator should know of how it was read.

    Raises:
        MismatchError: the first difference, with its place.
    """
    job, image = order.job, Path(order.image)
    options = job.options(rate=order.rate).like(ReadOptions)
    try:
        if job.tier == "cold":
            with open_cold(image, options=options) as contents:
                # Every frame and window is compared with its digest as it is read.
                for _ in contents.windows(all_rows(contents.blocks)):
                    pass
                return tuple(contents.notes)
        report = verify(image, options=options, progress=tell)
        if report.mismatches:
            raise report.mismatches[0]
        return report.notes
    except BytesError as error:
        remove_files([image])
        error.add_note("the entry differed when it was read back, and was removed")
        raise


def _estimate(
    job: Job,
    *,
    kind: str,
    total: int,
    stored: int,
    dense: int,
    ratio: float,
    fingerprint: str = "",
    at_most: bool = False,
) -> Estimate:
    """Sizes and disks of a job; see `Estimate`.

    Args:
        job: whose.
        kind: of the source.
        total: bytes of all blocks.
        stored: bytes in pages that are not known to be zero.
        dense: bytes in blocks that are written whole.
        ratio: bytes that a byte of pages takes.
        fingerprint: of the source.
        at_most: ``stored`` is a bound, not a count.
    """
    # Of the other kinds only the device state, if anything, is on a disk.
    sources = disks_of(job.source.image) if isinstance(job.source, ImageSource) else ()
    return Estimate(
        kind=kind,
        memory_bytes=total,
        stored_bytes=stored,
        file_bytes=_file_bytes(round(min(stored + dense, total) * ratio), total),
        at_most=at_most,
        fingerprint=fingerprint,
        source_disks=sources,
        archive_disks=disks_of(job.archive),
    )


def _file_bytes(pages_bytes: int, memory_bytes: int) -> int:
    """What an image takes on the disk: pages, bitmaps, and the rest."""
    return pages_bytes + div_ceil(memory_bytes, PAGE_SIZE * 8) + _OVERHEAD_BYTES


def _sampled_ratio(source: Contents | PlainLook, level: int) -> float:
    """Bytes that a byte of pages takes compressed, by pieces spread over the whole source."""
    compressor = zstandard.ZstdCompressor(level=level)
    before = after = 0
    for piece in source.samples() if isinstance(source, PlainLook) else _samples(source):
        look()
        before += len(piece)
        after += len(compressor.compress(piece))
    return min(1.0, after / before) if before else 1.0


def _samples(contents: Contents) -> Iterator[bytes | memoryview]:
    """What windows spread over a whole guest hold."""
    rows = all_rows(contents.blocks)
    step = div_ceil(max(1, len(rows)), _SAMPLED_WINDOWS)
    for window in contents.windows(rows[::step]):
        if window.data is None:
            yield window.memory.data
            continue
        extents = zip(window.data.start.tolist(), window.data.length.tolist(), strict=True)
        for start, length in extents:
            yield window.memory[start : start + length].data
