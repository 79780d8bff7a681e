"""Who may save a VM from outside: users, capabilities, namespaces, and who only passes QMP on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import PROGRAM, Ended
from imagereader import read_image
from otheruser import NOBODY, as_nobody, shared_folder

from uringmig.qemu.monitor import Monitor
from uringmig.testing.machine import Machine
from uringmig.units import MiB

_AS_NOBODY = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--"]
#: Passes on from one socket to another, both ways, as socat does.
_PASS_ON = """
import socket, sys, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
print(flush=True)
here = listener.accept()[0]
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[2])
def pass_on(one, other):
    while data := one.recv(65536):
        other.sendall(data)
threading.Thread(target=pass_on, args=(here, there), daemon=True).start()
pass_on(there, here)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with shared_folder() as shared:
        shared.chmod(0o777)
        yield shared


@contextmanager
def machine_of(
    folder: Path,
    *,
    prefix: Sequence[str] = (),
    arguments: Sequence[str] = (),
    backend: str = "",
) -> Iterator[Machine]:
    """A machine with sockets and a folder for everybody."""
    before = os.umask(0)
    try:
        machine = Machine(
            folder / "m",
            memory_bytes=64 * MiB,
            backend=backend,
            prefix=prefix,
            arguments=arguments,
        )
    finally:
        os.umask(before)
    with machine:
        yield machine


def assert_refused(ended: Ended, machine: Machine, out: Path, *words: str) -> None:
    """Exit 6, one line that has the words; the guest was not stopped, and nothing is left."""
    assert ended.code == 6, ended.err
    [line] = ended.err.splitlines()
    for word in words:
        assert word in line
    machine.monitor.run_state()
    assert machine.monitor.run_events() == ()
    assert machine.monitor.run_state() == "running"
    assert machine.monitor.descriptors() == []
    assert [path for path in out.parent.iterdir() if path.name.startswith(out.name)] == []


def assert_saved(ended: Ended, machine: Machine, out: Path) -> None:
    assert ended.code == 0, ended.err
    assert machine.monitor.run_state() == "running"
    read_image(out)


def save(machine: Machine, out: Path, *how: str) -> list[str]:
    return ["save", str(out), "--qmp", str(machine.qmp_path), *(how or ("--how", "outside"))]


@pytest.mark.parametrize("how", ["auto", "outside"])
def test_another_user(how: str, folder: Path) -> None:
    with machine_of(folder) as machine:
        out = folder / "vm.mig"
        ended = as_nobody(folder, *save(machine, out, "--how", how))
        assert_refused(
            ended, machine, out,
            f"this is user {NOBODY}, QEMU is user 0",
            "missing: CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
            "run as root",
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["", "memory-backend-memfd,share=on"])
def test_qemus_own_user(backend: str, folder: Path) -> None:
    """Neither root nor a capability: a memfd is opened as QEMU's descriptor."""
    with machine_of(folder, prefix=_AS_NOBODY, backend=backend) as machine:
        assert_saved(as_nobody(folder, *save(machine, folder / "a")), machine, folder / "a")


def test_a_qemu_that_changed_its_user(folder: Path) -> None:
    """-run-with user=: it is not dumpable, so its own user may not; root may."""
    with machine_of(folder, arguments=["-run-with", "user=nobody"]) as machine:
        out = folder / "vm.mig"
        ended = as_nobody(folder, *save(machine, out))
        assert_refused(
            ended, machine, out,
            f"this is user {NOBODY}, QEMU is user {NOBODY} and was another before",
            "missing: CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; run as root or with that",
        )  # fmt: skip
        done = subprocess.run([*PROGRAM, *save(machine, out)], capture_output=True, check=False)
        assert_saved(Ended(done.returncode, "", done.stderr.decode()), machine, out)


@pytest.mark.parametrize("backend", ["", "memory-backend-memfd,share=on"])
@pytest.mark.parametrize("also", ["", "dac_read_search"])
def test_a_capability_and_two(backend: str, also: str, folder: Path) -> None:
    """CAP_SYS_PTRACE reads memory, but page tables are files that have an owner."""
    with machine_of(folder, backend=backend) as machine:
        out = folder / "vm.mig"
        capabilities = ["sys_ptrace", *([also] if also else [])]
        ended = as_nobody(folder, *save(machine, out), capabilities=capabilities)
        if also:
            assert_saved(ended, machine, out)
        else:
            assert_refused(ended, machine, out, "; missing: CAP_DAC_READ_SEARCH; run as root")


def test_qemu_in_a_namespace_of_ours(folder: Path) -> None:
    """A child namespace of process ids, as containers have: seen from here, and saved."""
    prefix = ["unshare", "--pid", "--fork", "--kill-child"]
    with machine_of(folder, prefix=prefix) as machine:
        assert machine.monitor.peer_pid != machine.process.pid
        out = folder / "vm.mig"
        done = subprocess.run([*PROGRAM, *save(machine, out)], capture_output=True, check=False)
        assert_saved(Ended(done.returncode, "", done.stderr.decode()), machine, out)


@pytest.mark.parametrize("proc", ["--mount-proc", "--mount"])
def test_qemu_in_another_namespace(proc: str, folder: Path) -> None:
    """We are in one of our own, with its /proc or that of all."""
    with machine_of(folder) as machine:
        out = folder / "vm.mig"
        done = subprocess.run(
            ["unshare", "--pid", "--fork", proc, *PROGRAM, *save(machine, out)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        ended = Ended(done.returncode, done.stdout, done.stderr)
        assert_refused(ended, machine, out, "QEMU's process cannot be seen from here", "namespace")


def test_who_answers_is_not_qemu(folder: Path) -> None:
    """Somebody passes QMP on: the memory of that process is none of the guest's."""
    with machine_of(folder) as machine:
        passed = folder / "passed"
        command = [sys.executable, "-c", _PASS_ON, str(passed), str(machine.qmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as between:
            assert between.stdout is not None
            between.stdout.readline()
            out = folder / "vm.mig"
            done = subprocess.run(
                [*PROGRAM, "save", out, "--qmp", passed, "--how", "outside"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            between.kill()
        ended = Ended(done.returncode, done.stdout, done.stderr)
        assert_refused(ended, machine, out, f"process {between.pid}", "not QEMU itself")


def test_a_qemu_that_has_become_a_daemon(folder: Path) -> None:
    """-daemonize: who was started has ended, and another process has the memory."""
    qmp, pidfile, out = folder / "qmp", folder / "pid", folder / "vm.mig"
    subprocess.run(
        ["qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "64M", "-nodefaults",
         "-display", "none", "-daemonize", "-pidfile", pidfile,
         "-qmp", f"unix:{qmp},server=on,wait=off"],
        check=True,
    )  # fmt: skip
    with Monitor(qmp) as monitor:
        assert monitor.peer_pid == int(pidfile.read_text())
    done = subprocess.run(
        [*PROGRAM, "save", out, "--qmp", qmp, "--then", "quit"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    read_image(out)
