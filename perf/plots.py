"""The pictures of a report, as PNG; every axis with its unit."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from perf.results import Figures, Results, Sample, contests, counted, figures, samples_of
from perf.rivals import Kind, size_name

_COLORS: Final = {"uringmig": "#1f77b4", "twin": "#9ecae1", "qemu": "#d62728", "fio": "#7f7f7f"}
_LEGEND: Final = {
    "uringmig": "uringmig",
    "twin": "uringmig without a disk",
    "qemu": "QEMU itself",
    "fio": "fio",
}
#: Activities of a channel, in the order of the stack, then what the whole save waits for.
_PARTS: Final = ("scan", "digest", "submit", "wait", "sync", "publish")
_PART_COLORS: Final = ("#1f77b4", "#17becf", "#2ca02c", "#c7c7c7", "#d62728", "#9467bd", "#ffffff")
_TIMELINES_MAX: Final = 6


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture and its words."""

    title: str
    png: bytes


def plots(results: Results) -> list[Plot]:
    """Every picture there are samples for."""
    found = []
    for target, workload, kind in contests(results):
        samples = samples_of(results, target, workload, kind)
        where = f"{workload} on {target}"
        if workload == "grid":
            found += _heat_map(where, samples)
            continue
        found.append(_bars(where, kind, figures(samples)))
        if kind == "save":
            if workload == "dense":
                found += _by_channels(where, samples)
            found += _accounts(where, samples)
            found += _timelines(where, samples)
    return found


