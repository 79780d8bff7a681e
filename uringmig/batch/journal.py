"""The record of a run that a killed runner leaves behind.  Pure: records to bytes and back.

One line a record: the xxh3-64 of the JSON in hex, a space, the JSON. Lines are only ever appended,
each made durable before what it announces is relied upon. A torn or damaged line ends the record:
what follows it is not believed, and the next runner cuts it off.
"""

from __future__ import annotations

from typing import Final

import msgspec
import xxhash

SUFFIX: Final = ".run"
VERSION: Final = 1


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun"):
    """A run began.

    Attributes:
        job_file: its absolute path.
        job_digest: of the text of the job file.
        time: as ``{time}`` stands in names.
        at: seconds since 1970.
    """

    version: int = VERSION
    job_file: str
    job_digest: str
    time: str
    at: float


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """A job is about to write its entry, of which nothing was there before."""

    job: str
    entry: str


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """A job's entry is whole, durable and in the catalogue.

    Attributes:
        content_digest: of the entry, as its manifest has it.
        fingerprint: of the source when it was read; "" where it cannot have one.
    """

    job: str
    entry: str
    content_digest: str
    fingerprint: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A job was given up; nothing of it is left."""

    job: str
    kind: str
    error: str


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Every job has finished or failed; the next run is a new one."""

    at: float


Record = Begun | Started | Finished | Failed | Ended
_DECODER: Final = msgspec.json.Decoder(Record)


class RunState(msgspec.Struct, kw_only=True):
    """What a journal says of its run.

    Attributes:
        begun: None if there is no run in it.
        ended: every job is through.
        started: entry by job, of jobs that may have left something.
        finished: by job.
        length: bytes that are believed; what lies behind is to be cut off.
    """

    begun: Begun | None = None
    ended: bool = False
    started: dict[str, str] = {}
    finished: dict[str, Finished] = {}
    length: int = 0

    def resumable(self, *, job_digest: str, now: float, within_s: float) -> bool:
        """Say whether the next run goes on with this one.

        Args:
            job_digest: of the job file as it is now; another one makes another run.
            now: seconds since 1970.
            within_s: how old the run may be.
        """
        return (
            self.begun is not None
            and not self.ended
            and self.begun.job_digest == job_digest
            and 0 <= now - self.begun.at <= within_s
        )


def digest_text(text: str) -> str:
    """Digest a job file, for `Begun.job_digest`."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def encode(record: Record) -> bytes:
    """One line."""
    body = msgspec.json.encode(record)
    return f"{xxhash.xxh3_64_hexdigest(body)} ".encode() + body + b"\n"


def replay(data: bytes) -> RunState:
    """Read a journal as far as it is whole; never fails."""
    state = RunState()
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        record = _decode(data[at:end])
        # The first record says what the rest belongs to; without it nothing can be believed.
        if record is None or isinstance(record, Begun) != (state.begun is None):
            break
        _apply(record, state)
        at = end + 1
    state.length = at
    return state


def _decode(line: bytes) -> Record | None:
    """One line, or None if it is not as it was written."""
    digest, _, body = line.partition(b" ")
    if digest != xxhash.xxh3_64_hexdigest(body).encode():
        return None
    try:
        record = _DECODER.decode(body)
    except msgspec.DecodeError:
        return None
    return None if isinstance(record, Begun) and record.version != VERSION else record


def _apply(record: Record, state: RunState) -> None:
    """Move a state on by one record."""
    match record:
        case Begun():
            state.begun = record
        case Started():
            state.started[record.job] = record.entry
        case Finished():
            state.started.pop(record.job, None)
            state.finished[record.job] = record
        case Failed():
            state.started.pop(record.job, None)
        case Ended():
            state.ended = True
