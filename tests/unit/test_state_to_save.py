"""From which run states a guest can be saved now, later, or not at all."""

from __future__ import annotations

from typing import cast

import pytest

from uringmig.errors import PeerError
from uringmig.qemu.monitor import Migration, Monitor
from uringmig.qemu.vmsave import state_to_save


class Standing:
    """As much of a monitor as is asked before a guest is touched."""

    def __init__(self, state: str) -> None:
        self._state = state

    def descriptors(self) -> list[tuple[int, str, int]]:
        return []

    def migration(self) -> Migration:
        return Migration("none", None, {})

    def capabilities(self) -> dict[str, bool]:
        return {}

    def run_state(self) -> str:
        return self._state


@pytest.mark.parametrize(
    ("state", "passes"),
    [("finish-migrate", True), ("inmigrate", True), ("postmigrate", False), ("colo", False)],
)
def test_a_state_that_passes_may_be_waited_for(state: str, passes: bool) -> None:
    with pytest.raises(PeerError, match=f"in state '{state}'") as caught:
        state_to_save(cast(Monitor, Standing(state)))
    assert caught.value.may_pass is passes
