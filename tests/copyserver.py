"""A process that copies images into a tier in children of its own, which can be killed at will.

Run as a script it reads one order a line, forks, and lets the child carry it out: much quicker than
a new interpreter for each, and it has no threads of its own that a fork could lose.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Calls of the operating system that writing and publishing make; each is a place to die at.
CALLS = (
    "open", "ftruncate", "pwrite", "pwritev", "fdatasync", "fsync", "rename", "unlink", "fchmod",
)  # fmt: skip


class CopyServer:
    """Starts copies in processes of their own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> CopyServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def start(self, **order: Any) -> int:
        """Begin a copy: tier, source, out, journal; and step (die before that call) or rate.

        Steps are counted from the first call named ``since``, if that is given. Also ``previous``
        and ``dense_up_to`` of `write_hot` and its options.
        """
        self._say(order)
        return int(self._hear())

    def end(self) -> int:
        """Wait for the copy; its exit code, or less the signal's number."""
        return int(self._hear())

    def _say(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def _die_at(step: int, since: str | None) -> None:
    """Make the process kill itself before its step-th call, counted from the first of a kind on.

    How many calls the channels make before they have drained differs from run to run; from the
    first ``rename`` on the calls are the same in each.
    """
    lock = threading.Lock()
    made = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            nonlocal made
            with lock:
                made += bool(made) or since in (None, call.__name__)
                if made == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)

        return wrapped

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def _copy(order: dict[str, Any]) -> None:
    from smallguests import OPTIONS, PWRITE, RING

    from uringmig import WriteOptions
    from uringmig.archive import copyrun
    from uringmig.archive.cold import write_cold
    from uringmig.archive.hot import write_hot
    from uringmig.contents.mappedram import MappedRamContents
    from uringmig.transfer import channel

    # Small guests are copied before there would be a single checkpoint.
    copyrun.CHECKPOINT_BYTES = 1 << 20  # type: ignore[misc]
    channel._INTERVAL_SECONDS = 0.001  # type: ignore[misc]
    options = WriteOptions(
        channels=OPTIONS.channels,
        depth=OPTIONS.depth,
        block_size=1 << 20 if order.get("step") else OPTIONS.block_size,
        dense_up_to=order.get("dense_up_to", OPTIONS.dense_up_to),
        rate=order.get("rate", 0),
    )
    engine = RING if order.get("rate") else PWRITE
    with MappedRamContents(order["source"]) as contents:
        if order.get("step"):
            _die_at(order["step"], order.get("since"))
        out, journal = Path(order["out"]), Path(order["journal"])
        if order["tier"] == "cold":
            write_cold(contents, out, options=options, resume=journal, engine=engine)
            return
        previous = Path(order["previous"]) if "previous" in order else None
        write_hot(contents, out, options=options, resume=journal, previous=previous, engine=engine)


def _serve() -> None:
    import uringmig.archive.cold
    import uringmig.archive.hot  # noqa: F401 - so that no child has to

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _copy(json.loads(line))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        status = os.waitpid(pid, 0)[1]
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
