"""Both ways into a QEMU that waits for a load, and what it is like while nothing has been spent."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from uringmig.contents.opening import open_contents
from uringmig.qemu.monitor import Monitor
from uringmig.qemu.restore import load_into
from uringmig.qemu.streamload import stream_into
from uringmig.testing.machine import Machine


def by_mapped_ram(monitor: Monitor, image: Path) -> tuple[str, ...]:
    """As ``uringmig load``; what it has to say."""
    return load_into(monitor, image, channels=2, direct="preferred").notes


def by_stream(monitor: Monitor, image: Path) -> tuple[str, ...]:
    """As ``uringmig archive restore --qmp``; what it has to say."""
    with closing(open_contents(image)) as contents:
        return stream_into(monitor, contents).notes


LOADS = [by_mapped_ram, by_stream]


def assert_waits(machine: Machine) -> None:
    """Its only try is still to come."""
    assert machine.monitor.run_state() == "inmigrate"
    assert machine.monitor.migration().status == "none"
