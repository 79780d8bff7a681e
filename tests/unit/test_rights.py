"""What somebody is told who may not read QEMU's memory: who is who, what is missing, the cure."""

from __future__ import annotations

import pytest

from uringmig.qemu.rights import Rights, explain

_SEARCH, _PTRACE = 1 << 2, 1 << 19


def rights(
    *, user: int = 7, caps: int = 0, owner: int = 7, dumpable: bool = True, yama: int | None = None
) -> Rights:
    return Rights(user=user, capabilities=caps, owner=owner, dumpable=dumpable, yama=yama)


@pytest.mark.parametrize(
    ("found", "missing", "cure"),
    [
        (rights(user=1), "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH", "as root, as user 7,"),
        (rights(user=1, caps=_PTRACE), "CAP_DAC_READ_SEARCH", "as root, as user 7,"),
        (rights(user=1, caps=_SEARCH), "CAP_SYS_PTRACE", "as root, as user 7,"),
        (rights(dumpable=False), "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH", "as root or with"),
        (rights(dumpable=False, caps=_PTRACE), "CAP_DAC_READ_SEARCH", "as root or with"),
        (rights(yama=1), "CAP_SYS_PTRACE", "as root or with"),
        (rights(user=1, yama=2), "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH", "as root or with"),
        (rights(user=1, yama=0), "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH", "as root, as user 7,"),
    ],
)
def test_what_is_missing(found: Rights, missing: str, cure: str) -> None:
    """Only what would help, and another user only where that user may."""
    words = explain(found)
    assert f"this is user {found.user}, QEMU is user 7" in words
    assert f"; missing: {missing}; " in words
    assert cure in words
    assert ("Yama's ptrace_scope" in words) == bool(found.yama)
    assert ("was another before" in words) == (not found.dumpable)


def test_where_nobody_may() -> None:
    assert "nobody may" in explain(rights(user=0, caps=-1, yama=3))


def test_where_nothing_is_missing() -> None:
    """All is there, and the kernel refuses nevertheless."""
    assert "security module" in explain(rights())
    assert "security module" in explain(rights(user=0, caps=-1, owner=7))
