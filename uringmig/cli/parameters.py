"""Options that several commands share.  Defaults are those of `uringmig.options`, never ours."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import click

from uringmig.cli.command import Work
from uringmig.cli.session import Session
from uringmig.errors import StateError
from uringmig.options import DirectMode, EngineName, Kind, ReadOptions, WriteOptions
from uringmig.units import format_size, parse_duration, parse_size

WRITE: Final = WriteOptions()
READ: Final = ReadOptions()
#: A path as it was typed: whoever opens it says what is wrong with it, in one line and as storage.
PATH: Final = click.Path(path_type=Path, readable=False)


def size(text: str | int) -> int:
    """A size as text, or a default, as bytes."""
    try:
        return parse_size(str(text))
    except StateError as error:
        raise click.BadParameter(str(error)) from None


def _offset(text: str | int) -> int:
    """An offset, decimal or a size or hexadecimal as in QEMU's messages, as bytes."""
    try:
        return int(text, 16) if isinstance(text, str) and text.startswith("0x") else size(text)
    except ValueError:
        raise click.BadParameter(f"not an offset: {text!r}") from None


def seconds(text: str | float) -> float:
    """A duration as text, or a default, as seconds."""
    try:
        return text if isinstance(text, float) else parse_duration(text)
    except StateError as error:
        raise click.BadParameter(str(error)) from None


def new_file(text: str | Path) -> Path:
    """The name of a file that is to be made, as it was typed.

    A slash at its end, which `Path` would drop, says that a folder is meant.
    """
    if str(text).endswith("/"):
        raise click.BadParameter(f"{text} is the name of a folder; name a file")
    return Path(text)


def _archive(text: str | Path) -> Path:
    """An archive's directory, or the one that a job file fills."""
    path = Path(text)
    if not os.path.isfile(path):
        return path
    from uringmig.cli.jobfile import archive_of

    return archive_of(path)


def image_file() -> click.Argument:
    """The image that is read."""
    return click.Argument(["file"], type=PATH, help="The image.")


def qmp_socket(*, required: bool = True) -> click.Option:
    """Where QEMU is spoken to."""
    of = (
        "QEMU's QMP unix socket."
        if required
        else "QMP socket of a QEMU that waits (-incoming defer)."
    )
    return click.Option(["--qmp"], type=PATH, metavar="SOCKET", required=required, help=of)


def offset(*, default: int | None = 0) -> click.Option:
    """Where an image is in its file; None: where the file itself says."""
    return click.Option(
        ["--offset"], type=_offset, default=default, metavar="BYTES",
        help="Where the image begins in the file.",
    )  # fmt: skip


def then_after_load() -> click.Option:
    """What becomes of a guest that was loaded."""
    return click.Option(
        ["--then"], type=click.Choice(["cont", "leave"]), default="leave",
        help="Afterwards let the guest run, or leave it as QEMU has it.",
    )  # fmt: skip


def out_file(*, required: bool = True) -> click.Argument:
    """The file that is made; a symbolic link is followed."""
    return click.Argument(
        ["out"], type=new_file, required=required,
        help="The file's final name; a symbolic link is followed.",
    )  # fmt: skip


def metrics_file() -> click.Option:
    """Where Prometheus reads."""
    return click.Option(
        ["--metrics-file"], type=new_file, metavar="FILE", help="Keep Prometheus metrics here."
    )


def archive_folder() -> click.Argument:
    """The archive."""
    return click.Argument(
        ["archive"], type=_archive, metavar="ARCHIVE",
        help="The archive's directory, or a job file that fills it.",
    )  # fmt: skip


def entry_name() -> click.Argument:
    """One entry of the archive."""
    return click.Argument(["name"], help="The entry's name.")


def only_vm() -> click.Option:
    """Which entries."""
    return click.Option(["--vm"], metavar="VM", show_default="all", help="Only entries of this VM.")


def profile() -> tuple[click.Option, click.Option]:
    """What `bench` found out."""
    return (
        click.Option(
            ["--profile"], is_flag=True,
            help="Use what `bench` found out about the place; options given here go before it.",
        ),
        click.Option(
            ["--profile-file"], type=PATH, metavar="FILE", show_default="where bench writes",
            help="As --profile, from this file.",
        ),
    )  # fmt: skip


def engine() -> click.Option:
    """How requests reach the kernel."""
    return click.Option(
        ["--engine"], type=click.Choice(get_args(EngineName)), default=READ.engine,
        help="How requests reach the kernel; auto takes io_uring.",
    )  # fmt: skip


def direct() -> click.Option:
    """Past the page cache or not."""
    return click.Option(
        ["--direct"], type=click.Choice(get_args(DirectMode)), default=READ.direct,
        help="O_DIRECT for the pages.",
    )  # fmt: skip


#: Every option of a transfer: declared here, and made into options by `takes_options`, only.
_TRANSFER: Final = ("channels", "depth", "block_size", "engine", "direct", "rate")


def transfer() -> tuple[click.Option, ...]:
    """Every option of a transfer, for a command whose work `takes_options`."""
    return (
        click.Option(
            ["--channels"], type=int, default=READ.channels,
            help="Multifd channels: threads, each with its own engine.",
        ),
        click.Option(
            ["--depth"], type=int, default=READ.depth, help="Requests each channel keeps in flight."
        ),
        click.Option(
            ["--block-size"], type=size, metavar="SIZE", default=READ.block_size,
            show_default=format_size(READ.block_size), help="Largest request.",
        ),
        engine(),
        direct(),
        click.Option(
            ["--rate"], type=size, metavar="SIZE", default=READ.rate, show_default="none",
            help="Limit in bytes per second over all channels.",
        ),
    )  # fmt: skip


def takes_options(kind: type[Kind]) -> Callable[[Work], Work]:
    """Have a command's work get the options of a transfer as one parameter, ``options``.

    They are made when the output is set up, so that a refusal is told as the command was asked to.

    Args:
        kind: what ``options`` is.
    """

    def decorate(work: Work) -> Work:
        @functools.wraps(work)
        def with_options(session: Session, **named: Any) -> int:
            given = {name: named.pop(name) for name in _TRANSFER}
            return work(session, options=kind(**given), **named)

        return with_options

    return decorate
