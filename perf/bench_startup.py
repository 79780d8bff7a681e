"""What does it cost to begin: processor time until the program does what it was called for?

Seconds are processor time, user and system, of the started process. What a user waits for on a
small guest is mostly this; the bytes of such a guest take a few tenths of a second.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from perf.micro import Micro, TimeFunction
from perf.program import PROGRAM, compile_package

#: Names of what `perf.verdict` judges.
NOTHING: Final = "python: nothing"
NUMPY: Final = "python: import numpy"
PACKAGE: Final = "python: import uringmig"
VERSION: Final = "uringmig --version"
FIRST_BYTE: Final = "uringmig save, to its first QMP byte"
#: What QEMU says to whoever connects; see QEMU's docs/interop/qmp-spec.rst.
_GREETING: Final = {
    "QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}
}


def whole(command: Sequence[str]) -> TimeFunction:
    """Time a process from its start to its end."""

    def run(loops: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(loops):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


def until_first_qmp_byte(folder: Path) -> TimeFunction:
    """Time ``uringmig save`` from its start to the first byte that QEMU gets of it."""

    def run(loops: int) -> float:
        return sum(_until_first_byte(folder) for _ in range(loops))

    return run


def _until_first_byte(folder: Path) -> float:
    path = folder / "qmp.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen([PROGRAM, "save", "--qmp", path, folder / "never.mig"])
        try:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(json.dumps(_GREETING).encode() + b"\r\n")
                connection.recv(1)
                return _processor_seconds(process.pid)
        finally:
            # What it would do next is not measured.
            process.kill()
            process.wait()


def _processor_seconds(pid: int) -> float:
    """Processor time of a living process, all threads, to the nanosecond (proc(5), schedstat)."""
    total = 0
    for task in os.scandir(f"/proc/{pid}/task"):
        running, *_ = Path(task.path, "schedstat").read_text().split()
        total += int(running)
    return total / 1e9


def main() -> None:
    """Measure every mark."""
    compile_package()
    micro = Micro("perf.bench_startup", __doc__ or "", program=str(PROGRAM))
    commands: dict[str, Sequence[str]] = {
        NOTHING: [sys.executable, "-c", "pass"],
        NUMPY: [sys.executable, "-c", "import numpy"],
        PACKAGE: [sys.executable, "-c", "import uringmig"],
        VERSION: [str(PROGRAM), "--version"],
        "uringmig archive list --help": [str(PROGRAM), "archive", "list", "--help"],
    }
    for name, command in commands.items():
        micro.cost(name, whole(command), operations=1, of="process")
    with tempfile.TemporaryDirectory() as folder:
        micro.cost(
            FIRST_BYTE,
            until_first_qmp_byte(Path(folder)),
            operations=1,
            of="process",
        )


if __name__ == "__main__":
    main()
