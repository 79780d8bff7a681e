"""Power cuts by the seed: a recorded run is cut somewhere, the disk forgets, a check looks.

How many there are is URINGMIG_FORGET_SEEDS, all scenarios together: some hundreds by default, ten
thousand take an hour. URINGMIG_FORGET_FIRST is the first seed, to have one of them again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forgetfuldisk import Disk, crash
from systemcalls import Call, Recording, record

SEEDS: Final = int(os.environ.get("URINGMIG_FORGET_SEEDS", "300"))
FIRST: Final = int(os.environ.get("URINGMIG_FORGET_FIRST", "0"))


@dataclass(frozen=True)
class Run:
    """A recorded run, and the disk as it was before.

    Attributes:
        root: what is lost is lost here; it is made anew for each cut, at the same path.
    """

    root: Path
    beginning: Disk
    recording: Recording

    @classmethod
    def of(cls, command: Sequence[str], root: Path, *, code: int = 0) -> Run:
        """Record a program that must end with this exit code."""
        beginning = Disk(root)
        recording = record(command, root, trace=root.parent / "trace")
        assert recording.code == code, recording.err
        whole = beginning.copy()
        for call in recording.calls:
            whole.apply(call)
        # Whatever the model got wrong, or strace did not see, shows here.
        assert whole.differences(root) == []
        return cls(root, beginning, recording)

    def told(self, cut: int) -> bytes:
        """What had been said on standard output before the cut."""
        calls = [call for call in self.recording.calls if call.number < cut]
        return b"".join(call.data for call in calls if call.kind == "tell")

    def cut_by(
        self, share: float, check: Callable[[int], None], *, among: Sequence[Call] = ()
    ) -> None:
        """Cut the run at random places, and check what is left in ``root``.

        Args:
            share: of all seeds.
            check: called with the number of calls that were made; raises what is wrong.
            among: cut right after one of these only; default: anywhere.
        """
        calls = self.recording.calls
        for seed in range(FIRST, FIRST + max(1, round(SEEDS * share))):
            source = random.Random(seed)
            cut = source.choice(among).number + 1 if among else _draw_cut(calls, source)
            crash(self.beginning, calls, cut=cut, seed=seed, root=self.root)
            try:
                check(cut)
            except BaseException as error:
                last = calls[cut - 1] if cut else None
                after = f"{last.kind} {last.path} {last.target}" if last else "nothing"
                error.add_note(f"seed {seed}: cut after {cut} calls of {len(calls)}, {after}")
                raise


def _draw_cut(calls: Sequence[Call], source: random.Random) -> int:
    """How many calls are made; half the time after one that is no write, of which there are few."""
    if source.random() < 0.5:
        return source.randint(0, len(calls))
    rare = [call.number + 1 for call in calls if call.kind != "write"]
    return min(len(calls), source.choice(rare) + source.choice([-1, 0]))
