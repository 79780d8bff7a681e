"""A report of one run: Markdown tables, and one self-contained page with the pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from perf.host import PREFIX
from perf.results import (
    Figures,
    Results,
    Sample,
    contests,
    counted,
    figures,
    samples_of,
)
from perf.verdict import best_of, is_as_delivered, is_ours, verdicts
from perf.workloads import WORKLOADS
from uringmig.units import format_size

Rows = list[list[str]]

_SUMMARY_COLUMNS: Final = [
    "guest", "uringmig as delivered", "uringmig's best", "QEMU's best", "faster", "fio",
    "cpu s/GiB, ours / QEMU",
]  # fmt: skip
_SUMMARY_NOTE: Final = (
    "As delivered: every default, the manifest with its digests included; beside it how many times "
    "faster than QEMU's best. Best is the fastest by its median; of those that tie, within 2 %, "
    "the one that takes least processor time."
)

_COLUMNS: Final = [
    "rival", "runs", "durable s", "± %", "completed s", "GB/s", "of fio's best", "x QEMU's best",
    "cpu s/GiB", "page cache", "own memory", "guest grew", "disturbed",
]  # fmt: skip
_STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
td, th { border: 1px solid #ccc; padding: 2px 7px; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: break-word; }
.words td:first-child { min-width: 16em; }
.words td:last-child { min-width: 4em; }
.facts td:first-child { white-space: nowrap; min-width: 0; }
img { max-width: 100%; display: block; margin: 1em 0; }
.wide { overflow-x: auto; }
"""
_NOTES: Final = (
    "durable: to the end of fdatasync, ours with rename, manifest and fsync of the folder besides. "
    "GB/s: pages moved (of the memory, where none was) by the durable time. The ratios are medians "
    "over rounds, each against the best of its own round. cpu: user and system of the whole "
    "process, its io_uring workers included, for each GiB of the guest. guest grew: memory the "
    "host allocated to the guest because it was looked at. disturbed: runs during which others "
    "used processors or the disk."
)


def write_report(results: Results, out: Path) -> list[Path]:
    """Write ``report.md`` and ``report.html`` into a folder; returns both."""
    # Here, so that measuring needs no matplotlib.
    from perf.plots import plots

    sections = [(f"{w} on {t}: {k}", _rows(results, t, w, k)) for t, w, k in contests(results)]
    targets = [[v.target, v.measured, "met" if v.met else "missed"] for v in verdicts(results)]
    markdown = out / "report.md"
    page = out / "report.html"
    markdown.write_text(_markdown(results, sections, targets))
    body = _page(results, sections, targets)
    pictures = "".join(
        f"<h3>{html.escape(plot.title)}</h3>"
        f'<img alt="{html.escape(plot.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(plot.png).decode()}">'
        for plot in plots(results)
    )
    page.write_text(body.replace("<!-- pictures -->", pictures))
    return [markdown, page]


def results_table(results: Results) -> str:
    """The tables of perf/RESULTS.md: ours beside QEMU's and fio's, with date, machine, command."""
    goals = [[v.target, v.measured, "met" if v.met else "missed"] for v in verdicts(results)]
    return "\n".join(
        [
            _made(results),
            "",
            *_table(_SUMMARY_COLUMNS, _summary(results)),
            "",
            _SUMMARY_NOTE,
            "",
            *_table(["target", "measured", ""], goals),
        ]
    )


def _summary(results: Results) -> Rows:
    """One row for each contest: what a user gets, our best, QEMU's best, fio's."""
    rows: Rows = []
    for target, workload, kind in contests(results):
        samples = counted(samples_of(results, target, workload, kind))
        ours = best_of(samples, is_ours if kind == "save" else _into_qemu)
        delivered = best_of(samples, is_as_delivered if kind == "save" else _into_qemu)
        qemu = best_of(samples, lambda sample: sample.group == "qemu")
        if ours is None or qemu is None:
            continue
        fio = best_of(samples, lambda sample: sample.group == "fio")
        size = format_size(samples[0].memory_bytes)
        rows.append(
            [
                f"{kind}: {workload} {size}, {target}",
                f"{delivered[1]:.2f} s ({qemu[1] / delivered[1]:.1f} x)" if delivered else "",
                f"{ours[1]:.2f} s ({ours[2]:.2f} GB/s; {ours[0].removeprefix('uringmig ')})",
                f"{qemu[1]:.2f} s ({qemu[0].removeprefix('qemu ')})",
                f"{qemu[1] / ours[1]:.1f} x",
                f"{fio[2]:.2f} GB/s" if fio else "",
                f"{ours[3]:.2f} / {qemu[3]:.2f}",
            ]
        )
    return rows


