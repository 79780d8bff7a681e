"""What one run of the command line has: its output and its signals; the context object of click."""

from __future__ import annotations

from dataclasses import dataclass, field

from uringmig.cli.output import Output
from uringmig.progress import Snapshot
from uringmig.signals import Signals, look


@dataclass(frozen=True, slots=True)
class Session:
    """One run of the command line."""

    output: Output = field(default_factory=Output)
    signals: Signals = field(default_factory=Signals)

    def progress(self, snapshot: Snapshot) -> None:
        """Stop here if a signal asks for it; else show a snapshot."""
        look()
        self.output.progress(snapshot)
