"""Facts of the binding that the ring rests on: symbols, sizes, flags, the GIL, refusals."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import liburing.liburing as extension
import numpy as np
import pytest
from smallguests import left_in

from uringmig.errors import HostError
from uringmig.storage import liburing, ring
from uringmig.storage.engine import Operation
from uringmig.storage.enginechoice import choose_engine
from uringmig.storage.requests import IoBatch
from uringmig.storage.ring import RingEngine

SECCOMP = str(Path(__file__).parents[1] / "seccomp.py")


@pytest.fixture(autouse=True)
def fresh_load() -> Iterator[None]:
    """What one test makes of the library is not what the next finds."""
    liburing.load.cache_clear()
    yield
    liburing.load.cache_clear()


def test_wheel_exports_every_function_we_declare() -> None:
    library = liburing.find()
    assert library.path == extension.__file__
    plain = ctypes.CDLL(extension.__file__)
    for name in liburing._PROTOTYPES:
        assert hasattr(plain, name), name
    assert library.version >= (2, 4)


def test_every_declared_function_has_both_types() -> None:
    """A pointer passed or returned as a default int is cut to 32 bits."""
    handle = liburing.find().handle
    for name, (restype, argtypes) in liburing._PROTOTYPES.items():
        assert getattr(handle, name).argtypes == argtypes
        assert getattr(handle, name).restype is restype


def test_structures_have_the_kernel_s_sizes() -> None:
    assert ring.SQE_DTYPE.itemsize == 64
    assert ring.CQE_DTYPE.itemsize == 16
    assert ctypes.sizeof(liburing.IoUring) == 216
    assert ctypes.sizeof(liburing.SubmissionQueue) == 104
    assert ctypes.sizeof(liburing.CompletionQueue) == 88
    assert ctypes.sizeof(liburing.Timespec) == 16
    offsets = {name: ring.SQE_DTYPE.fields[name][1] for name in ("off", "addr", "len")}  # type: ignore[index]
    assert offsets == {"off": 8, "addr": 16, "len": 24}
    assert ring.SQE_DTYPE.fields["user_data"][1] == 32  # type: ignore[index]


def test_this_kernel_gives_the_best_flags() -> None:
    engine = RingEngine(0, Operation.READ, 4)
    wanted = liburing.IORING_SETUP_SINGLE_ISSUER | liburing.IORING_SETUP_DEFER_TASKRUN
    assert engine.setup_flags == wanted == ring.SETUP_FLAGS[0]
    engine.close()


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_flags_an_older_kernel_does_not_know_are_left_out(
    monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    liburing.load()
    tried: list[int] = []
    real = liburing.queue_init

    def queue_init(library: Any, entries: int, one: Any, flags: int) -> None:
        tried.append(flags)
        if len(tried) <= refused:
            raise OSError(errno.EINVAL, "unknown flags")
        real(library, entries, one, flags)

    monkeypatch.setattr(liburing, "queue_init", queue_init)
    engine = RingEngine(0, Operation.READ, 4)
    assert tuple(tried) == ring.SETUP_FLAGS[: refused + 1]
    assert engine.setup_flags == ring.SETUP_FLAGS[refused]
    engine.close()


@pytest.mark.parametrize(
    ("number", "tries", "passes"),
    [(errno.EINVAL, 3, False), (errno.ENOMEM, 1, True), (errno.EMFILE, 1, True)],
)
def test_ring_that_cannot_be_made_is_a_host_error(
    monkeypatch: pytest.MonkeyPatch, number: int, tries: int, passes: bool
) -> None:
    """One for want of memory or descriptors may be had when others give some back."""
    liburing.load()
    tried: list[int] = []

    def queue_init(library: Any, entries: int, one: Any, flags: int) -> None:
        tried.append(flags)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(liburing, "queue_init", queue_init)
    with pytest.raises(HostError, match=os.strerror(number)) as caught:
        RingEngine(0, Operation.READ, 4)
    assert len(tried) == tries
    assert caught.value.may_pass is passes


def test_waiting_releases_the_gil() -> None:
    """A read of an empty pipe waits half a second; another thread goes on all the while."""
    reader, writer = os.pipe()
    engine = RingEngine(reader, Operation.READ, 1)
    memory = np.zeros(8, np.uint8)
    one = np.zeros(1, np.int64)
    engine.submit(IoBatch(one + memory.ctypes.data, one + 8, one - 1, one))
    ticks, running = 0, True

    def tick() -> None:
        nonlocal ticks
        while running:
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    assert len(engine.reap(wait_count=1, timeout_ns=500_000_000)) == 0
    waited, counted = time.monotonic() - started, ticks
    running = False
    thread.join()
    assert waited >= 0.5
    assert counted > 20, "the other thread stood still"
    os.write(writer, b"abc")
    done = engine.reap(wait_count=1, timeout_ns=10_000_000_000)
    assert done.result.tolist() == [3]
    assert memory[:3].tobytes() == b"abc"
    engine.close()
    os.close(reader)
    os.close(writer)


def test_rings_that_live_shortly_leave_no_descriptor() -> None:
    liburing.load()
    before = left_in(Path("/proc/self/fd"))
    for _ in range(200):
        RingEngine(0, Operation.READ, 64).close()
    liburing.load.cache_clear()
    liburing.load()
    assert left_in(Path("/proc/self/fd")) == before


class Altered:
    """A library of which some functions are others."""

    def __init__(self, handle: ctypes.CDLL, **changed: Any) -> None:
        self._handle = handle
        self._changed = changed

    def __getattr__(self, name: str) -> Any:
        return self._changed.get(name) or getattr(self._handle, name)


def altered(**changed: Any) -> liburing.Library:
    library = liburing.find()
    return liburing.Library(Altered(library.handle, **changed), library.version, library.path)  # type: ignore[arg-type]


def shifted_init(entries: int, reference: Any, flags: int) -> int:
    """A library whose structure has one more field in front."""
    address = ctypes.addressof(reference._obj)
    result: int = liburing.find().handle.io_uring_queue_init(
        entries, ctypes.cast(address + 8, ctypes.POINTER(liburing.IoUring)), flags
    )
    return result


def longer_init(entries: int, reference: Any, flags: int) -> int:
    """A library whose structure has one more field at its end."""
    result: int = liburing.find().handle.io_uring_queue_init(entries, reference, flags)
    ctypes.c_uint64.from_address(ctypes.addressof(reference._obj) + 216).value = 1
    return result


def far_sqe(_: Any) -> int:
    return 0x1000


@pytest.mark.parametrize(
    "changed",
    [
        {"io_uring_queue_init": shifted_init},
        {"io_uring_queue_init": longer_init},
        {"io_uring_sq_space_left": lambda _: 3},
        {"io_uring_get_sqe": far_sqe},
        {"io_uring_prep_write": lambda *_: None},
        {"io_uring_cq_ready": lambda _: 1},
        {"io_uring_sqe_set_data64": lambda *_: None},
    ],
    ids=["shifted", "longer", "space", "entries", "fields", "completions", "user data"],
)
def test_other_layout_is_refused_not_crashed_on(changed: dict[str, Any]) -> None:
    with pytest.raises(HostError, match="another layout"):
        liburing.check_abi(altered(**changed))


@pytest.mark.parametrize("version", [(1, 9), (2, 3), (3, 0)])
def test_other_version_is_refused_by_its_number(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    real = liburing.find().handle

    def open_library(path: str) -> Any:
        names = {name: getattr(real, name) for name in liburing._PROTOTYPES}
        return SimpleNamespace(
            **names,
            io_uring_major_version=lambda: version[0],
            io_uring_minor_version=lambda: version[1],
        )

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    with pytest.raises(HostError, match=rf"liburing {version[0]}\.{version[1]} .*not usable"):
        liburing.find()


def test_without_any_library_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise ImportError("no such module")

    monkeypatch.setattr(liburing, "_wheel_path", absent)
    monkeypatch.setattr(liburing, "_distribution_path", lambda: "libnowhere.so.0")
    with pytest.raises(HostError, match="pip install liburing"):
        choose_engine("io_uring")
    choice = choose_engine("auto")
    assert choice.name == "pwrite"
    assert "no liburing" in str(choice.note)


def test_where_the_ring_works_auto_takes_it_without_a_word() -> None:
    choice = choose_engine("auto")
    assert (choice.name, choice.note) == ("io_uring", None)
    assert choose_engine("pwrite").note is None


PROBE = """
from uringmig.errors import HostError
from uringmig.storage.enginechoice import choose_engine
choice = choose_engine("auto")
print(choice.name, "|", choice.note)
try:
    choose_engine("io_uring")
except HostError as error:
    print(error.exit_code, "|", error)
"""


@pytest.mark.parametrize(
    ("number", "cause", "cure"),
    [
        (errno.ENOSYS, "this kernel has none (ENOSYS)", "5.15 or newer"),
        (errno.EPERM, "refused (EPERM)", "allow io_uring_setup"),
        (errno.EACCES, "refused (EACCES)", "allow io_uring_setup"),
    ],
)
def test_kernel_that_refuses_is_told_with_cause_and_cure(
    number: int, cause: str, cure: str
) -> None:
    """A real seccomp filter, as in a container: auto falls back and says so, io_uring fails."""
    done = subprocess.run(
        [sys.executable, SECCOMP, str(number), sys.executable, "-c", PROBE],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    auto, required = done.stdout.splitlines()
    assert auto.startswith("pwrite | using pwrite: io_uring:")
    assert required.startswith("6 | io_uring:")
    for line in (auto, required):
        assert cause in line
        assert cure in line


@pytest.mark.parametrize("setting", ["1", "2"])
def test_switch_of_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"{setting}\n")
    text = liburing.refusal(errno.EPERM)
    assert f"kernel.io_uring_disabled = {setting}" in text
    assert "sysctl kernel.io_uring_disabled=0" in text