def _into_qemu(sample: Sample) -> bool:
    """Whether a sample is a load into a QEMU: a read into a buffer of ours is not comparable."""
    return sample.rival.startswith("uringmig load")


def _made(results: Results) -> str:
    """Date, command, machine, in one paragraph."""
    common, places = _hosts(results)
    conditions = [_listed(common), *(f"{name}: {_listed(own)}" for name, own in places.items())]
    return (
        f"{results.started}, `{results.command}`, seed {results.seed}, commit {results.commit}; "
        f"{_runs(results)}. {'. '.join(part for part in conditions if part)}."
    )


def _facts(results: Results) -> Rows:
    """The same as rows of a table: what, and its value."""
    common, places = _hosts(results)
    return [
        ["begun", results.started],
        ["command", results.command],
        ["seed", str(results.seed)],
        ["commit", results.commit],
        ["runs", _runs(results)],
        *([key, value] for key, value in common.items()),
        *([name, _listed(own)] for name, own in places.items()),
    ]


def _runs(results: Results) -> str:
    disturbed = sum(bool(sample.disturbed) for sample in results.samples)
    return f"{len(results.samples)} runs, {disturbed} of them disturbed by others"


def _hosts(results: Results) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Conditions that all targets share, and those of each; by their names."""
    hosts = {
        target: {key.removeprefix(PREFIX).replace("_", " "): value for key, value in host.items()}
        for target, host in results.hosts.items()
    }
    first = next(iter(hosts.values()), {})
    common = {
        key: value
        for key, value in first.items()
        if all(host.get(key) == value for host in hosts.values())
    }
    own = {
        target: {key: value for key, value in host.items() if key not in common}
        for target, host in hosts.items()
    }
    return common, own


def _listed(conditions: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def _rows(results: Results, target: str, workload: str, kind: str) -> Rows:
    assert kind in ("save", "load"), kind
    samples = samples_of(results, target, workload, "save" if kind == "save" else "load")
    return [_row(figure) for figure in figures(samples)]


def _row(figure: Figures) -> list[str]:
    return [
        figure.rival,
        str(figure.runs),
        f"{figure.durable_s:.3f}",
        f"{100 * figure.spread:.0f}",
        f"{figure.completed_s:.3f}",
        f"{figure.throughput / 1e9:.2f}",
        "" if figure.ceiling_ratio is None else f"{figure.ceiling_ratio:.2f}",
        "" if figure.qemu_ratio is None else f"{figure.qemu_ratio:.2f}",
        f"{figure.cpu_per_gib:.3f}",
        "?" if figure.cached_bytes is None else format_size(figure.cached_bytes),
        format_size(figure.anonymous_bytes),
        format_size(figure.ram_growth),
        str(figure.disturbed),
    ]


def _markdown(results: Results, sections: Sequence[tuple[str, Rows]], targets: Rows) -> str:
    lines = ["# uringmig beside QEMU and fio", "", _made(results), "", _NOTES, ""]
    lines += ["## Targets", "", *_table(["target", "measured", ""], targets), ""]
    for title, rows in sections:
        lines += [f"## {title}", "", *_table(_COLUMNS, rows), ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Rows) -> list[str]:
    """A Markdown table."""
    return [
        f"| {' | '.join(header)} |",
        f"| {' | '.join('---' for _ in header)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _page(results: Results, sections: Sequence[tuple[str, Rows]], targets: Rows) -> str:
    guests = [
        [workload.name, workload.what]
        for workload in WORKLOADS.values()
        if any(sample.workload == workload.name for sample in results.samples)
    ]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>uringmig beside QEMU and fio</title><style>{_STYLE}</style></head><body>",
        "<h1>uringmig beside QEMU and fio</h1>",
        _html_table(["target", "measured", ""], targets, style="words"),
        _html_table(_SUMMARY_COLUMNS, _summary(results), style="words"),
        f"<p>{html.escape(_SUMMARY_NOTE)}</p>",
        "<h2>Machine and run</h2>",
        _html_table(["what", "value"], _facts(results), style="words facts"),
        "<h2>Guests</h2>",
        _html_table(["guest", "memory"], guests, style="words facts"),
        "<h2>Pictures</h2><!-- pictures --><h2>Tables</h2>",
        f"<p>{html.escape(_NOTES)}</p>",
    ]
    for title, rows in sections:
        parts += [f"<h3>{html.escape(title)}</h3>", _html_table(_COLUMNS, rows)]
    return "".join([*parts, "</body></html>\n"])


def _html_table(header: Sequence[str], rows: Rows, *, style: str = "numbers") -> str:
    """A table; ``words`` are lines that may be wrapped, ``numbers`` scroll if they must."""

    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table class="{style}">{line(header, "th")}{body}</table></div>'
