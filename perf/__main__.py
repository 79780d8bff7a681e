"""The command line of the harness.

The machine should be quiet. As root the page cache is dropped before every contest, and the target
``xfs-loop`` can be mounted. A usual sequence:

    python -m perf run --full --out OUT         # on the disk that --folder is on
    python -m perf report OUT                   # OUT/report.html and OUT/report.md
    python -m perf table OUT                    # the tables of RESULTS.md
    python -m perf model OUT --into perf/MODEL.md
    python -m perf compare BEFORE/pyperf.json AFTER/pyperf.json
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import click

from perf.compare import compare
from perf.model import describe
from perf.programme import TARGETS, choose
from perf.report import results_table, write_report
from perf.results import load
from perf.rivals import ROOT
from perf.session import SETTLE_S, Session
from perf.workloads import WORKLOADS
from uringmig.errors import UringmigError
from uringmig.units import parse_size

#: The last heading of MODEL.md; what follows is made here.
MEASURED: Final = "## Measured"


# \b keeps click from filling the lines of the example.
@click.group(help=(__doc__ or "").replace("sequence:\n\n", "sequence:\n\n\b\n"))
def app() -> None:
    """Hold the commands."""


_out = click.argument("out", type=click.Path(path_type=Path))


def _words(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


@app.command()
@click.option("--quick", is_flag=True, help="Under five minutes (default).")
@click.option("--full", is_flag=True, help="Under forty minutes.")
@click.option("--seed", type=int, help="Of orders and bytes; drawn and printed if not given.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=ROOT / ".cache" / "perf",
    show_default=True,
    help="Where images are made.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("perf-out"),
    show_default=True,
    help="Where results go.",
)
@click.option("--targets", callback=_words, default="", help=f"Of {', '.join(TARGETS)}.")
@click.option("--workloads", callback=_words, default="", help=f"Of {', '.join(WORKLOADS)}.")
@click.option(
    "--rivals",
    callback=_words,
    default="",
    help="Patterns of names, such as 'uringmig*,qemu*x2 direct'.",
)
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of every contest.")
@click.option("--memory", help="Size of every guest, such as 64M.")
@click.option(
    "--repeat-disturbed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How often a disturbed run is tried again.",
)
@click.option(
    "--settle",
    type=click.FloatRange(min=0),
    default=SETTLE_S,
    show_default=True,
    help="Longest wait for idle processors before a run, seconds.",
)
def run(
    *,
    quick: bool,
    full: bool,
    seed: int | None,
    folder: Path,
    out: Path,
    targets: list[str],
    workloads: list[str],
    rivals: list[str],
    rounds: int | None,
    memory: str | None,
    repeat_disturbed: int,
    settle: float,
) -> None:
    """Measure, and write OUT/samples.json and OUT/pyperf.json."""
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other")
    contests = choose(
        "full" if full else "quick",
        targets=targets,
        workloads=workloads,
        rivals=rivals,
        rounds=rounds,
        memory_bytes=None if memory is None else parse_size(memory),
    )
    session = Session(
        folder=folder,
        out=out,
        seed=random.SystemRandom().randrange(1 << 32) if seed is None else seed,
        repeat_disturbed=repeat_disturbed,
        say=click.echo,
        settle_s=settle,
    )
    # Whoever asks for some of the contests wants those alone.
    session.run(contests, startup=not (targets or workloads or rivals))
    click.echo(f"results in {out}; now: python -m perf report {out}")


@app.command()
@_out
def report(out: Path) -> None:
    """Write OUT/report.html and OUT/report.md: tables, targets, pictures."""
    for path in write_report(load(out), out):
        click.echo(path)


@app.command()
@_out
def table(out: Path) -> None:
    """Print the tables of perf/RESULTS.md (Markdown) with date, machine and command."""
    click.echo(results_table(load(out)))


@app.command()
@_out
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    help="Put it into this file, instead of all after '## Measured'.",
)
def model(out: Path, into: Path | None) -> None:
    """Print the cost model beside what was measured (Markdown); see perf/MODEL.md."""
    text = describe(load(out))
    if into is None:
        click.echo(text)
    else:
        head = into.read_text().partition(f"{MEASURED}\n")[0]
        into.write_text(f"{head}{MEASURED}\n{text}\n")


@app.command("compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def compare_command(first: Path, second: Path) -> None:
    """Compare two pyperf.json; refused if machine, disk, settings or guests differ."""
    for line in compare(first, second):
        click.echo(line)


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Leave as from an error, so that everything is taken away again."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run a command; an error is one line and its exit code."""
    signal.signal(signal.SIGTERM, _on_signal)
    try:
        app(prog_name="python -m perf")
    except UringmigError as error:
        click.echo(f"perf: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