def _plot(title: str, figure: Figure) -> Plot:
    """Draw, and let go of the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return Plot(title, buffer.getvalue())


def _bars(where: str, kind: Kind, rows: Sequence[Figures]) -> Plot:
    """Time of every rival, fastest at the bottom, with its spread."""
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(rows)))
    names = [row.rival for row in rows]
    seconds = [row.durable_s for row in rows]
    axes.barh(
        names,
        seconds,
        xerr=[row.spread * row.durable_s for row in rows],
        color=[_COLORS[row.group] for row in rows],
        error_kw={"ecolor": "black", "capsize": 2, "lw": 0.8},
    )
    for index, row in enumerate(rows):
        axes.annotate(
            f"{row.durable_s:.2f} s", (row.durable_s * (1 + row.spread), index),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    # Slowest at the top: its bar leaves no room for a legend there, but there is some below.
    axes.set_xlim(0, max(row.durable_s * (1 + row.spread) for row in rows) * 1.12)
    axes.set_xlabel("seconds until durable" if kind == "save" else "seconds until loaded")
    axes.tick_params(axis="y", labelsize=8)
    groups = [group for group in _COLORS if any(row.group == group for row in rows)]
    handles = [Patch(color=_COLORS[group], label=_LEGEND[group]) for group in groups]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    axes.set_title(f"{where}: time to {kind}, median over rounds")
    return _plot(f"{where}: time to {kind}", figure)


def _heat_map(where: str, samples: Sequence[Sample]) -> list[Plot]:
    """Throughput of one channel by depth and block size."""
    cells: dict[tuple[int, int], list[float]] = {}
    for sample in counted(samples):
        key = (int(sample.settings["depth"]), int(sample.settings["block_size"]))
        cells.setdefault(key, []).append(sample.moved_bytes / sample.durable_s / 1e9)
    depths = sorted({depth for depth, _ in cells})
    sizes = sorted({size for _, size in cells})
    if len(depths) < 2 or len(sizes) < 2:
        return []
    grid = np.full((len(depths), len(sizes)), np.nan)
    for (depth, size), values in cells.items():
        grid[depths.index(depth), sizes.index(size)] = statistics.median(values)
    figure, axes = plt.subplots(figsize=(1.8 + 0.9 * len(sizes), 1.6 + 0.6 * len(depths)))
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(sizes)), [f"{size_name(size)}iB" for size in sizes])
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    axes.set_xlabel("block size")
    axes.set_ylabel("requests in flight (depth)")
    middle = np.nanmax(grid) * 0.6
    for (row, column), value in np.ndenumerate(grid):
        color = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axes, label="GB/s until durable")
    axes.set_title(f"{where}: uringmig io_uring, one channel")
    return [_plot(f"{where}: throughput by depth and block size", figure)]


def _by_channels(where: str, samples: Sequence[Sample]) -> list[Plot]:
    """Throughput by number of channels, for ways that ran with more than one number."""
    lines: dict[str, dict[int, list[float]]] = {}
    for sample in counted(samples):
        way = _way(sample)
        if way is not None:
            points = lines.setdefault(way, {})
            channels = int(sample.settings["channels"])
            points.setdefault(channels, []).append(sample.moved_bytes / sample.durable_s / 1e9)
    lines = {way: points for way, points in lines.items() if len(points) > 1}
    if not lines:
        return []
    figure, axes = plt.subplots(figsize=(7, 4))
    for way, points in lines.items():
        counts = sorted(points)
        axes.plot(counts, [statistics.median(points[count]) for count in counts], "o-", label=way)
    every = sorted({count for points in lines.values() for count in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(count) for count in every])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("channels")
    axes.set_ylabel("GB/s until durable")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{where}: throughput by channels")
    return [_plot(f"{where}: throughput by channels", figure)]


def _way(sample: Sample) -> str | None:
    """A way of writing of which only the number of channels varies, or None."""
    settings = sample.settings
    if sample.group == "qemu" and settings["direct"] == 1:
        return "QEMU multifd direct-io"
    if sample.group != "uringmig" or settings["manifest"] or settings["route"] != "file":
        return None
    if settings["engine"] == "pwrite" and settings["direct"] != "off":
        return "uringmig pwrite, 512 KiB"
    if settings["engine"] == "io_uring" and settings["block_size"] == 1 << 20:
        return "uringmig io_uring, 1 MiB, 16 in flight over all channels"
    return None


def _accounts(where: str, samples: Sequence[Sample]) -> list[Plot]:
    """Where the time of our saves went: a channel's activities, averaged over its channels."""
    rows: dict[str, list[list[float]]] = {}
    for sample in counted(samples):
        if sample.account:
            channels = int(sample.settings["channels"])
            parts = [
                sample.account[name] / (1 if name in ("sync", "publish") else channels)
                for name in _PARTS
            ]
            rest = max(0.0, sample.account["elapsed"] - sum(parts))
            rows.setdefault(sample.rival, []).append([*parts, rest])
    if not rows:
        return []
    names = list(rows)
    values = np.array([np.median(rows[name], axis=0) for name in names])
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.35 * len(names)))
    left = np.zeros(len(names))
    for column, (part, color) in enumerate(zip([*_PARTS, "rest"], _PART_COLORS, strict=True)):
        axes.barh(
            names, values[:, column], left=left, color=color, label=part,
            edgecolor="#555555", linewidth=0.3,
        )  # fmt: skip
        left += values[:, column]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("seconds (activities averaged over the channels)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    axes.set_title(f"{where}: where the time goes")
    return [_plot(f"{where}: where the time goes", figure)]


def _timelines(where: str, samples: Sequence[Sample]) -> list[Plot]:
    """Bytes a second while it ran, of the first round's fastest rivals that told.

    Not of a guest without a page to move: what is written then is a few headers.
    """
    if not any(sample.nonzero_bytes for sample in samples):
        return []
    told = [
        sample
        for sample in counted(samples)
        if sample.round == 1 and len(sample.timeline) > 2 and sample.group != "twin"
    ]
    told.sort(key=lambda sample: sample.durable_s)
    chosen = [sample for sample in told if sample.group == "uringmig"][: _TIMELINES_MAX // 2]
    chosen += [sample for sample in told if sample.group == "qemu"][: _TIMELINES_MAX // 2]
    if not chosen:
        return []
    figure, axes = plt.subplots(figsize=(9, 4))
    for sample in chosen:
        moments, rates = _rates(sample.timeline)
        style = "--" if sample.group == "qemu" else "-"
        axes.plot(moments, rates, style, drawstyle="steps-pre", label=sample.rival)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("GB/s in the last tenth of a second")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{where}: throughput over time, round 1")
    return [_plot(f"{where}: throughput over time", figure)]


def _rates(timeline: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """GB/s between looks at least a tenth of a second apart; what one look shows is jumpy."""
    moments, rates = [0.0], [0.0]
    before = (0.0, 0)
    for seconds, count in timeline:
        if seconds - before[0] >= 0.095:
            moments.append(seconds)
            rates.append((count - before[1]) / (seconds - before[0]) / 1e9)
            before = (seconds, count)
    return moments, rates
