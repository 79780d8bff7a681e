"""The real program in a child process: run to its end, or started and watched."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "uringmig"]
_SECCOMP = Path(__file__).with_name("seccomp.py")


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    def events(self) -> list[dict[str, Any]]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    def result(self) -> dict[str, Any]:
        """The last event."""
        return self.events()[-1]


def uringmig(*arguments: object, refuse_ring: int | None = None) -> Ended:
    """Run the program; ``refuse_ring`` is the errno with which a real filter refuses io_uring."""
    command = [*PROGRAM, *map(str, arguments)]
    if refuse_ring is not None:
        command = [sys.executable, str(_SECCOMP), str(refuse_ring), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the program and leave it running; its output is piped."""
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for a started program."""
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return Ended(process.returncode, out, err)
