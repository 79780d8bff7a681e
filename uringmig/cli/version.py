"""What ``--version`` says: ours, liburing's, and the engine that would run here."""

from __future__ import annotations

from uringmig.storage.enginechoice import describe_auto, describe_liburing
from uringmig.version import VERSION


def version_lines() -> list[str]:
    """Describe uringmig, liburing and the engine ``auto`` takes; a fallback with its reason."""
    return [
        f"uringmig {VERSION}",
        f"liburing {describe_liburing()}",
        f"engine {describe_auto()}",
    ]
