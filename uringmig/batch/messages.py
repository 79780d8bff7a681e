"""What runner and worker say to each other: orders one way, progress and outcomes the other.  Pure.

Each is one JSON object. They travel as lines over a socket pair to a process of this host, or as
arguments, results and events of dask to another's.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from uringmig.archive.record import CopyFigures
from uringmig.batch.job import Job
from uringmig.errors import (
    BusyError,
    FormatError,
    HostError,
    LimitError,
    MismatchError,
    PeerError,
    StateError,
    StorageError,
    StorageLimitError,
    UringmigError,
)
from uringmig.progress import Snapshot

#: How an attempt ended. ``lost``: its worker died; ``stopped``: the runner asked for it.
Ending = Literal["done", "failed", "stopped", "lost"]

#: Exit code by the name of the error's class, for outcomes that crossed a process.
_EXIT_CODES: Final = {
    kind.__name__: kind.exit_code
    for kind in (
        StateError, FormatError, MismatchError, PeerError, BusyError, StorageError, HostError,
        LimitError, StorageLimitError, UringmigError,
    )
}  # fmt: skip


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A whole disk of a host, as admission counts it.

    Attributes:
        host: whose it is.
        name: the kernel's, such as ``vda``.
        requests_max: the tags its queue has.
    """

    host: str
    name: str
    requests_max: int

    @property
    def key(self) -> str:
        """Tells it from every other disk of the run."""
        return f"{self.host}:{self.name}"


class Examine(msgspec.Struct, frozen=True, kw_only=True, tag="examine"):
    """Look at a job's source and destination, and estimate what the job takes."""

    key: str
    job: Job


class Measure(msgspec.Struct, frozen=True, kw_only=True, tag="measure"):
    """Find the depth at which a disk reaches its speed, by a file or in a folder on it."""

    key: str
    path: str
    host: str | None
    depth_max: int


class Attempt(msgspec.Struct, frozen=True, kw_only=True, tag="archive"):
    """One attempt at a job.

    Attributes:
        entry: the entry's name in the archive, filled in.
        image: the entry's final path.
        journal: where a copy keeps which chunks are durable.
        previous: an earlier hot image of the same VM to share pages with, or None.
        rate: bytes per second the devices allow; 0 is no limit.
    """

    key: str
    job: Job
    entry: str
    image: str
    journal: str
    previous: str | None
    rate: int


Order = Examine | Measure | Attempt


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far an attempt is."""

    key: str
    snapshot: Snapshot


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What a job would take; bytes.

    Attributes:
        kind: of the source; "" where it could not be looked at.
        memory_bytes: the guest's memory.
        stored_bytes: of it, in pages that are not known to be zero: what is read and written.
        file_bytes: what the entry takes on the disk, at most; for a cold one by a sample.
        at_most: both are bounds from the source's length, and it may be far less: to count them it
            would have to be read whole.
    """

    kind: str = ""
    memory_bytes: int = 0
    stored_bytes: int = 0
    file_bytes: int = 0
    at_most: bool = False


class Estimate(Sizes, frozen=True, kw_only=True, tag="estimate"):
    """What a job would take, and of which disks.

    Attributes:
        fingerprint: of the source; "" where it cannot have one.
        source_disks: where it is read from; none for memory.
        archive_disks: where it is written to.
    """

    fingerprint: str = ""
    source_disks: tuple[Disk, ...]
    archive_disks: tuple[Disk, ...]


class MeasuredDepth(msgspec.Struct, frozen=True, kw_only=True, tag="depth"):
    """The least depth that reaches nine tenths of a disk's best speed; that in bytes a second."""

    depth: int
    rate: float


class Archived(CopyFigures, frozen=True, kw_only=True, tag="archived"):
    """What a finished job put into the archive, see `CopyFigures` too.

    Attributes:
        stopped_seconds: how long a live guest stood still.
        verified: it was read back from the disk and is equal.
        notes: what the operator should know.
        warnings: what went amiss although the entry is whole.
    """

    image: str
    kind: str
    content_digest: str
    fingerprint: str
    stopped_seconds: float = 0.0
    verified: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


OrderResult = Estimate | MeasuredDepth | Archived


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag="outcome"):
    """How an order ended.

    Attributes:
        result: for ``done``.
        kind: class of the error, else "".
        error: one line, else "".
        may_pass: another attempt may succeed.
        peak_bytes: most memory of its own (not the guest's) the worker was seen to have.
        worker: host and process id.
    """

    key: str
    ending: Ending
    result: OrderResult | None = None
    kind: str = ""
    error: str = ""
    may_pass: bool = False
    peak_bytes: int = 0
    worker: str = ""

    @property
    def exit_code(self) -> int:
        """What the command line exits with if this is the worst there was."""
        return 0 if self.ending == "done" else _EXIT_CODES.get(self.kind, PeerError.exit_code)


Message = Progress | Outcome

ORDER_DECODER: Final = msgspec.json.Decoder(Order)
MESSAGE_DECODER: Final = msgspec.json.Decoder(Message)


def failure(key: str, error: UringmigError, *, ending: Ending = "failed") -> Outcome:
    """The outcome of an order that an error ended."""
    return Outcome(
        key=key,
        ending=ending,
        kind=type(error).__name__,
        error="; ".join([str(error), *getattr(error, "__notes__", [])]),
        may_pass=error.may_pass,
    )


def lost(key: str, why: str, *, may_pass: bool, kind: str = "WorkerLost") -> Outcome:
    """The outcome of an order whose worker died: nothing is known to be wrong with the job."""
    return Outcome(key=key, ending="lost", kind=kind, error=why, may_pass=may_pass)
