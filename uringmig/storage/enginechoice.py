"""Which engine runs: what was asked for, what this host can, and a word where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from uringmig.errors import HostError
from uringmig.options import EngineName
from uringmig.storage import liburing

if TYPE_CHECKING:
    from uringmig.storage.engine import EngineFactory


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and how it came to be chosen.

    Attributes:
        name: ``io_uring``, ``pwrite``, or a caller's own.
        factory: makes one engine in the calling thread.
        note: one line if ``auto`` had to fall back, else None.
    """

    name: str
    factory: EngineFactory
    note: str | None = None


def choose_engine(name: EngineName) -> EngineChoice:
    """Settle on an engine; ``auto`` takes io_uring wherever it works.

    Raises:
        HostError: ``io_uring`` was asked for and cannot be had; with the cause and the cure.
    """
    # Engines import numpy, which takes long; who only asks which one would run does without.
    from uringmig.storage.pwrite import PwriteEngine

    if name == "pwrite":
        return EngineChoice("pwrite", PwriteEngine)
    try:
        liburing.load()
    except HostError as error:
        if name == "io_uring":
            raise
        return EngineChoice("pwrite", PwriteEngine, _fallback(error))
    from uringmig.storage.ring import RingEngine

    return EngineChoice("io_uring", RingEngine)


def describe_auto() -> str:
    """Name the engine ``auto`` takes here, with the reason if it has to fall back; one line."""
    try:
        liburing.load()
    except HostError as error:
        return _fallback(error)
    return "io_uring"


def describe_liburing() -> str:
    """Version and path of the liburing that would be used, or why there is none; one line."""
    try:
        library = liburing.find()
    except HostError as error:
        return f"none: {error}"
    return f"{library.version[0]}.{library.version[1]} ({library.path})"


def _fallback(error: HostError) -> str:
    return f"using pwrite: {error}"
