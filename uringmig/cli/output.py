"""All that the command line says; the only place that prints.

Results go to standard output: lines for people, or with ``--json`` one JSON object a line, progress
included. Notes, warnings and errors are one line each on standard error, as is the progress bar,
which appears on a terminal only. If the reader of these streams has gone
away, the work goes on and the rest of the output is dropped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TextIO

from uringmig import stdio
from uringmig.errors import BytesError, StorageError, UringmigError
from uringmig.progress import Phase, Snapshot

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from uringmig.cli.terminal import Bar

#: At most so often a JSON progress event is written; a new phase is told at once.
_EVENT_SECONDS: Final = 0.5
_SHOW_CURSOR: Final = "\x1b[?25h"
#: Exit code of what is done, with warnings.
_WARNED: Final = 1


class Output:
    """Where one run of the command line writes to, and how.

    The process' standard streams are those of `uringmig.stdio`: writing to them never fails.

    Attributes:
        verbose: whether to show more of what was measured.
    """

    def __init__(self) -> None:
        self._json = self._quiet = self.verbose = False
        self._bar: Bar | None = None
        self._live: Live | None = None
        self._told_at: float | None = None
        self._told_phase: Phase | None = None
        self._notes: list[str] = []
        self._warnings: list[str] = []

    @property
    def exit_code(self) -> int:
        """0, or 1 once there was a warning, or something could not be written."""
        lost = stdio.trouble(sys.stdout) or stdio.trouble(sys.stderr)
        return _WARNED if self._warnings or lost else 0

    def set_up(self, *, json: bool, quiet: bool, verbose: bool) -> None:
        """Take a command's options."""
        self._json, self._quiet, self.verbose = json, quiet, verbose

    def progress(self, snapshot: Snapshot) -> None:
        """Show how far it is: a bar on a terminal, events with ``--json``, else nothing."""
        if self._quiet:
            return
        if self._json:
            self._tell(snapshot)
        elif sys.stderr.isatty():
            if self._bar is None:
                from uringmig.cli.terminal import Bar

                self._bar = Bar(per_channel=self.verbose)
            self._bar.update(snapshot)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show on a terminal that something goes on of which no progress is known."""
        if self._quiet or self._json or not sys.stderr.isatty():
            yield
            return
        from uringmig.cli.terminal import console

        with console().status(_clean(text), spinner="line"):
            yield

    @contextmanager
    def live(self) -> Iterator[Callable[[RenderableType], None] | None]:
        """Give a way to show something that changes, on a terminal; elsewhere None."""
        if self._quiet or self._json or not sys.stderr.isatty():
            yield None
            return
        from rich.live import Live

        from uringmig.cli.terminal import console

        with Live(console=console(), transient=True, auto_refresh=False) as live:
            self._live = live
            try:
                yield lambda what: live.update(what, refresh=True)
            finally:
                self._live = None

    def event(self, name: str, fields: Mapping[str, object]) -> None:
        """Write an event with ``--json``; nothing otherwise."""
        if self._json and not self._quiet:
            self._write_json({"event": name, **fields})

    def complain(self, text: str) -> None:
        """Say in one line what went wrong with a part of what is done; `result` sums up."""
        self._complain(text)

    def note(self, text: str) -> None:
        """Say something the operator should know, such as a fallback that the options allow."""
        self._notes.append(text)
        self._complain(f"note: {text}")

    def warn(self, text: str) -> None:
        """Say something that makes the exit code 1."""
        self._warnings.append(text)
        self._complain(f"warning: {text}")

    def warn_all(self, texts: Iterable[str]) -> None:
        """Say several things that make the exit code 1."""
        for text in texts:
            self.warn(text)

    def result(
        self, command: str, value: object, lines: Sequence[str], *, exit_code: int | None = None
    ) -> None:
        """Write the outcome of a command.

        Args:
            command: its name.
            value: a dataclass, for ``--json``.
            lines: the same, for people.
            exit_code: what it will be; None is `exit_code`.
        """
        self.close()
        if self._json:
            self._write_json(
                {
                    "event": "result",
                    "command": command,
                    "exit_code": self.exit_code if exit_code is None else exit_code,
                    **_plain_fields(value),
                    "notes": self._notes,
                    "warnings": self._warnings,
                }
            )
        elif not self._quiet:
            self.lines(lines)

    def text(self, lines: Sequence[str]) -> None:
        """Write lines for people, unless they asked for events or for nothing."""
        self.close()
        if not self._json and not self._quiet:
            self.lines(lines)

    def lines(self, lines: Sequence[str]) -> None:
        """Write lines to standard output."""
        for line in lines:
            self._write(sys.stdout, _clean(line))

    def failed(self, error: UringmigError) -> None:
        """Say why nothing was done, in one line."""
        text = "; ".join([str(error), *getattr(error, "__notes__", [])])
        self.error(text, kind=type(error).__name__, exit_code=error.exit_code, **_fields_of(error))

    def error(self, text: str, *, kind: str, exit_code: int, **fields: object) -> None:
        """Say that the command failed; with ``--json`` also as an event."""
        self.close()
        self._complain(text)
        if self._json:
            self._write_json(
                {"event": "error", "error": text, "kind": kind, "exit_code": exit_code, **fields}
            )

    def close(self) -> None:
        """Take the progress bar away; harmless when called again."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()

    def settled(self, exit_code: int) -> int:
        """The exit code of the process: 1 in place of 0 if the outcome could not be written."""
        if (lost := stdio.trouble(sys.stdout)) is not None:
            self._complain(f"warning: {lost}")
        return max(exit_code, self.exit_code)

    def restore_terminal(self) -> None:
        """Show the cursor again, which the bar hides, before an exit without clean-up."""
        if self._bar is not None or self._live is not None:
            with suppress(OSError):
                os.write(sys.stderr.fileno(), _SHOW_CURSOR.encode())

    def _tell(self, snapshot: Snapshot) -> None:
        """Write a progress event, unless the last one was just now."""
        now = time.monotonic()
        soon = self._told_at is not None and now - self._told_at < _EVENT_SECONDS
        if soon and snapshot.phase == self._told_phase:
            return
        self._told_at, self._told_phase = now, snapshot.phase
        self._write_json(
            {
                "event": "progress",
                **dataclasses.asdict(snapshot),
                "share": snapshot.share,
                "rate": snapshot.rate,
                "seconds_left": snapshot.seconds_left,
            }
        )

    def _complain(self, text: str) -> None:
        """Write one line to standard error."""
        self.close()
        line = f"uringmig: {_clean(text)}"
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(sys.stderr, line)

    def _write_json(self, value: object) -> None:
        self._write(sys.stdout, json.dumps(value, default=_plain))

    def _write(self, stream: TextIO, line: str) -> None:
        """Write a line at once."""
        print(line, file=stream, flush=True)


def _clean(text: str) -> str:
    """One line that cannot steer a terminal, whatever a file or a peer put into it."""
    return "".join(
        char if char.isprintable() else " " if char == "\n" else ascii(char)[1:-1] for char in text
    )


def _fields_of(error: UringmigError) -> dict[str, object]:
    """The place an error names, for programs."""
    if isinstance(error, BytesError):
        return {
            "block": error.block,
            "offset": error.offset,
            "expected": error.expected,
            "found": error.found,
            "path": error.path,
        }
    if isinstance(error, StorageError):
        return {"path": error.path, "offset": error.offset, "errno": error.errno}
    return {}


def _plain_fields(value: object) -> dict[str, Any]:
    """The fields of a dataclass, not recursively: json asks `_plain` for what it does not know."""
    assert dataclasses.is_dataclass(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _plain(value: object) -> object:
    """What json does not know by itself."""
    if isinstance(value, UringmigError):
        return {"error": str(value), "kind": type(value).__name__, **_fields_of(value)}
    if dataclasses.is_dataclass(value):
        return _plain_fields(value)
    if hasattr(value, "__struct_fields__"):  # msgspec's, which need not be loaded for all others
        import msgspec

        return msgspec.to_builtins(value)  # without what is not set
    return str(value)
