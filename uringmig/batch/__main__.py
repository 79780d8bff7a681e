"""A worker process: ``python -m uringmig.batch FD``; see `uringmig.batch.worker`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from uringmig.starting import begin


def _load() -> Callable[[], NoReturn]:
    """Import the worker, which imports all that an order may need."""
    from uringmig.batch.worker import main

    return main


if __name__ == "__main__":
    begin(_load)
