"""What runs: for each scale the contests, that is which rivals meet over which guest and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final, Literal

from perf.program import Program
from perf.rivals import Fio, Kind, Loader, Ours, Qemu, Rival
from perf.workloads import OF_QEMU, WORKLOADS, Workload
from uringmig.errors import StateError
from uringmig.units import GiB, KiB, MiB

Scale = Literal["quick", "full"]
TargetName = Literal["disk", "tmpfs", "xfs-loop"]
TARGETS: Final[tuple[TargetName, ...]] = ("disk", "tmpfs", "xfs-loop")


@dataclass(frozen=True, slots=True)
class Contest:
    """Rivals that meet over one guest, round by round."""

    target: TargetName
    workload: Workload
    kind: Kind
    rivals: tuple[Rival, ...]
    rounds: int


#: QEMU's way in our code: one synchronous write of 512 KiB per channel.  QEMU: MULTIFD_PACKET_SIZE.
_PWRITE: Final = tuple(
    Ours(engine="pwrite", channels=channels, depth=1, block_size=512 * KiB) for channels in (1, 2)
)
_BUFFERED: Final = Ours(engine="pwrite", channels=1, depth=1, direct="off")
#: What a request of 4 KiB costs: every other page alone.
_UNBRIDGED: Final = Ours(channels=1, depth=16, bridge=0)
_TWINS: Final = (Ours(twin="null"), Ours(twin="memory"), Ours(twin="null", channels=1, depth=16))
#: The defaults as a user gets them, with the manifest; and the settings that were found fastest.
_OURS: Final = (Ours(manifest=True), Ours(), Ours(channels=1, depth=16))
#: A whole machine at its socket, as a user saves it; and with one channel.
_OUTSIDE: Final = Ours(route="machine", label="outside", manifest=True)
_OUTSIDE_ONE: Final = Ours(route="machine", label="outside", channels=1, depth=16)
_QEMU_DIRECT: Final = tuple(Qemu(channels=count, direct=True) for count in (1, 2, 4, 8))
_FIO: Final = (
    Fio(),
    Fio(jobs=2, depth=8),
    Fio(preparation="extended"),
    Fio(preparation="fallocated"),
    Fio(engine="psync", depth=1),
    Fio(engine="psync", jobs=2, depth=1, block_size=512 * KiB),
)
#: A whole process beside QEMU's command, on a guest so small that starting counts.
_SMALL: Final[tuple[Rival, ...]] = (Program(), _QEMU_DIRECT[1], Qemu())
_LOADS: Final[tuple[Rival, ...]] = (
    Ours(kind="load", label="reader"),
    Ours(kind="load", label="reader", channels=1, depth=16),
    Ours(kind="load", label="reader", engine="pwrite", depth=1, block_size=512 * KiB),
    Loader(),
    Qemu(kind="load"),
    Qemu(kind="load", channels=2),
    Qemu(kind="load", channels=2, direct=True),
)


def _dense(channels: Sequence[int]) -> tuple[Rival, ...]:
    """All rivals that are of interest over a guest without a zero page."""
    more = [Ours(channels=count, depth=max(1, 16 // count)) for count in channels]
    return (
        *_OURS,
        *more,
        _OUTSIDE,
        *_PWRITE,
        _BUFFERED,
        *_TWINS,
        Qemu(mapped=False),
        Qemu(),
        Qemu(channels=2),
        *_QEMU_DIRECT,
        Qemu(channels=2, direct=True, touched=True),
        *_FIO,
    )


def _grid(depths: Sequence[int], sizes: Sequence[int]) -> tuple[Rival, ...]:
    """One channel at every depth and block size."""
    return tuple(
        Ours(channels=1, depth=depth, block_size=size) for depth in depths for size in sizes
    )


def _of_qemu(scale_down: int, rounds: int) -> list[Contest]:
    """Guests whose RAM is QEMU's own: private, or a memfd."""
    rivals: tuple[Rival, ...] = (_OUTSIDE, _OUTSIDE_ONE, Qemu(), _QEMU_DIRECT[1])
    sizes = {"dense": 2 * GiB, "fragmented": GiB, "mixed": 2 * GiB, "idle": 8 * GiB}
    return [
        Contest(
            "disk",
            workload.resized(sizes[name.partition("-")[0]] // scale_down),
            "save",
            rivals,
            rounds,
        )
        for name, workload in OF_QEMU.items()
    ]


def _memory_speed(target: TargetName, memory_bytes: int, rounds: int) -> Contest:
    """Our software against QEMU's where the device is memory: 1 and 2 channels."""
    rivals: tuple[Rival, ...] = (
        *_OURS,
        *_PWRITE,
        *_TWINS,
        *(Qemu(channels=count, direct=True) for count in (1, 2)),
        Qemu(),
        Fio(),
    )
    return Contest(target, WORKLOADS["dense"].resized(memory_bytes), "save", rivals, rounds)


def _quick() -> list[Contest]:
    """Under five minutes on a quiet machine."""
    of = WORKLOADS
    sparse: tuple[Rival, ...] = (*_OURS, Ours(twin="null"), _QEMU_DIRECT[1])
    return [
        Contest("disk", of["dense"].resized(GiB), "save", _dense([4]), 2),
        Contest(
            "disk", of["grid"].resized(GiB // 2), "save",
            _grid([1, 4, 16], [256 * KiB, MiB, 4 * MiB]), 1,
        ),
        Contest(
            "disk", of["fragmented"].resized(GiB // 2), "save", (*sparse, _UNBRIDGED, Qemu()), 2
        ),
        Contest("disk", of["mixed"].resized(GiB), "save", sparse, 1),
        Contest("disk", of["zero"].resized(GiB), "save", sparse, 1),
        Contest("disk", of["idle"], "save", (*_OURS, _QEMU_DIRECT[1]), 1),
        Contest("disk", of["small"], "save", _SMALL, 3),
        Contest("disk", of["dense"].resized(GiB), "load", _LOADS, 2),
        *_of_qemu(4, 1),
        _memory_speed("tmpfs", GiB, 1),
        _memory_speed("xfs-loop", GiB, 1),
    ]  # fmt: skip


def _full() -> list[Contest]:
    """Under forty minutes on a quiet machine."""
    of = WORKLOADS
    qemu: tuple[Rival, ...] = (Qemu(), *_QEMU_DIRECT[1:])
    sparse: tuple[Rival, ...] = (*_OURS, _OUTSIDE, Ours(twin="null"), *qemu)
    depths, sizes = [1, 2, 4, 8, 16, 32], [64 * KiB, 256 * KiB, 512 * KiB, MiB, 2 * MiB, 4 * MiB]
    return [
        Contest("disk", of["dense"], "save", _dense([4, 8]), 7),
        Contest("disk", of["grid"], "save", _grid(depths, sizes), 3),
        Contest("disk", of["fragmented"], "save", (*sparse, _UNBRIDGED), 5),
        Contest("disk", of["mixed"], "save", sparse, 5),
        Contest("disk", of["zero"], "save", sparse, 3),
        Contest("disk", of["idle"], "save", (*_OURS, _OUTSIDE, Qemu(), *_QEMU_DIRECT[1:3]), 3),
        Contest("disk", of["small"], "save", _SMALL, 10),
        Contest("disk", of["dense"].resized(2 * GiB), "load", _LOADS, 5),
        *_of_qemu(1, 5),
        _memory_speed("tmpfs", 2 * GiB, 5),
        _memory_speed("xfs-loop", 2 * GiB, 5),
    ]


def choose(
    scale: Scale,
    *,
    targets: Sequence[str] = (),
    workloads: Sequence[str] = (),
    rivals: Sequence[str] = (),
    rounds: int | None = None,
    memory_bytes: int | None = None,
) -> list[Contest]:
    """The contests of a scale, cut down to what was asked for.

    Args:
        scale: which list to begin with.
        targets: names; none is all.
        workloads: names; none is all.
        rivals: patterns of names as a shell has them; none is all.
        rounds: instead of each contest's own.
        memory_bytes: size of every guest, instead of its own.

    Raises:
        StateError: a name that there is not, or nothing is left.
    """
    _check("target", targets, TARGETS)
    _check("workload", workloads, tuple(WORKLOADS))
    found = []
    for contest in _quick() if scale == "quick" else _full():
        if targets and contest.target not in targets:
            continue
        if workloads and contest.workload.name not in workloads:
            continue
        chosen = tuple(
            rival
            for rival in contest.rivals
            if not rivals or any(fnmatchcase(rival.name, pattern) for pattern in rivals)
        )
        workload = contest.workload
        if memory_bytes is not None:
            workload = workload.resized(memory_bytes)
        if chosen:
            found.append(
                replace(contest, workload=workload, rivals=chosen, rounds=rounds or contest.rounds)
            )
    if not found:
        raise StateError("nothing to run: no contest has such a target, workload and rival")
    return found


def _check(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            raise StateError(f"no {what} {name!r}; there are {', '.join(known)}")
