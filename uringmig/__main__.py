"""``python -m uringmig`` is the command line, and so is the program `uringmig`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NoReturn

from uringmig.starting import begin


def main() -> NoReturn:
    """Run the command line of this process, and exit.

    Until it has handlers of its own, which takes as long as loading it does, Ctrl-C ends the
    process as any other: Python's handler would show a traceback. Where it is ignored it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    begin(_load)


def _load() -> Callable[[], NoReturn]:
    """Import the command line, which imports everything."""
    from uringmig.cli import main

    return main


if __name__ == "__main__":
    main()
