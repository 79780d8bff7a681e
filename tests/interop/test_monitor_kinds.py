"""Monitors as people have them: pretty, human, named as on QEMU's own command line."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import uringmig

from uringmig.errors import PeerError, StateError
from uringmig.qemu.monitor import Monitor


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a QEMU has a pretty QMP monitor and a human one."""
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    for name, mode in (("pretty", "control,pretty=on"), ("human", "readline")):
        chardev = f"socket,id={name},path={tmp_path / name},server=on,wait=off"
        command += ["-chardev", chardev, "-mon", f"chardev={name},mode={mode}"]
    with subprocess.Popen(command) as process:
        try:
            while not (tmp_path / "human").exists():
                assert process.poll() is None, "QEMU has ended"
                time.sleep(0.02)
            yield tmp_path
        finally:
            process.kill()


def test_pretty_monitor_is_understood(folder: Path) -> None:
    """Its messages have many lines; those of one line still are messages too."""
    with Monitor(folder / "pretty") as monitor:
        assert monitor.qemu_version >= (7, 2, 0)
        assert monitor.run_state()
        assert len(monitor.execute("query-commands")) > 100
        assert "id" not in monitor.execute("query-version")


def test_human_monitor_is_named(folder: Path) -> None:
    with pytest.raises(PeerError, match="human monitor; QMP has mode=control"):
        Monitor(folder / "human")


@pytest.mark.parametrize("options", ["", ",server", ",server=on,wait=off", ",server,nowait"])
def test_address_as_qemu_writes_it(folder: Path, options: str) -> None:
    with Monitor(f"unix:{folder}/pretty{options}") as monitor:
        assert monitor.path == f"{folder}/pretty"


@pytest.mark.parametrize("address", ["tcp:localhost:4444", "telnet:127.0.0.1:1", "vsock:3:1"])
def test_other_kinds_of_socket_are_refused_in_one_line(tmp_path: Path, address: str) -> None:
    with pytest.raises(StateError, match="not supported yet"):
        Monitor(address)
    done = uringmig("save", "--qmp", address, tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "not supported yet" in done.err


def test_path_that_only_looks_like_an_address(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no such QMP socket"):
        Monitor(tmp_path / "tcp:4444")
