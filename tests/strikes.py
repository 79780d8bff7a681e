"""The real program struck by a signal in the middle of a chosen system call: strace delivers it.

So every step of a save, a copy or a restore can be met, publication's included, at a known place
and not by luck.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from commandline import PROGRAM, Ended

#: What `Signals` turns into an exit code, and what a signal does before there are handlers.
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Struck(Ended):
    """How a run ended; ``lines`` are the calls looked at, by any process or thread of it."""

    lines: tuple[str, ...] = ()
    number: signal.Signals = signal.SIGTERM

    @property
    def hit(self) -> bool:
        """Whether the signal was sent at all."""
        return any(f"--- {self.number.name} " in line for line in self.lines)

    @property
    def stopped(self) -> bool:
        """Whether the run says that the signal has ended it."""
        return self.code == 128 + self.number


def strike(
    folder: Path,
    call: str,
    when: int,
    number: signal.Signals,
    *arguments: object,
    only: Sequence[Path] = (),
) -> Struck:
    """Run the program; each of its threads gets the signal in its ``when``-th ``call``.

    ``only`` counts calls that have to do with these files.
    """
    log = folder / "strikes.log"
    command = _traced(log, call, f"signal={number.name}:when={when}", only)
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    lines = log.read_text().splitlines()
    log.unlink()
    assert "Traceback" not in done.stderr, done.stderr
    return Struck(done.returncode, done.stdout, done.stderr, tuple(lines), number)


def sweep(
    folder: Path,
    call: str,
    *arguments: object,
    every: int = 1,
    undisturbed: int = 0,
    only: Sequence[Path] = (),
) -> Iterator[Struck]:
    """Strike at each ``call`` in turn, with one signal after the other, until there is none left.

    ``every`` leaves out some, where there are many of one kind.
    ``undisturbed`` is the exit code of a run that no signal meets.

    Whoever takes the runs puts things back as they were before each.
    """
    when = 1
    while (
        struck := strike(folder, call, when, NUMBERS[when % len(NUMBERS)], *arguments, only=only)
    ).hit:
        yield struck
        when += every
    assert when > 1, f"{call} is never called"
    assert struck.code == undisturbed, struck.err


def refused(folder: Path, call: str, error: str, *arguments: object, only: Sequence[Path]) -> Ended:
    """Run the program; its calls of a kind that have to do with these files fail with an error."""
    command = _traced(folder / "refused.log", call, f"error={error}", only)
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def slowed(
    folder: Path, call: str, *arguments: object, only: Sequence[Path]
) -> subprocess.Popen[str]:
    """Start the program; its first ``call`` that has to do with these files returns a second late.

    So whoever watches can do something meanwhile. The program is the only child of what is started.
    """
    command = _traced(folder / "slowed.log", call, "delay_exit=1000000:when=1", only)
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _traced(log: Path, call: str, what: str, only: Sequence[Path]) -> list[str]:
    """The program under strace, with something done to it in its calls of one kind."""
    return [
        "strace", "-f", "-qq", "-o", str(log), *(f"-P{path}" for path in only),
        "-e", f"trace={call}", "-e", f"inject={call}:{what}", *PROGRAM,
    ]  # fmt: skip
