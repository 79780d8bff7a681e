"""What `uringmig bench` found out about a device and its file system, kept for later saves.

A profile file is JSON, written atomically and durably, one entry for each place; a place is known
by the device's identity (by-id link or serial number; else its number and model) and by the kind
of the file system. What the operator asks for outright wins over the profile, the profile over the
defaults.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from uringmig.errors import FormatError, StateError, StorageError
from uringmig.options import (
    CHANNELS_MAX,
    DEPTH_MAX,
    PAGE_SIZE,
    WINDOW_BYTES,
    DirectMode,
    EngineName,
    TransferOptions,
)
from uringmig.storage.devices import Place, place_of
from uringmig.storage.smallfile import replacing
from uringmig.units import MiB

FORMAT: Final = "uringmig-profiles"
VERSION: Final = 1
#: A thousand places are a quarter of this: no honest profile file is larger.
BYTES_MAX: Final = MiB

Options = TypeVar("Options", bound=TransferOptions)


class ProfileSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to use in place of the defaults; as in `TransferOptions`, sizes in bytes."""

    channels: Annotated[int, Meta(ge=1, le=CHANNELS_MAX)]
    depth: Annotated[int, Meta(ge=1, le=DEPTH_MAX)]
    block_size: Annotated[int, Meta(ge=PAGE_SIZE, le=WINDOW_BYTES, multiple_of=PAGE_SIZE)]
    bridge: Annotated[int, Meta(ge=0, le=WINDOW_BYTES)]
    engine: EngineName
    direct: DirectMode

    def __post_init__(self) -> None:
        """Refuse what `TransferOptions` would; msgspec adds where in the file it stands."""
        if self.bridge > self.block_size:
            raise ValueError(f"bridge {self.bridge} is more than block_size {self.block_size}")

    def apply_to(self, options: Options, *, explicit: Container[str] = ()) -> Options:
        """Take the settings over into ``options``, except for those the operator gave.

        Args:
            options: defaults, and what was given.
            explicit: names of the options that were given.
        """
        changes: dict[str, Any] = {
            name: getattr(self, name) for name in self.__struct_fields__ if name not in explicit
        }
        return replace(options, **changes)


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The figures behind the settings: bytes a second until durable, and seconds.

    ``spread`` is the interquartile range as a share of ``rate``'s median.
    """

    ceiling: float
    rate: float
    spread: float
    request_seconds: float


class ProfileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place, what it is to be used with, and since when that is known."""

    place: Place
    created: str
    settings: ProfileSettings
    measured: Measured


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole profile file."""

    format: str = FORMAT
    version: int = VERSION
    profiles: list[ProfileEntry] = []


def default_file() -> Path:
    """Where profiles are kept unless told otherwise (XDG base directory specification).

    Raises:
        StateError: this user has no home.
    """
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    # The specification: a path that is not absolute is to be ignored.
    if not home.is_absolute():
        try:
            home = Path.home() / ".config"
        except RuntimeError:
            raise StateError("HOME is not set; name the profile file") from None
    return home / "uringmig" / "profiles.json"


def read_entries(file: Path) -> list[ProfileEntry]:
    """Read a profile file; one that does not exist has no entries.

    Raises:
        FormatError: it is not a profile file; names the field.
        StorageError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(BYTES_MAX + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError("cannot read", errno=error.errno, path=file) from None
    if len(data) > BYTES_MAX:
        raise FormatError(f"profile {file}: longer than {BYTES_MAX} bytes")
    try:
        content = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"profile {file}: {error}") from None
    for name, expected in (("format", FORMAT), ("version", VERSION)):
        found = getattr(content, name)
        if found != expected:
            raise FormatError(f"profile {file}: {name}", expected=expected, found=found)
    return content.profiles


def settings_for(path: str | os.PathLike[str], file: Path) -> ProfileSettings | None:
    """Find the settings for images written to ``path``, or None if that place was not measured.

    Args:
        path: an image's name, which need not exist, or a folder.
        file: the profile file.

    Raises:
        FormatError: the profile file is malformed.
        StorageError: it, or the place, cannot be looked at.
    """
    entries = read_entries(file)
    if not entries:
        return None
    where = Path(path)
    place = place_of(os.fspath(where if os.path.isdir(where) else where.absolute().parent))
    return next((entry.settings for entry in entries if entry.place.matches(place)), None)


def store_entry(entry: ProfileEntry, file: Path) -> None:
    """Put an entry into a profile file, in place of the former one of the same place.

    Raises:
        FormatError: the file is there and malformed; it is left as it is.
        StorageError: it cannot be written; it holds its former content.
    """
    _make_folder(file)
    with replacing(file) as publication:
        # Read only now: whoever holds the partial file is the only writer.
        others = [other for other in read_entries(file) if not other.place.matches(entry.place)]
        content = _File(profiles=[*others, entry])
        data = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
        publication.main.write_at(0, data)
        publication.main.sync()
        publication.publish(None)


def check_writable(file: Path) -> None:
    """Refuse a profile file that could not be replaced, before half a minute goes into it.

    Raises:
        FormatError: what is there is no profile file.
        StateError: the name is a folder's.
        StorageError: it cannot be read, or nothing can be written there.
    """
    if os.path.isdir(file):
        raise StateError(f"{file}: is a folder; name a file for the profile")
    _make_folder(file)
    with replacing(file):
        read_entries(file)


def _make_folder(file: Path) -> None:
    """Make the folder of a profile file where there is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError("cannot make the folder", errno=error.errno, path=file.parent) from None
