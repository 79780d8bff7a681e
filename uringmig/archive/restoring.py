"""An entry back as a file or into a QEMU, every window compared with its manifest on its way.

What differs ends the restore before anything is published or a guest is started: a restored image
is whole and what was saved, or it is not there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uringmig.archive.copied import EntryLabel
from uringmig.archive.directory import Archive
from uringmig.archive.hot import write_hot
from uringmig.archive.opening import CheckedContents, open_entry
from uringmig.contents.streamfile import write_stream
from uringmig.errors import StateError
from uringmig.options import ReadOptions, WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.streamload import StreamLoad, stream_into
from uringmig.storage.folder import final_name

OutputFormat = Literal["hot", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreResult:
    """A restored file; sizes in bytes.

    Attributes:
        name: of the entry.
        path: the file.
        output: ``hot``, a mapped-ram image; or ``plain``, a migration stream.
        memory_bytes: guest memory, all of it compared.
        content_digest: of the whole guest.
        notes: what the operator should know, one line each.
    """

    name: str
    path: str
    output: OutputFormat
    memory_bytes: int
    file_bytes: int
    content_digest: str
    seconds: float
    notes: tuple[str, ...]


def restore_file(
    archive: Archive,
    name: str,
    out: str | os.PathLike[str],
    *,
    output: OutputFormat = "hot",
    read: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    write: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
) -> RestoreResult:
    """Write an entry as a file, without a temporary copy; it appears whole or not at all.

    Args:
        archive: open for reading or writing.
        name: of the entry.
        out: the file's final name, outside the archive.
        output: ``hot`` is a mapped-ram image with its manifest, as `write_hot` makes it; ``plain``
            a plain migration stream, which any QEMU loads.
        read: how the entry is read.
        write: how the file is written.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        StateError: no such entry, or a name for the file that cannot be.
        MismatchError: the entry is not what was saved; nothing is published.
        FormatError: image or manifest breaks a rule of its format.
        StorageError: reading or writing failed; nothing is published.
        HostError: io_uring is required and cannot be had.
    """
    entry = archive.find(name)
    path = Path(final_name(out))
    if path.parent.resolve() == archive.path.resolve():
        raise StateError(f"{path} would be in the archive itself; restore to another folder")
    started = time.monotonic()
    with open_entry(entry, options=read) as opened:
        contents = CheckedContents(opened)
        if output == "hot":
            label = EntryLabel(
                name=entry.name,
                vm=entry.vm,
                host=entry.host,
                source_kind=entry.source_kind,
                source_path=entry.source_path,
            )
            done = write_hot(contents, path, options=write, label=label, progress=progress)
            size, notes = done.file_bytes, done.notes
        else:
            size, notes = write_stream(contents, path, options=write, progress=progress)
    return RestoreResult(
        name=name,
        path=str(path),
        output=output,
        memory_bytes=entry.memory_bytes,
        file_bytes=size,
        content_digest=entry.content_digest,
        seconds=time.monotonic() - started,
        notes=tuple(dict.fromkeys((*contents.notes, *notes))),
    )


def restore_into(
    archive: Archive,
    name: str,
    monitor: Monitor,
    *,
    read: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    progress: ProgressCallback | None = None,
) -> StreamLoad:
    """Stream an entry into a waiting QEMU; see `stream_into`.

    Args:
        archive: open for reading or writing.
        name: of the entry.
        monitor: of a QEMU started with ``-incoming defer``.
        read: how the entry is read.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        StateError: no such entry.
        MismatchError: the entry is not what was saved, or not of this QEMU's machine; no guest has
            started.
        FormatError: image or manifest breaks a rule of its format.
        StorageError: it cannot be read.
        PeerError: QEMU does not wait for a load, refused, failed, or went away.
    """
    with open_entry(archive.find(name), options=read) as opened:
        # For its check of what is no window; `stream_into` compares the windows.
        CheckedContents(opened)
        return stream_into(monitor, opened.contents, digests=opened.digests, progress=progress)
