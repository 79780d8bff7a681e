"""The cost model of a save: constants from one run of the harness, its error, and far guests.

    time = fixed + max(device, channels, processors)

``perf/MODEL.md`` explains the terms. The constants come from few rivals (one channel over the dense
guest, requests one at a time, the zero guest); all other saves are predictions, and the error is
of these.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from perf.results import Results, Sample, by_rival, counted
from perf.verdict import is_ours
from uringmig.errors import StateError
from uringmig.units import GiB, KiB, MiB, TiB

#: Guests and devices beyond this machine: bytes a second.
_DEVICES: Final = (("this disk", None), ("one fast NVMe", 7e9), ("an array", 25e9))


@dataclass(frozen=True, slots=True)
class Constants:
    """What one run measured; seconds, bytes, bytes a second.

    Attributes:
        device: bytes a second that the disk takes: the fastest of fio and us over dense.
        request_s: latency of a request without its bytes, one at a time.
        single: bytes a second within one request, were the device not the limit.
        map_s: a channel's processor time for each byte that is mapped in, looked at and planned.
        unmap_s: processor time of the whole process beside the channels', for each byte of memory;
            most of it is unmapping, after the image is durable.
        python_s: the user part of a whole save by one channel, mostly under the interpreter's lock,
            for each byte.
        zero_s: a channel's processor time for each byte of a zero page, which is read whole.
        move_s: processor time for each byte written, pinning its pages and the block layer.
        request_channel_s: a channel's processor time of one more request.
        request_cpu_s: everybody's, the kernel's workers included.
        fixed_s: a save's time beside its pages: opening, sync, publishing.
        cores: processors here.
    """

    device: float
    request_s: float
    single: float
    map_s: float
    unmap_s: float
    python_s: float
    zero_s: float
    move_s: float
    request_channel_s: float
    request_cpu_s: float
    fixed_s: float
    cores: int


@dataclass(frozen=True, slots=True)
class Point:
    """One rival over one guest: what it took and what the model says.

    Attributes:
        limit: the term that decides: ``device``, ``channels`` or ``processors``.
        fitted: whether constants were taken from it.
    """

    name: str
    measured_s: float
    predicted_s: float
    limit: str
    fitted: bool

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted_s / self.measured_s - 1


def fit(results: Results) -> Constants:
    """Take the constants from a run.

    Raises:
        StateError: a rival is missing that a constant comes from.
    """
    saves = [s for s in counted(results.samples) if s.target == "disk" and s.kind == "save"]
    dense = [s for s in saves if s.workload == "dense"]
    fio = [s for s in dense if s.group == "fio"]
    writers = [*fio, *(s for s in dense if is_ours(s))]
    null = [s for s in dense if _is_null(s) and _one(s)]
    zero = [s for s in saves if s.workload == "zero" and is_ours(s) and _one(s)]
    grid = [s for s in saves if s.workload == "grid" and is_ours(s)]
    alone = [s for s in grid if s.settings["depth"] == 1]
    fragmented = [s for s in saves if s.workload == "fragmented" and _one(s)]
    bridged = [s for s in fragmented if is_ours(s)]
    single = [s for s in fragmented if _is_unbridged(s)]
    sizes = {s.settings["block_size"] for s in alone}
    lone = [s for s in dense if is_ours(s) and _one(s)]
    if not (fio and null and lone and zero and bridged and single and len(sizes) > 1):
        raise StateError(
            "the model needs fio and one channel of the null engine and of io_uring over dense, "
            "one channel of io_uring over zero, the same over fragmented, bridged and unbridged, "
            "and grid with depth 1 at several block sizes"
        )
    device = max(
        statistics.median(s.moved_bytes / s.durable_s for s in runs)
        for runs in by_rival(writers).values()
    )
    latency, per_byte = _line(
        [(int(s.settings["block_size"]), _alone_s(s, device=device)) for s in alone]
    )
    map_s = statistics.median(_channel_cpu(s) / s.memory_bytes for s in null)
    unmap_s = statistics.median((s.cpu_s - _channel_cpu(s)) / s.memory_bytes for s in null)
    # The largest blocks in the longest queue: hardly any request, hardly any waking up.
    most = max(_in_flight(s) for s in grid)
    bulk = [s for s in grid if _in_flight(s) == most]
    bulk_s = statistics.median(s.cpu_s / s.memory_bytes for s in bulk)
    move_s = max(0.0, bulk_s - map_s - unmap_s)
    return Constants(
        device=device,
        request_s=max(latency, 0.0),
        single=1 / per_byte if per_byte > 0 else math.inf,
        map_s=map_s,
        unmap_s=unmap_s,
        python_s=statistics.median(s.user_s / s.memory_bytes for s in lone),
        zero_s=statistics.median(_channel_cpu(s) / s.memory_bytes for s in zero),
        move_s=move_s,
        request_channel_s=_one_more_request(bridged, single, _channel_cpu),
        request_cpu_s=_one_more_request(
            bridged, single, lambda s: s.cpu_s - move_s * s.moved_bytes
        ),
        fixed_s=statistics.median(_beside_pages(s) for s in null),
        cores=os.cpu_count() or 1,
    )


def predict(constants: Constants, sample: Sample) -> tuple[float, str]:
    """Seconds until durable, and the term that decides."""
    settings = sample.settings
    channels = int(settings["channels"])
    moved = 0 if sample.group == "twin" else sample.moved_bytes
    requests = 0 if sample.group == "twin" else sample.requests
    mapped = sample.nonzero_bytes
    zeros = sample.scanned_bytes - mapped
    # Whatever lies in flight is shared out in blocks, or in smaller requests where runs are short.
    size = moved / requests if requests else 0.0
    in_flight = channels * int(settings["depth"]) * int(settings["block_size"])
    depth = max(1.0, min(in_flight / size, 256.0 * channels)) if size else 0.0
    rate = depth * size / (constants.request_s + size / constants.single) if size else 0.0
    scan = constants.map_s * mapped + constants.zero_s * zeros
    work = scan + constants.move_s * moved + constants.request_cpu_s * requests
    terms = {
        # Not just the slower of the two: the nearer they are, the more often the queue runs dry.
        "device": math.hypot(moved / constants.device, moved / rate) if moved else 0.0,
        "channels": (
            (scan + constants.request_channel_s * requests) / min(channels, constants.cores)
        ),
        "processors": work / constants.cores,
    }
    limit = max(terms, key=lambda name: terms[name])
    return constants.fixed_s + terms[limit], limit


def points(results: Results, constants: Constants) -> list[Point]:
    """Every save that the model is of: our io_uring and null engines, no manifest, on the disk."""
    by_name: dict[str, list[Sample]] = {}
    for sample in counted(results.samples):
        if sample.target == "disk" and sample.kind == "save" and _is_modelled(sample):
            by_name.setdefault(f"{sample.workload}: {sample.rival}", []).append(sample)
    found = []
    for name, runs in by_name.items():
        seconds, limit = predict(constants, runs[0])
        first = runs[0]
        fitted = (
            (first.workload == "dense" and is_ours(first))
            or (first.workload == "dense" and _is_null(first) and _one(first))
            or (first.workload == "zero" and is_ours(first) and _one(first))
            or (first.workload == "fragmented" and _is_unbridged(first))
            or (first.workload == "grid" and first.settings["depth"] == 1)
        )
        found.append(
            Point(name, statistics.median(s.durable_s for s in runs), seconds, limit, fitted)
        )
    return found


def describe(results: Results) -> str:
    """The model beside what was measured, and carried to what cannot be; Markdown.

    Raises:
        StateError: the run has not all that the constants come from.
    """
    constants = fit(results)
    found = points(results, constants)
    errors = [abs(point.error) for point in found if not point.fitted]
    return "\n".join(
        [
            f"Measured {results.started}, `{results.command}`, commit {results.commit}, "
            f"{sum(bool(s.disturbed) for s in results.samples)} of {len(results.samples)} runs "
            "disturbed.",
            "",
            *_constants_table(constants),
            "",
            f"{len(errors)} predictions: median error {100 * statistics.median(errors):.0f} %, "
            f"largest {100 * max(errors):.0f} %.",
            "",
            "| save | measured s | model s | error | limit | |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {point.name} | {point.measured_s:.2f} | {point.predicted_s:.2f} | "
                f"{100 * point.error:+.0f} % | {point.limit} | {'fitted' if point.fitted else ''} |"
                for point in found
            ),
            "",
            *_far(constants),
        ]
    )


def _constants_table(c: Constants) -> list[str]:
    rows = [
        ("device", f"{c.device / 1e9:.2f} GB/s", "the fastest over dense, fio or us"),
        ("request_s", f"{c.request_s * 1e6:.0f} us", "grid, depth 1: time a request by its size"),
        ("single", f"{c.single / 1e9:.2f} GB/s", "the same"),
        ("map_s", f"{c.map_s * GiB:.3f} s/GiB", "null engine over dense, the one channel's time"),
        ("unmap_s", f"{c.unmap_s * GiB:.3f} s/GiB", "the same, the rest of the process"),
        ("python_s", f"{c.python_s * GiB:.3f} s/GiB", "dense, one channel: all in user mode"),
        ("zero_s", f"{c.zero_s * GiB:.3f} s/GiB", "zero, the one channel's time"),
        ("move_s", f"{c.move_s * GiB:.3f} s/GiB", "grid, largest blocks and depth, less both"),
        ("request_channel_s", f"{c.request_channel_s * 1e6:.1f} us", "as below, the channel's"),
        ("request_cpu_s", f"{c.request_cpu_s * 1e6:.1f} us", "fragmented, unbridged less bridged"),
        ("fixed_s", f"{c.fixed_s:.3f} s", "null engine over dense, what is not its channel's"),
        ("cores", str(c.cores), ""),
    ]  # fmt: skip
    return [
        "| constant | value | from |",
        "| --- | --- | --- |",
        *(f"| {name} | {value} | {source} |" for name, value, source in rows),
    ]


def _far(c: Constants) -> list[str]:
    """1 TiB, dense, on faster devices: how fast each part of a save could be, and must be."""
    channel = 1 / (c.map_s + c.request_channel_s / MiB)
    pinning = 1 / (c.map_s + c.move_s + c.request_cpu_s / MiB)
    small = f"{4 * KiB / c.request_cpu_s / 1e9:.2f} GB/s" if c.request_cpu_s else "any rate"
    requests = f"{1e-3 / c.request_cpu_s:.0f} thousand" if c.request_cpu_s else "any number of"
    lock = 1 / c.python_s if c.python_s else math.inf
    work = c.map_s + c.unmap_s + c.move_s + c.request_cpu_s / MiB
    lines = [
        f"One channel goes through at most {channel / 1e9:.1f} GB/s of dense memory in blocks of "
        f"1 MiB while the kernel's workers write, and {pinning / 1e9:.1f} GB/s where the kernel "
        "takes each write at once and the channel pins its pages itself. The interpreter's lock is "
        f"busy {c.python_s * GiB * 1000:.0f} ms a GiB at most, so all channels of one process "
        f"together end at {lock / 1e9:.0f} GB/s or later. In blocks of 4 KiB one processor makes "
        f"{requests} requests a second, {small}.",
        "",
        "| 1 TiB dense onto | seconds | channels | processors | requests/s at 1 MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, speed in _DEVICES:
        rate = min(speed or c.device, lock)
        lines.append(
            f"| {name}, {(speed or c.device) / 1e9:.1f} GB/s | {TiB / rate:.0f} | "
            f"{np.ceil(rate / pinning):.0f} | {rate * work:.1f} | {rate / MiB:.0f} |"
        )
    return lines


def _one(sample: Sample) -> bool:
    return sample.settings["channels"] == 1


def _is_null(sample: Sample) -> bool:
    return sample.group == "twin" and sample.settings["engine"] == "null"


def _is_unbridged(sample: Sample) -> bool:
    return sample.group == "uringmig" and sample.settings["bridge"] == 0


def _is_modelled(sample: Sample) -> bool:
    return is_ours(sample) or _is_null(sample) or _is_unbridged(sample)


def _in_flight(sample: Sample) -> int:
    """Bytes a channel may have in flight."""
    return int(sample.settings["depth"]) * int(sample.settings["block_size"])


def _alone_s(sample: Sample, *, device: float) -> float:
    """Seconds of one request at a time, without what the device's own rate adds."""
    seconds = sample.completed_s / sample.requests
    share = sample.moved_bytes / sample.requests / device
    return math.sqrt(max(0.0, seconds**2 - share**2))


def _channel_cpu(sample: Sample) -> float:
    """Processor time of all channels, in seconds."""
    return sample.account["channel_cpu"]


def _one_more_request(
    bridged: Sequence[Sample], single: Sequence[Sample], cost: Callable[[Sample], float]
) -> float:
    """What a request of one page costs: the same pages, but bridged in far fewer requests."""
    few, many = (statistics.median(s.requests for s in group) for group in (bridged, single))
    less, more = (statistics.median(cost(s) for s in group) for group in (bridged, single))
    return max(0.0, (more - less) / (many - few))


def _beside_pages(sample: Sample) -> float:
    """Seconds of a save in which no channel was at work."""
    account = sample.account
    busy = sum(account[name] for name in ("scan", "digest", "submit", "wait"))
    return max(0.0, account["elapsed"] - busy / int(sample.settings["channels"]))


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line through (x, y)."""
    x, y = np.array(pairs, float).T
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope)
