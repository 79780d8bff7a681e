"""``--profile``: what `bench` found out about a place, between the defaults and what was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeVar

import click

from uringmig.bench.profile import default_file, settings_for
from uringmig.cli.output import Output
from uringmig.errors import StorageError
from uringmig.options import TransferOptions

Options = TypeVar("Options", bound=TransferOptions)

#: Click's word for a value that came from the default; everything else was asked for.
_DEFAULT: Final = "DEFAULT"


def file_of_profiles(file: Path | None) -> Path:
    """The profile file to read: the one that was named, else where `bench` writes.

    Raises:
        StorageError: the named file is not there, or cannot be looked at.
    """
    if file is None:
        return default_file()
    try:
        file.stat()
    except FileNotFoundError:
        cure = "`uringmig bench` writes one"
        raise StorageError("no such profile file", path=file, cure=cure) from None
    except OSError as error:
        raise StorageError("cannot read", errno=error.errno, path=file) from None
    return file


def tuned(output: Output, options: Options, *, where: Path, file: Path | None) -> Options:
    """Apply the profile of the place an image goes to; used within a command.

    What was asked for goes before it: the command's parameters are called as the options are.

    Args:
        output: for a note if there is nothing to apply.
        options: as made of the command line and the defaults.
        where: the image's name.
        file: the profile file; None is the default one.

    Raises:
        FormatError: the profile file is malformed.
        StorageError: it, or the folder, cannot be looked at; or the named file is not there.
    """
    file = file_of_profiles(file)
    context = click.get_current_context()
    settings = settings_for(where, file)
    if settings is None:
        output.note(
            f"{file} has no profile of the place of {where}; the defaults are used "
            f"(`uringmig bench {where.parent}` makes one)"
        )
        return options
    return settings.apply_to(
        options,
        explicit={
            name
            for name in context.params
            if (source := context.get_parameter_source(name)) and source.name != _DEFAULT
        },
    )
