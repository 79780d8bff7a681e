"""The command line of the harness.

The machine should be quiet. As root the page cache is dropped before every contest, and the target
``xfs-loop`` can be mounted. A usual sequence:

    python -m perf run --full --out OUT         # on the disk that --folder is on
    python -m perf report OUT                   # OUT/report.html and OUT/report.md
    python -m perf table OUT                    # the README's table
    python -m perf model OUT --into perf/MODEL.md
    python -m perf compare BEFORE/pyperf.json AFTER/pyperf.json
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, NoReturn

import typer

from perf.compare import compare
from perf.model import describe
from perf.programme import TARGETS, choose
from perf.report import readme_table, write_report
from perf.results import load
from perf.rivals import ROOT
from perf.session import SETTLE_S, Session
from perf.workloads import WORKLOADS
from uringmig.errors import UringmigError
from uringmig.units import parse_size

#: The last heading of MODEL.md; what follows is made here.
MEASURED: Final = "## Measured"

app: Final = typer.Typer(
    name="python -m perf",
    # \b keeps click from filling the lines of the example.
    help=(__doc__ or "").replace("sequence:\n\n", "sequence:\n\n\b\n"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


@app.command()
def run(
    quick: Annotated[bool, typer.Option("--quick", help="Under five minutes (default).")] = False,
    full: Annotated[bool, typer.Option("--full", help="Under forty minutes.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of orders and bytes; drawn and printed if not given.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where images are made.")] = ROOT / ".cache" / "perf",
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("perf-out"),
    targets: Annotated[str, typer.Option(help=f"Of {', '.join(TARGETS)}.")] = "",
    workloads: Annotated[str, typer.Option(help=f"Of {', '.join(WORKLOADS)}.")] = "",
    rivals: Annotated[
        str, typer.Option(help="Patterns of names, such as 'uringmig*,qemu*x2 direct'.")
    ] = "",
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of every contest.")] = None,
    memory: Annotated[str | None, typer.Option(help="Size of every guest, such as 64M.")] = None,
    repeat_disturbed: Annotated[
        int, typer.Option(min=0, help="How often a disturbed run is tried again.")
    ] = 0,
    settle: Annotated[
        float, typer.Option(min=0, help="Longest wait for idle processors before a run, seconds.")
    ] = SETTLE_S,
) -> None:
    """Measure, and write OUT/samples.json and OUT/pyperf.json."""
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    contests = choose(
        "full" if full else "quick",
        targets=_words(targets),
        workloads=_words(workloads),
        rivals=_words(rivals),
        rounds=rounds,
        memory_bytes=None if memory is None else parse_size(memory),
    )
    session = Session(
        folder=folder,
        out=out,
        seed=random.SystemRandom().randrange(1 << 32) if seed is None else seed,
        repeat_disturbed=repeat_disturbed,
        say=typer.echo,
        settle_s=settle,
    )
    session.run(contests)
    typer.echo(f"results in {out}; now: python -m perf report {out}")


@app.command()
def report(out: Annotated[Path, typer.Argument(help="As given to run.")]) -> None:
    """Write OUT/report.md and OUT/report.html: tables, targets, pictures."""
    for path in write_report(load(out), out):
        typer.echo(path)


@app.command()
def table(out: Annotated[Path, typer.Argument(help="As given to run.")]) -> None:
    """Print the README's table (Markdown) with date, machine and command."""
    typer.echo(readme_table(load(out)))


@app.command()
def model(
    out: Annotated[Path, typer.Argument(help="As given to run.")],
    into: Annotated[
        Path | None, typer.Option(help="Put it into this file, instead of all after '## Measured'.")
    ] = None,
) -> None:
    """Print the cost model beside what was measured (Markdown); see perf/MODEL.md."""
    text = describe(load(out))
    if into is None:
        typer.echo(text)
    else:
        head = into.read_text().partition(f"{MEASURED}\n")[0]
        into.write_text(f"{head}{MEASURED}\n{text}\n")


@app.command("compare")
def compare_command(first: Path, second: Path) -> None:
    """Compare two pyperf.json; refused if machine, disk, settings or guests differ."""
    for line in compare(first, second):
        typer.echo(line)


def _on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Leave as from an error, so that everything is taken away again."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run a command; an error is one line and its exit code."""
    signal.signal(signal.SIGTERM, _on_signal)
    try:
        app()
    except UringmigError as error:
        typer.echo(f"perf: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
