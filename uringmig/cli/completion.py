"""Shell completion: click makes the script; here it is shown, or put where the shell looks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from uringmig.errors import StateError, StorageError

#: Where each shell looks for completions of a user's own, and what has to be told to it besides.
_PLACES: Final = {
    "bash": ("bash-completion/completions/{name}", ""),
    "fish": ("fish/vendor_completions.d/{name}.fish", ""),
    "zsh": ("zsh/site-functions/_{name}", "; zsh finds it if fpath has that folder"),
}


#: What stands for the shell at hand.
_AT_HAND: Final = "$SHELL"


def options(program: str) -> list[click.Option]:
    """``--install-completion`` and ``--show-completion``; each answers and leaves."""

    def show(context: click.Context, _: click.Parameter, shell: str | None) -> None:
        if shell is not None:
            click.echo(_script(context.command, program, _shell(shell)))
            context.exit()

    def install(context: click.Context, _: click.Parameter, shell: str | None) -> None:
        if shell is not None:
            click.echo(_install(context.command, program, _shell(shell)))
            context.exit()

    def option(name: str, callback: Callable[..., None], text: str) -> click.Option:
        return click.Option(
            [name], is_flag=False, flag_value=_AT_HAND, metavar="[SHELL]", expose_value=False,
            is_eager=True, callback=callback, help=f"{text} ({', '.join(_PLACES)}), and exit.",
        )  # fmt: skip

    return [
        option("--install-completion", install, "Install completion for a shell"),
        option("--show-completion", show, "Show completion for a shell"),
    ]


def _shell(name: str) -> str:
    """A shell's name, by what was asked for.

    Raises:
        StateError: it is one that completion cannot be made for.
    """
    shell = Path(os.environ.get("SHELL", "")).name if name == _AT_HAND else name
    if shell not in _PLACES:
        raise StateError(f"no completion for shell {shell!r}; name one of {', '.join(_PLACES)}")
    return shell


def _script(command: click.Command, program: str, shell: str) -> str:
    """What the shell is to read."""
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None, shell
    return made(command, {}, program, f"_{program.upper()}_COMPLETE").source()


def _install(command: click.Command, program: str, shell: str) -> str:
    """Write the script to where the shell looks; returns a line about it."""
    place, further = _PLACES[shell]
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    file = Path(data) / place.format(name=program)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_script(command, program, shell))
    except OSError as error:
        raise StorageError("cannot install completion", errno=error.errno, path=file) from None
    return f"{shell} completion installed in {file}{further}; it holds for new shells"
