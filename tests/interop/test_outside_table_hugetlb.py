"""RAM kind x machine x state: each kind of RAM, and each machine in each state.

``python tests/kindtable.py docs/kinds.md`` tries every combination.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kindtable import MACHINES, RAMS, STATES, Combination, host, some, try_states

from uringmig.testing.guestimage import GuestImage


@pytest.fixture(scope="module")
def huge() -> Iterator[Path]:
    with host(guests=1) as folder:
        yield folder


@pytest.mark.parametrize("combination", some(), ids=", ".join)
def test_all_that_is_to_hold(combination: Combination, guest: GuestImage, huge: Path) -> None:
    """Digest, counter, state afterwards, host memory and settings, of both guests."""
    ram, machine, state = combination
    [row] = try_states(ram, machine, [state], guest, huge)
    assert row.right, row


def test_every_value_is_tried() -> None:
    rams, machines, states = (set(values) for values in zip(*some(), strict=True))
    assert (rams, machines, states) == (set(RAMS), set(MACHINES), set(STATES))
    assert len({(machine, state) for _, machine, state in some()}) == len(MACHINES) * len(STATES)
