"""Whole saves over engines that go wrong: the same image as ever, or an error and nothing left.

What must be fatal: EIO, ENOSPC, EDQUOT, an engine that cannot be made, an exception of ours. What
must not: short counts, EAGAIN, EINTR, completions late and out of order.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
from smallguests import (
    MIB,
    OPTIONS,
    PAGE,
    PWRITE,
    RING,
    aligned,
    check_image,
    copy_of,
    left_in,
    make_guest,
    ramblocks_of,
)

from uringmig import (
    FormatError,
    HostError,
    MappedRamReader,
    MappedRamWriter,
    RamBlock,
    ReadOptions,
    Snapshot,
    StateError,
    StorageError,
    WriteOptions,
    verify,
)
from uringmig.storage.engine import Engine, Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.storage.requests import Completions, IoBatch
from uringmig.testing.faults import (
    WHOLE,
    FaultEngine,
    RequestLog,
    faulty,
    random_outcomes,
    recorded,
)

ENGINES = pytest.mark.parametrize("engine", [PWRITE, RING], ids=lambda choice: choice.name)


@pytest.fixture
def former(tmp_path: Path) -> Iterator[Path]:
    """A folder with an image and its manifest, which a failed save has to leave as they are."""
    path = tmp_path / "vm"
    with MappedRamWriter(path, ramblocks_of(make_guest(77)), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    contents = {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path)}
    threads = threading.active_count()
    descriptors = left_in(Path("/proc/self/fd"))
    yield path
    assert threading.active_count() == threads, "a thread is left"
    assert left_in(Path("/proc/self/fd")) == descriptors, "a descriptor is left"
    assert {name: (tmp_path / name).read_bytes() for name in left_in(tmp_path)} == contents


@ENGINES
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direct", ["required", "off"])
def test_nothing_passing_is_fatal(
    tmp_path: Path, engine: EngineChoice, seed: int, direct: str
) -> None:
    """Short, refused, late and out of order: the image is the one a clean save makes."""
    guest = make_guest(seed)
    choice = EngineChoice(
        "faulty",
        faulty(
            engine.factory,
            lambda number: random_outcomes(100 * seed + number, passing=0.05, block_bytes=64 << 10),
            seed=seed,
            hold_max=3,
        ),
    )
    options = WriteOptions(
        channels=3, depth=4, block_size=64 << 10, direct=direct, dense_up_to=256 << 10  # type: ignore[arg-type]
    )  # fmt: skip
    for name, one in (("clean", engine), ("vm", choice)):
        with MappedRamWriter(
            tmp_path / name, ramblocks_of(guest), options=options, engine=one
        ) as writer:
            writer.write_all()
            writer.finish()
    check_image(tmp_path / "vm", copy_of(guest))
    assert (tmp_path / "vm").read_bytes() == (tmp_path / "clean").read_bytes()
    reading = ReadOptions(channels=2, depth=4, block_size=64 << 10, direct=direct)  # type: ignore[arg-type]
    assert not verify(tmp_path / "vm", options=reading, engine=choice).mismatches
    with MappedRamReader(tmp_path / "vm", options=reading, engine=choice) as reader:
        for idstr, memory in guest.items():
            loaded = aligned(memory.size)
            loaded[:] = 0xEE
            reader.read_into(idstr, loaded)
            assert np.array_equal(loaded, memory)


@ENGINES
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("good", [0, 1, 37])
def test_real_error_leaves_nothing_and_the_former_image(
    former: Path, engine: EngineChoice, number: int, good: int
) -> None:
    """Wherever it comes, it is told with number, file and offset, after all has drained."""
    log = RequestLog()
    factory = faulty(engine.factory, lambda _: chain(repeat(WHOLE, good), repeat(-number)))
    choice = EngineChoice("faulty", recorded(factory, log))
    with (
        MappedRamWriter(
            former, ramblocks_of(make_guest()), options=OPTIONS, engine=choice
        ) as writer,
        pytest.raises(StorageError) as caught,
    ):
        writer.write_all()
    assert caught.value.errno == number
    assert caught.value.offset is not None
    assert caught.value.offset % PAGE == 0
    assert log.in_flight == 0
    with pytest.raises(StateError):
        writer.finish()


def failing_factory(error: Exception) -> Callable[[int, Operation, int], Engine]:
    """Engines of which the second cannot be made."""
    lock, made = threading.Lock(), []

    def make(fd: int, operation: Operation, depth: int) -> Engine:
        with lock:
            made.append(fd)
            if len(made) == 2:
                raise error
        return PwriteEngine(fd, operation, depth)

    return make


@pytest.mark.parametrize("error", [HostError("no ring"), StorageError("broken"), ValueError("bug")])
def test_channel_that_dies_at_its_start_ends_the_save(former: Path, error: Exception) -> None:
    choice = EngineChoice("dying", failing_factory(error))
    with (
        MappedRamWriter(
            former, ramblocks_of(make_guest()), options=OPTIONS, engine=choice
        ) as writer,
        pytest.raises(type(error), match=str(error)),
    ):
        writer.write_all()


class Stuck(FaultEngine):
    """Completes nothing until it is let go; the memory has to stay all the while."""

    released = threading.Event()

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        if not Stuck.released.is_set():
            time.sleep(0.001)
            return Completions(np.empty(0, np.int64), np.empty(0, np.int64))
        return super().reap(wait_count=wait_count, timeout_ns=timeout_ns)


def stuck(log: RequestLog) -> EngineChoice:
    Stuck.released = threading.Event()

    def make(fd: int, operation: Operation, depth: int) -> Engine:
        return Stuck(PwriteEngine(fd, operation, depth))

    return EngineChoice("stuck", recorded(make, log))


def release_when_flying(log: RequestLog, observed: list[int], memory: object) -> threading.Thread:
    """Let go of the completions a while after requests are in flight; note who holds the memory."""
    alive = weakref.ref(memory)

    def wait() -> None:
        while not log.in_flight:
            time.sleep(0.001)
        time.sleep(0.3)
        gc.collect()
        observed.append(log.in_flight if alive() is not None else -1)
        Stuck.released.set()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


class Memory(np.ndarray):
    """An array that can be watched by a weak reference."""


def test_no_thread_for_a_channel_is_the_hosts_fault(
    former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's limit on tasks; the channel that has started ends first."""
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "multifd-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with (
        pytest.raises(HostError, match="fewer channels"),
        MappedRamWriter(former, ramblocks_of(make_guest()), options=OPTIONS) as writer,
    ):
        writer.write_all()


