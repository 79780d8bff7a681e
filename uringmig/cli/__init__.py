"""The command line `uringmig`, and where its errors and signals end: as exit codes, here only.

    0 done, 1 done with warnings, 2 usage, 3 the bytes are wrong, 4 the peer failed, 5 storage,
    6 this host cannot, 70 a bug of ours, 128+N on a signal

A traceback therefore means a bug of ours.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from uringmig import stdio
from uringmig.cli import completion
from uringmig.cli.command import LazyGroup
from uringmig.cli.output import Output
from uringmig.cli.session import Session
from uringmig.errors import BUG_EXIT_CODE, UringmigError, explained
from uringmig.signals import SIGNAL_EXIT_CODE, Interrupted, Signals

#: Also under ``python -m uringmig``: the name that usage lines and shell completion go by.
PROGRAM: Final = "uringmig"


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Answer ``--version`` and leave."""
    if wanted:
        from uringmig.cli.version import version_lines

        context.ensure_object(Session).output.lines(version_lines())
        context.exit()


app: Final = LazyGroup(
    PROGRAM,
    help="Put a virtual machine's memory on disk at the speed of the disk, in a file stock QEMU "
    "loads.",
    context_settings={"show_default": True, "max_content_width": 120},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Show versions and the engine that would run here, and exit.",
        ),
        *completion.options(PROGRAM),
    ],
    # Loading all of them takes half a second, and one is wanted.
    places={
        "save": "uringmig.cli.save:save",
        "load": "uringmig.cli.load:load",
        "repair": "uringmig.cli.repair:repair",
        "inspect": "uringmig.cli.inspect:inspect",
        "verify": "uringmig.cli.verify:verify",
        "convert": "uringmig.cli.convert:convert",
        "diff": "uringmig.cli.diff:diff",
        "bench": "uringmig.cli.bench:bench",
        "archive": "uringmig.cli.archive:app",
    },
)


def main() -> NoReturn:
    """Run the command line of this process, and exit."""
    stdio.prepare()
    output = Output()
    with Signals(output.restore_terminal) as signals:
        exit_code = run(sys.argv[1:], Session(output, signals))
        signals.settle()
    sys.exit(exit_code)


def run(arguments: Sequence[str], session: Session) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: without the program's name.
        session: its output, and the signals in force.
    """
    output = session.output
    try:
        app(args=list(arguments), prog_name=PROGRAM, obj=session)
        exit_code = 0
    except SystemExit as ended:
        exit_code = ended.code if isinstance(ended.code, int) else 0
    except Interrupted as interrupted:
        exit_code = SIGNAL_EXIT_CODE + interrupted.number
        output.error(str(interrupted), kind="Interrupted", exit_code=exit_code)
    except UringmigError as error:
        exit_code = error.exit_code
        output.failed(error)
    except Exception as error:
        exit_code = _unexpected(error, output)
    finally:
        output.close()
    return output.settled(exit_code)


def _unexpected(error: Exception, output: Output) -> int:
    """Tell of an error that no command expects: a limit of this process, or a bug of ours."""
    reason = explained(error)
    if reason is not None:
        output.failed(reason)
        return reason.exit_code
    # Python's own exit code would be 1, which says here that all is done.
    traceback.print_exception(error)
    text = f"this is a bug of uringmig: {error!r}"
    output.error(text, kind=type(error).__name__, exit_code=BUG_EXIT_CODE)
    return BUG_EXIT_CODE
