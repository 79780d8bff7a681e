"""What is shown on a terminal, and only there: rich takes as long to load as all the rest."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from uringmig.progress import Snapshot
from uringmig.units import format_size


class Bar:
    """A progress bar on the terminal of standard error."""

    def __init__(self, *, per_channel: bool) -> None:
        self._per_channel = per_channel
        self._progress = Progress(
            TextColumn("{task.description:8}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            console=console(),
            transient=True,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("", text="")
        self._progress.start()

    def update(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
        text = f"{format_size(snapshot.finished_bytes)}  {snapshot.rate / 1e6:.0f} MB/s"
        left = snapshot.seconds_left
        if left is not None:
            text += f"  {left:.0f} s left"
        if self._per_channel:
            text += "  [" + ", ".join(format_size(channel) for channel in snapshot.channels) + "]"
        self._progress.update(
            self._task,
            description=snapshot.phase,
            total=snapshot.total_bytes,
            completed=snapshot.finished_bytes,
            text=text,
        )

    def stop(self) -> None:
        """Take it off the screen."""
        self._progress.stop()


def console() -> Console:
    """A console on standard error as it is now."""
    return Console(stderr=True)