def test_abandoned_iterator_drains_before_anything_is_given_back(former: Path) -> None:
    """Also if somebody still holds the iterator when the writer is closed."""
    log = RequestLog()
    observed: list[int] = []
    memory = np.full(2 * MIB, 3, np.uint8).view(Memory)
    with MappedRamWriter(
        former, [RamBlock("ram", memory, dense=False)], options=OPTIONS, engine=stuck(log)
    ) as writer:
        thread = release_when_flying(log, observed, memory)
        iterator = writer.iter_write_all()
        next(iterator)
        del memory
    assert log.in_flight == 0, "the writer was closed with requests in flight"
    thread.join()
    assert observed[0] > 0, "the memory was freed before its completion"
    with pytest.raises(StateError):
        next(iterator)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_progress_that_raises_ends_the_save(former: Path, interrupt: type[BaseException]) -> None:
    log = RequestLog()
    observed: list[int] = []
    memory = np.full(2 * MIB, 3, np.uint8).view(Memory)

    def progress(snapshot: Snapshot) -> None:
        if log.in_flight:
            raise interrupt

    writer = MappedRamWriter(
        former, [RamBlock("ram", memory)], options=OPTIONS, engine=stuck(log), progress=progress
    )
    thread = release_when_flying(log, observed, memory)
    with pytest.raises(interrupt), writer:
        writer.write_all()
    assert log.in_flight == 0
    thread.join()
    assert observed[0] > 0


