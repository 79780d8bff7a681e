"""Whether calls came in an order that keeps what they promise, whatever the disk forgets.

Each rule is a function from calls to complaints, one line each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from systemcalls import Call

PARTIAL = ".partial"


@dataclass(eq=False)
class _File:
    """What was done to one file, under whatever names it had."""

    changes: list[Call] = field(default_factory=list)
    syncs: list[Call] = field(default_factory=list)

    def unsynced_at(self, number: int) -> Call | None:
        """The last change before a call, if no sync that began after it had ended by then."""
        before = [call for call in self.changes if call.number < number]
        if not before:
            return None
        last = before[-1]
        done = [call for call in self.syncs if last.number < call.begun and call.number < number]
        return None if done else last


@dataclass
class History:
    """Calls by file, which renames and links carry to other names.

    Attributes:
        named: renames and links, each with the file that they gave a name.
        syncs: of folders, by path.
    """

    files: dict[str, _File] = field(default_factory=dict)
    named: list[tuple[Call, _File]] = field(default_factory=list)
    syncs: dict[str, list[Call]] = field(default_factory=dict)

    @classmethod
    def of(cls, calls: Sequence[Call]) -> History:
        history = cls()
        for call in calls:
            history._take(call)
        return history

    def _take(self, call: Call) -> None:
        # A file that was there before and is only renamed needs nothing.
        if call.kind == "open" and "O_CREAT" in call.flags:
            self.files.setdefault(call.path, _File())
        if call.changes_data:
            self.files.setdefault(call.changed_path, _File()).changes.append(call)
        elif call.kind == "sync":
            if call.path in self.files:
                self.files[call.path].syncs.append(call)
            else:
                self.syncs.setdefault(call.path, []).append(call)
        elif call.kind in ("rename", "link"):
            file = self.files.get(call.path, _File())
            if call.kind == "rename":
                self.files.pop(call.path, None)
            self.files[call.target] = file
            self.named.append((call, file))
        elif call.kind == "unlink":
            self.files.pop(call.path, None)


def unsafe_names(calls: Sequence[Call], *, logs: Sequence[str] = ()) -> list[str]:
    """Files that got a final name before they were whole and durable, or changed under it.

    Args:
        calls: of a whole run.
        logs: endings of names under which a file may grow: each addition must be synced before
            the next.
    """
    complaints = []
    history = History.of(calls)
    for call, file in history.named:
        if call.target.endswith(PARTIAL):
            continue
        unsynced = file.unsynced_at(call.number)
        if unsynced is not None:
            complaints.append(f"{_base(call)} got its name before its {unsynced.kind} was synced")
        later = [change for change in file.changes if change.number > call.number]
        if call.target.endswith(tuple(logs)):
            for one, following in pairwise(later):
                if file.unsynced_at(following.number) is one:
                    complaints.append(f"{_base(call)} grew twice without a sync")
        elif later:
            complaints.append(f"{_base(call)} was changed under its final name ({later[0].kind})")
    return complaints


def unsettled(calls: Sequence[Call], *, at: int, endings: Sequence[str] = ("",)) -> list[str]:
    """What is not durable when a call begins that says that all is well.

    Args:
        calls: of a whole run.
        at: the number of that call.
        endings: of the final names that are looked at.
    """
    history = History.of([call for call in calls if call.number < at])
    complaints = []
    for call, file in history.named:
        if call.target.endswith(PARTIAL) or not call.target.endswith(tuple(endings)):
            continue
        folder = os.path.dirname(call.target)  # noqa: PTH120 - it is no Path
        synced = [sync for sync in history.syncs.get(folder, ()) if call.number < sync.begun]
        if not synced:
            complaints.append(f"the name {_base(call)} is not synced")
        if file.unsynced_at(at) is not None:
            complaints.append(f"the content of {_base(call)} is not synced")
    return complaints


def _base(call: Call) -> str:
    return call.target.rpartition("/")[2]
