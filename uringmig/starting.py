"""How each process of ours begins: what must be so before numpy and all the rest are loaded.

A process that may not have even the threads or the memory that its libraries ask for when they are
loaded says so in one line, too.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from uringmig import stdio
from uringmig.errors import explained

#: Threads that numpy's linear algebra would start when it is loaded; nothing here ever uses them.
_UNUSED_THREADS: Final = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
#: New objects between two looks for garbage in circles, of which there is next to none here. While
#: modules load, Python's 700 would have all that was loaded before looked at again and again.
_GARBAGE_THRESHOLD: Final = 20_000


def begin(load: Callable[[], Callable[[], NoReturn]]) -> NoReturn:
    """Make this process ready, load its program and run it.

    Args:
        load: imports the program, and returns what runs it.
    """
    stdio.prepare()
    gc.set_threshold(_GARBAGE_THRESHOLD)
    for name in _UNUSED_THREADS:
        os.environ.setdefault(name, "1")
    try:
        program = load()
        program()
    except Exception as error:
        reason = explained(error)
        if reason is None:
            raise
        sys.stderr.write(f"uringmig: process {os.getpid()}: {reason}\n")
        sys.exit(reason.exit_code)
    finally:
        # What is left goes with the process: to look through every module for what could be freed
        # takes Python 20 ms of processor time once numpy is loaded.
        gc.freeze()