@pytest.mark.parametrize("phase", ["write", "bitmaps", "devices", "sync", "publish"])
def test_progress_may_raise_in_any_phase(former: Path, phase: str) -> None:
    """No phase that is told of comes after the name has been given."""

    def progress(snapshot: Snapshot) -> None:
        if snapshot.phase == phase:
            raise RuntimeError(phase)

    with (  # noqa: PT012 - either call may raise
        pytest.raises(RuntimeError, match=phase),
        MappedRamWriter(
            former, ramblocks_of(make_guest()), options=OPTIONS, progress=progress
        ) as writer,
    ):
        writer.write_all()
        writer.finish()


class Broken(PwriteEngine):
    """Takes requests and then fails as a whole, as a ring does that has become unusable."""

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        raise StorageError("the ring is gone")


def test_engine_that_fails_with_requests_in_flight_keeps_their_memory(former: Path) -> None:
    """Nobody knows when the kernel is done with it: it stays for good."""
    memory = np.full(MIB, 3, np.uint8).view(Memory)
    alive = weakref.ref(memory)
    with (
        MappedRamWriter(
            former, [RamBlock("ram", memory)], engine=EngineChoice("broken", Broken)
        ) as writer,
        pytest.raises(StorageError, match="gone"),
    ):
        writer.write_all()
    del writer, memory
    gc.collect()
    assert alive() is not None


def test_low_rate_does_not_delay_the_end(former: Path) -> None:
    """A channel that waits for its turn stops at once when the save is given up."""
    options = WriteOptions(rate=1)
    started = time.monotonic()
    with MappedRamWriter(former, ramblocks_of(make_guest()), options=options) as writer:
        next(writer.iter_write_all())
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("when", ["never begun", "written"])
def test_leaving_without_finish_leaves_nothing(former: Path, when: str) -> None:
    with MappedRamWriter(former, ramblocks_of(make_guest()), options=OPTIONS) as writer:
        if when == "written":
            writer.write_all()
        assert Path(f"{former}.partial").exists()
    writer.close()


def test_second_finish_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    """The descriptors are closed once: their numbers may be somebody else's by now."""
    with MappedRamWriter(tmp_path / "vm", ramblocks_of(make_guest()), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
        with pytest.raises(StateError):
            writer.finish()
        with pytest.raises(StateError):
            writer.write_all()
    for fd in others:
        os.close(fd)  # fails if somebody else has closed it
    assert left_in(tmp_path) == ["vm", "vm.manifest.json"]
    assert not verify(tmp_path / "vm").mismatches


def test_finish_before_the_pages_is_refused(former: Path) -> None:
    with (
        MappedRamWriter(former, ramblocks_of(make_guest()), options=OPTIONS) as writer,
        pytest.raises(StateError, match="write_all"),
    ):
        writer.finish()


def test_file_cut_while_it_is_read_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uringmig.transfer.channel._BACKOFF_SECONDS_MAX", 0.0)
    guest = make_guest()
    with MappedRamWriter(tmp_path / "vm", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    with MappedRamReader(tmp_path / "vm", engine=PWRITE) as reader:
        os.truncate(tmp_path / "vm", 2 * MIB)
        with pytest.raises(FormatError, match="ends inside"):
            reader.read_into("pc.ram", aligned(guest["pc.ram"].size))


def test_batches_are_never_empty(tmp_path: Path) -> None:
    """An engine is not asked for nothing: a system call for it would be wasted."""

    class Strict(PwriteEngine):
        def submit(self, batch: IoBatch) -> None:
            assert len(batch) > 0
            super().submit(batch)

    choice = EngineChoice("strict", Strict)
    with MappedRamWriter(
        tmp_path / "vm", ramblocks_of(make_guest()), options=OPTIONS, engine=choice
    ) as writer:
        writer.write_all()
        writer.finish()
