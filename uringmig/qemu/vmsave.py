"""A save of a VM, whichever way: what it is asked for, what it found, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from uringmig.errors import BusyError, PeerError
from uringmig.image.guestfacts import GuestDisk
from uringmig.qemu.leftovers import heal
from uringmig.qemu.monitor import Monitor
from uringmig.result import SaveResult

#: What becomes of the guest after a save; None is "as it was found".
Then = Literal["cont", "quit", "leave"]
#: The way its memory is reached: read from outside, or held by a migration that leaves it out.
Way = Literal["outside", "migrate"]

#: Run states from which QEMU migrates. From postmigrate it does not, until ``cont``.
_SAVED_FROM: Final = frozenset(
    {
        "running", "paused", "prelaunch", "suspended", "shutdown", "guest-panicked", "io-error",
        "internal-error", "watchdog",
    }
)  # fmt: skip
#: Run states that pass by themselves: a migration is ending (its saver was killed) or coming in.
_PASSED_THROUGH: Final = frozenset({"finish-migrate", "inmigrate"})
#: Begins a note about what went wrong when nothing can go wrong with the image any more.
DONE_BUT: Final = "the image is whole and durable, but:"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSave:
    """A VM that was saved.

    Attributes:
        image: the published image.
        how: the way that was taken.
        passes: how often its memory was gone over. More than one: everything was written while the
            guest ran, and what it had changed once more, at last while it stood still.
        blocks_mapped: idstrs of the blocks written from shared memory.
        blocks_copied: idstrs of those that were read from QEMU's process, or came by its stream.
        stopped_seconds: how long the guest stood still for it; 0.0 if it did not run before.
        state_before: QEMU's run state when we came.
        state_after: and when we left; None after ``quit``.
        disks: those that the guest may write to, and how each is kept.
        notes: what the operator should know, one line each.
    """

    image: SaveResult
    how: Way
    passes: int = 1
    blocks_mapped: tuple[str, ...]
    blocks_copied: tuple[str, ...]
    stopped_seconds: float
    state_before: str
    state_after: str | None
    notes: tuple[str, ...]
    disks: tuple[GuestDisk, ...] = ()


def state_to_save(monitor: Monitor) -> tuple[str, tuple[str, ...]]:
    """The guest's run state, and notes; refuse one from which it cannot be saved.

    What an earlier save left changed, when it was killed, is put back first.

    Raises:
        BusyError: QEMU is migrating, or another save is under way.
        PeerError: no guest can be saved in this state.
    """
    notes = heal(monitor)
    return check_state(monitor), notes


def check_state(monitor: Monitor) -> str:
    """The guest's run state; refuse one from which it cannot be saved.

    Raises:
        BusyError: QEMU is migrating.
        PeerError: no guest can be saved in this state.
    """
    before = monitor.run_state()
    refuse_state(before)
    if not monitor.migration().ended:
        raise BusyError(f"QEMU is busy with a migration ({monitor.migration().status})")
    return before


def refuse_state(state: str) -> None:
    """Refuse a run state from which no guest is saved.

    Raises:
        BusyError: it passes by itself.
        PeerError: it does not.
    """
    if state not in _SAVED_FROM:
        kind = BusyError if state in _PASSED_THROUGH else PeerError
        raise kind(f"the guest is in state {state!r}, from which QEMU cannot migrate")
