"""How a command is made of its function, and a group of commands that are loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

import click

from uringmig.cli.session import Session

#: What every command says how to say; `Session` is made of them.
_OUTPUT: Final = {
    "json": click.Option(["--json"], is_flag=True, help="JSON lines on standard output."),
    "quiet": click.Option(
        ["--quiet", "-q"], is_flag=True, help="No progress and no result; notes and errors remain."
    ),
    "verbose": click.Option(["--verbose", "-v"], is_flag=True, help="More of what was measured."),
}

#: What a command does; gets its session and, by name, its parameters, and returns its exit code.
Work = Callable[..., int]


def command(
    *parameters: click.Parameter, name: str | None = None, verbose: bool = True
) -> Callable[[Work], click.Command]:
    """Make a command of the function that does its work; its help is the function's docstring.

    Args:
        parameters: its own, in the order of the help.
        name: if it is not the function's.
        verbose: whether ``--verbose`` is one of its options.
    """
    output = [option for key, option in _OUTPUT.items() if verbose or key != "verbose"]

    def make(work: Work) -> click.Command:
        @click.pass_context
        def callback(context: click.Context, /, *, json: bool, quiet: bool, **named: Any) -> None:
            more = verbose and named.pop("verbose")
            session = context.ensure_object(Session)
            session.output.set_up(json=json, quiet=quiet, verbose=more)
            context.exit(work(session, **named))

        return _Command(
            name or work.__name__,
            params=[*parameters, *output],
            callback=callback,
            help=work.__doc__,
        )

    return make


class _Command(click.Command):
    """A command whose usage line names every option that must be given, too."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """The pieces of the line: what may be left out is in brackets, and nothing else is."""
        options, *arguments = super().collect_usage_pieces(ctx)
        required = [
            f"{param.opts[0]} {param.make_metavar(ctx)}"
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and param.required
        ]
        return [options, *required, *arguments]


class LazyGroup(click.Group):
    """Commands by the place they are at; only the one that is asked for is loaded.

    Args:
        places: of each command by its name: module and, after a colon, the command in it.
    """

    def __init__(self, *arguments: Any, places: Mapping[str, str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in the order of the help."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        place = self._places.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        found = getattr(import_module(module), attribute)
        assert isinstance(found, click.Command), place
        return found
