"""What ``--version`` says: ours, liburing's, and the engine that would run here."""

from __future__ import annotations

from importlib import metadata

from uringmig.storage.choice import choose_engine, describe_liburing


def version_lines() -> list[str]:
    """Describe uringmig, liburing and the engine ``auto`` chooses; a fallback with its reason."""
    engine = choose_engine("auto")
    return [
        f"uringmig {metadata.version('uringmig')}",
        f"liburing {describe_liburing()}",
        f"engine {engine.name if engine.note is None else engine.note}",
    ]
