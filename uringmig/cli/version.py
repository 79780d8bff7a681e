"""What ``--version`` says: ours, liburing's, and the engine that would run here."""

from __future__ import annotations

from importlib import metadata

from uringmig.errors import HostError
from uringmig.storage import liburing
from uringmig.storage.choice import choose_engine


def version_lines() -> list[str]:
    """Describe uringmig, liburing and the engine ``auto`` chooses; a fallback with its reason."""
    try:
        library = liburing.find()
        found = f"{library.version[0]}.{library.version[1]} ({library.path})"
    except HostError as error:
        found = f"none: {error}"
    engine = choose_engine("auto")
    return [
        f"uringmig {metadata.version('uringmig')}",
        f"liburing {found}",
        f"engine {engine.name if engine.note is None else engine.note}",
    ]
