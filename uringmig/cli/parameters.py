"""Options that several commands share.  Defaults are those of `uringmig.options`, never ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from uringmig.cli.jobfile import archive_of
from uringmig.cli.session import session_of
from uringmig.errors import StateError
from uringmig.options import DirectMode, EngineName, Kind, ReadOptions, WriteOptions
from uringmig.units import format_size, parse_duration, parse_size

WRITE: Final = WriteOptions()
READ: Final = ReadOptions()


def size(text: str | int) -> int:
    """A size as text, or a default, as bytes."""
    try:
        return parse_size(str(text))
    except StateError as error:
        raise typer.BadParameter(str(error)) from None


def _offset(text: str | int) -> int:
    """An offset, decimal or a size or hexadecimal as in QEMU's messages, as bytes."""
    try:
        return int(text, 16) if isinstance(text, str) and text.startswith("0x") else size(text)
    except ValueError:
        raise typer.BadParameter(f"not an offset: {text!r}") from None


def seconds(text: str | float) -> float:
    """A duration as text, or a default, as seconds."""
    try:
        return text if isinstance(text, float) else parse_duration(text)
    except StateError as error:
        raise typer.BadParameter(str(error)) from None


def new_file(text: str | Path) -> Path:
    """The name of a file that is to be made, as it was typed.

    A slash at its end, which `Path` would drop, says that a folder is meant.
    """
    if str(text).endswith("/"):
        raise typer.BadParameter(f"{text} is the name of a folder; name a file")
    return Path(text)


ImageFile = Annotated[Path, typer.Argument(help="The image.", show_default=False)]
QmpSocket = Annotated[
    Path,
    typer.Option("--qmp", metavar="SOCKET", help="QEMU's QMP unix socket.", show_default=False),
]
Offset = Annotated[
    int,
    typer.Option(
        "--offset", parser=_offset, metavar="BYTES", help="Where the image begins in the file."
    ),
]
Channels = Annotated[
    int, typer.Option("--channels", help="Multifd channels: threads, each with its own engine.")
]
Depth = Annotated[int, typer.Option("--depth", help="Requests each channel keeps in flight.")]
BlockSize = Annotated[
    int,
    typer.Option(
        "--block-size",
        parser=size,
        metavar="SIZE",
        help="Largest request.",
        show_default=format_size(WRITE.block_size),
    ),
]
Engine = Annotated[
    EngineName, typer.Option("--engine", help="How requests reach the kernel; auto takes io_uring.")
]
Direct = Annotated[DirectMode, typer.Option("--direct", help="O_DIRECT for the pages.")]
Rate = Annotated[
    int,
    typer.Option(
        "--rate",
        parser=size,
        metavar="SIZE",
        help="Limit in bytes per second over all channels.",
        show_default="none",
    ),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Use what `bench` found out about the place; options given here go before it.",
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile-file",
        metavar="FILE",
        help="As --profile, from this file.",
        show_default="where bench writes",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no result; notes and errors remain.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More of what was measured.")]
ArchiveFolder = Annotated[
    Path,
    typer.Argument(
        parser=archive_of,
        metavar="ARCHIVE",
        help="The archive's directory, or a job file that fills it.",
        show_default=False,
    ),
]
EntryName = Annotated[str, typer.Argument(help="The entry's name.", show_default=False)]
OnlyVm = Annotated[
    str | None,
    typer.Option("--vm", metavar="VM", help="Only entries of this VM.", show_default="all"),
]
#: Use as ``Annotated[Path, OutFile]``, or with a None.
OutFile: Final = typer.Argument(
    parser=new_file,
    metavar="OUT",
    help="The file's final name; a symbolic link is followed.",
    show_default=False,
)
MetricsFile = Annotated[
    Path | None,
    typer.Option(
        "--metrics-file", parser=new_file, metavar="FILE", help="Keep Prometheus metrics here."
    ),
]

#: Every option of a transfer: declared here, and made into options by `takes_options`, only.
_TRANSFER: Final[dict[str, Any]] = {
    "channels": Channels,
    "depth": Depth,
    "block_size": BlockSize,
    "engine": Engine,
    "direct": Direct,
    "rate": Rate,
}
#: What every such command has besides.
_OUTPUT: Final = ("json", "quiet", "verbose")


def takes_options(kind: type[Kind]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every option of a transfer; it gets them as one parameter, ``options``.

    Output is set up before they are made, so that a refusal is told as the command was asked to.

    Args:
        kind: what ``options`` is.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**named: Any) -> None:
            given = {name: named.pop(name) for name in _TRANSFER}
            session_of(named["context"], **{name: named[name] for name in _OUTPUT})
            command(options=kind(**given), **named)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name != "options":
                parameters.append(parameter)
                continue
            parameters += [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=getattr(kind(), name),
                    annotation=annotation,
                )
                for name, annotation in _TRANSFER.items()
            ]
        # What Typer looks at.
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return wrapper

    return decorate
