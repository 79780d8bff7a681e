"""What has completed: counters a channel owns, and snapshots for whoever looks on.

Progress counts completions, never what was merely submitted. A channel's counters are written by
its own thread alone; a reader may see them a moment old, never wrong by more than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

#: How often whoever looks on is told.
_INTERVAL_SECONDS: Final = 0.1

#: The steps of a save in their order; ``read`` and ``verify`` are the reader's. In ``catch-up`` the
#: guest of a live save stands still, and what changed since it was written is written again.
Phase = Literal["write", "catch-up", "bitmaps", "devices", "sync", "publish", "read", "verify"]


@dataclass(slots=True)
class ChannelCounters:
    """What one channel has done; bytes and seconds.

    Attributes:
        scanned_bytes: memory looked at, or known to be a hole.
        zero_bytes: of these, in zero pages.
        finished_bytes: memory of windows with nothing left to do.
        completed_bytes: moved to or from the file, bridged gaps included.
        in_flight_bytes: submitted and not completed.
        requests: completed.
        scan_seconds: finding zero pages and planning.
        digest_seconds: digesting, while the device works.
        submit_seconds: in the submitting system call.
        wait_seconds: waiting for the device, or for the rate limit.
        cpu_seconds: processor time of the channel's thread, kernel part included.
    """

    scanned_bytes: int = 0
    zero_bytes: int = 0
    finished_bytes: int = 0
    completed_bytes: int = 0
    in_flight_bytes: int = 0
    requests: int = 0
    scan_seconds: float = 0.0
    digest_seconds: float = 0.0
    submit_seconds: float = 0.0
    wait_seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeAccount:
    """Where the time went, in seconds; per-channel parts are summed over channels.

    ``elapsed`` is wall time from opening to the end of the last phase; ``receive`` is what a
    route by socket spent receiving the device state.
    """

    elapsed: float
    scan: float
    digest: float
    submit: float
    wait: float
    channel_cpu: float
    sync: float = 0.0
    publish: float = 0.0
    receive: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look at a running save, load or verification; bytes and seconds.

    Attributes:
        phase: what goes on now.
        total_bytes: memory to go through.
        seconds: since the start.
        channels: completed bytes of each channel.
        pass_seconds: since the present pass over the memory began, whose bytes alone are in
            ``total_bytes`` and ``finished_bytes``.
    """

    phase: Phase
    total_bytes: int
    scanned_bytes: int
    zero_bytes: int
    finished_bytes: int
    completed_bytes: int
    in_flight_bytes: int
    seconds: float
    channels: tuple[int, ...]
    pass_seconds: float

    @property
    def share(self) -> float:
        """Finished part of the memory, 0.0 to 1.0."""
        return self.finished_bytes / self.total_bytes if self.total_bytes else 1.0

    @property
    def rate(self) -> float:
        """Bytes a second moved to or from the file so far."""
        return self.completed_bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate at the present pace; None while nothing is finished."""
        return self.pass_seconds * (1 - self.share) / self.share if self.share > 0 else None


ProgressCallback = Callable[[Snapshot], None]


def take_snapshot(
    phase: Phase,
    counters: Sequence[ChannelCounters],
    *,
    total_bytes: int,
    seconds: float,
    passed_bytes: int = 0,
    passed_seconds: float = 0.0,
) -> Snapshot:
    """Sum the channels' counters; what was ``passed`` was done in earlier passes."""
    return Snapshot(
        phase=phase,
        total_bytes=total_bytes - passed_bytes,
        scanned_bytes=sum(item.scanned_bytes for item in counters),
        zero_bytes=sum(item.zero_bytes for item in counters),
        finished_bytes=sum(item.finished_bytes for item in counters) - passed_bytes,
        completed_bytes=sum(item.completed_bytes for item in counters),
        in_flight_bytes=sum(item.in_flight_bytes for item in counters),
        seconds=seconds,
        channels=tuple(item.completed_bytes for item in counters),
        pass_seconds=seconds - passed_seconds,
    )


class Teller:
    """Tells of work that goes on in one thread, about ten times a second.

    Args:
        progress: called with a `Snapshot`; None: nobody looks on.
        total_bytes: memory to go through.

    Attributes:
        counters: what has been done; its owner's to write.
    """

    def __init__(self, progress: ProgressCallback | None, *, total_bytes: int) -> None:
        self.counters = ChannelCounters()
        self._progress = progress
        self._total_bytes = total_bytes
        self._started = self._told_at = time.monotonic()

    def tell(self, phase: Phase, *, now: bool = True) -> None:
        """Tell of the work; unless ``now``, only if it was not told of a moment ago."""
        at = time.monotonic()
        if self._progress is None or not (now or at - self._told_at >= _INTERVAL_SECONDS):
            return
        self._told_at = at
        self._progress(
            take_snapshot(
                phase,
                [self.counters],
                total_bytes=self._total_bytes,
                seconds=at - self._started,
            )
        )


def account(
    counters: Sequence[ChannelCounters],
    *,
    elapsed: float,
    sync: float = 0.0,
    publish: float = 0.0,
    receive: float = 0.0,
) -> TimeAccount:
    """Sum the channels' seconds into one account."""
    return TimeAccount(
        elapsed=elapsed,
        scan=sum(item.scan_seconds for item in counters),
        digest=sum(item.digest_seconds for item in counters),
        submit=sum(item.submit_seconds for item in counters),
        wait=sum(item.wait_seconds for item in counters),
        channel_cpu=sum(item.cpu_seconds for item in counters),
        sync=sync,
        publish=publish,
        receive=receive,
    )
