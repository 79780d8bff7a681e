"""The right to read another process's memory: who has it, and what is missing.  ptrace(2)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

#: Linux: include/uapi/linux/capability.h.
_DAC_OVERRIDE: Final = 1
_DAC_READ_SEARCH: Final = 2
_SYS_PTRACE: Final = 19
_YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")


class Rights(Struct, frozen=True):
    """Us, a process, and what lies between.

    Attributes:
        user: our effective user id.
        capabilities: our effective ones, a bit each.
        owner: the user id of the process.
        dumpable: it has not changed its user since its start; else even that user may not read it.
        yama: its ptrace_scope; None where the kernel has no Yama.
    """

    user: int
    capabilities: int
    owner: int
    dumpable: bool
    yama: int | None

    def has(self, *numbers: int) -> bool:
        """Whether we have one of these capabilities."""
        return any(self.capabilities >> number & 1 for number in numbers)


def who_may(pid: int) -> str:
    """Who we are, who the process is, what is missing and how to get it: the end of a sentence."""
    try:
        return explain(_rights(pid))
    except OSError:
        return f": this is user {os.geteuid()}; it has ended"


def explain(rights: Rights) -> str:
    """See `who_may`."""
    same = rights.user == rights.owner
    ours = same and rights.dumpable
    missing = []
    if not rights.has(_SYS_PTRACE) and (not ours or rights.yama):
        missing.append("CAP_SYS_PTRACE")
    if not rights.has(_DAC_READ_SEARCH, _DAC_OVERRIDE) and not ours:
        missing.append("CAP_DAC_READ_SEARCH")  # its page tables are for its own user to look at
    who = f": this is user {rights.user}, QEMU is user {rights.owner}"
    if not rights.dumpable:
        who += " and was another before, so that the kernel keeps others of its user away from it"
    if rights.yama:
        who += f", Yama's ptrace_scope is {rights.yama}"
    if rights.yama == 3:
        return f"{who}, with which nobody may, until the host is started again"
    if not missing:
        return f"{who}; a security module or a user namespace forbids it: run as root outside of it"
    other = "" if same or not rights.dumpable or rights.yama else f", as user {rights.owner},"
    names = " and ".join(missing)
    return (
        f"{who}; missing: {names}; run as root{other} or with that (AmbientCapabilities=, setpriv)"
    )


def _rights(pid: int) -> Rights:
    """What the kernel says.

    Raises:
        OSError: there is no such process any more.
    """
    ours = Path("/proc/self/status").read_text()
    theirs = Path(f"/proc/{pid}/status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", ours, re.MULTILINE)
    owner = re.search(r"^Uid:\s*\d+\s+(\d+)", theirs, re.MULTILINE)
    assert effective is not None
    assert owner is not None
    try:
        yama = int(_YAMA.read_text())
    except (OSError, ValueError):
        yama = None
    return Rights(
        user=os.geteuid(),
        capabilities=int(effective[1], 16),
        owner=int(owner[1]),
        # Linux: task_dump_owner in fs/proc/base.c; the files of one that is not are root's.
        dumpable=Path(f"/proc/{pid}/environ").stat().st_uid == int(owner[1]),
        yama=yama,
    )
