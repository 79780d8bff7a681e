"""Contents of every kind streamed into a real QEMU that waits; and what must not start a guest."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contentsreading import collect
from realguest import FILL_BYTES, GUEST_BYTES, SavedGuest, StartMachine, shared_path

from uringmig.contents.comparing import window_digest
from uringmig.contents.memoryfiles import MemoryFileBlock, open_memory
from uringmig.contents.opening import open_contents
from uringmig.contents.source import Contents, all_rows
from uringmig.contents.streaming import plain_pieces
from uringmig.errors import MismatchError, PeerError
from uringmig.options import ReadOptions
from uringmig.progress import Snapshot
from uringmig.qemu import streamload
from uringmig.qemu.streamload import stream_into
from uringmig.testing.machine import Machine
from uringmig.units import MiB

PAGE = 4096
RAM_BYTES = 64 * MiB


def digests_of(source: Contents) -> list[list[str]]:
    rows = [[""] * block.row_count for block in source.blocks]
    for read in source.windows(all_rows(source.blocks)):
        rows[read.block_index][read.row] = window_digest(read).hex()
    return rows


@pytest.fixture(scope="module")
def saved(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One guest that never ran, in three forms; its memory file stays."""
    folder = tmp_path_factory.mktemp("m")
    memory = folder / "ram"
    for name, capability in (("plain", ""), ("mapped", "mapped-ram"), ("state", "x-ignore-shared")):
        ram = shared_path()
        with Machine(folder, memory_bytes=RAM_BYTES, shared=ram, paused=True) as machine:
            words = np.memmap(ram, np.uint64, "r+").reshape(-1, PAGE // 8)
            words[1:9000:3] = np.arange(1, 9000, 3, dtype=np.uint64)[:, None]
            if capability:
                machine.monitor.set_capabilities(**{capability: True})
            machine.monitor.set_parameters(**{"max-bandwidth": 0})
            machine.monitor.execute("migrate", uri=f"file:{folder / name}")
            assert machine.monitor.wait_for_migration(timeout_s=60).status == "completed"
            memory.write_bytes(ram.read_bytes())
    return {name: folder / name for name in ("plain", "mapped", "state", "ram")}


OPENERS: dict[str, Callable[[dict[str, Path]], Contents]] = {
    "plain": lambda saved: open_contents(saved["plain"]),
    "mapped": lambda saved: open_contents(saved["mapped"]),
    "memory": lambda saved: open_memory([MemoryFileBlock("pc.ram", saved["ram"])], saved["state"]),
}


@pytest.mark.parametrize("kind", OPENERS)
@pytest.mark.parametrize("stale", [False, True])
def test_memory_is_the_same_afterwards(
    saved: dict[str, Path], start_machine: StartMachine, kind: str, stale: bool
) -> None:
    ram = shared_path()
    machine = start_machine(memory_bytes=RAM_BYTES, shared=ram, incoming=True)
    if stale:
        np.memmap(ram, np.uint8, "r+")[RAM_BYTES // 2 :] = 0xEE
    before = machine.monitor.capabilities(), machine.monitor.parameters()
    with OPENERS[kind](saved) as source:
        result = stream_into(machine.monitor, source, digests=digests_of(source))
        blocks = sum(block.row_count for block in source.blocks)
    assert result.digests_checked == blocks
    assert result.memory_bytes > RAM_BYTES
    assert ram.read_bytes() == saved["ram"].read_bytes()
    assert (machine.monitor.capabilities(), machine.monitor.parameters()) == before
    assert result.run_state == machine.monitor.run_state()
    if not stale:
        # The holes of a fresh file stay: no host memory for pages that are zero.
        assert ram.stat().st_blocks * 512 < RAM_BYTES // 2


def test_the_guest_remembers_and_goes_on(
    saved_guest: SavedGuest, start_machine: StartMachine
) -> None:
    machine = start_machine(memory_bytes=GUEST_BYTES, guest=saved_guest.guest, incoming=True)
    told: list[Snapshot] = []
    with open_contents(saved_guest.image) as source:
        result = stream_into(
            machine.monitor, source, digests=digests_of(source), progress=told.append
        )
    assert result.stream_bytes > FILL_BYTES
    assert all(0 <= snapshot.share <= 1 for snapshot in told)
    assert result.run_state == "paused"
    machine.monitor.execute("cont")
    assert machine.console.digest() == saved_guest.digest
    assert machine.console.count() >= saved_guest.count


@pytest.mark.parametrize("kind", ["plain", "mapped-ram"])
def test_state_that_must_come_before_memory(
    start_machine: StartMachine, tmp_path: Path, kind: str
) -> None:
    """virtio-mem has a section that QEMU wants before the first page, and pages never sent."""
    device = [
        *["-m", "64M,slots=2,maxmem=1G", "-object", "memory-backend-ram,id=vm0,size=64M"],
        *["-device", "virtio-mem-pci,memdev=vm0,requested-size=16M"],
    ]
    rams = shared_path(), shared_path()
    source = start_machine(memory_bytes=RAM_BYTES, shared=rams[0], paused=True, arguments=device)
    np.memmap(rams[0], np.uint8, "r+")[: 3 * MiB] = 0x6B
    if kind == "mapped-ram":
        source.monitor.set_capabilities(**{kind: True})
    source.monitor.execute("migrate", uri=f"file:{tmp_path}/saved")
    assert source.monitor.wait_for_migration(timeout_s=60).status == "completed"
    waiting = start_machine(memory_bytes=RAM_BYTES, shared=rams[1], incoming=True, arguments=device)
    with open_contents(tmp_path / "saved") as contents:
        assert contents.kind == kind
        stream_into(waiting.monitor, contents, digests=digests_of(contents))
    assert rams[0].read_bytes() == rams[1].read_bytes()


def refused(machine: Machine, source: Contents, digests: list[list[str]], message: str) -> None:
    """The load fails with this message, and QEMU is there with a guest that has not started."""
    with pytest.raises(MismatchError, match=message):
        stream_into(machine.monitor, source, digests=digests)
    assert machine.monitor.migration().status == "failed"
    assert machine.monitor.run_state() == "inmigrate"
    with pytest.raises(PeerError, match="start it again"):
        stream_into(machine.monitor, source)


@pytest.mark.parametrize("place", [0, -1])
def test_a_digest_that_differs_cuts_the_stream(
    saved: dict[str, Path], start_machine: StartMachine, tmp_path: Path, place: int
) -> None:
    """Also if it is the very last window: the guest must not start."""
    rotten = tmp_path / "rotten.mig"
    rotten.write_bytes(saved["mapped"].read_bytes())
    machine = start_machine(memory_bytes=RAM_BYTES, incoming=True)
    with open_contents(saved["mapped"]) as source:
        digests = digests_of(source)
        set_pages = [page for page in range(1, 9000, 3) if page * PAGE < RAM_BYTES]
        number = [block.idstr for block in source.blocks].index("pc.ram")
    with open_contents(rotten, options=ReadOptions(channels=1)) as source:
        layout = source.reader.image.blocks[number]  # type: ignore[attr-defined]
        with rotten.open("r+b") as file:
            file.seek(layout.pages_offset + set_pages[place] * PAGE + 77)
            file.write(b"\x5a")
    row = set_pages[place] * PAGE // (4 * MiB)
    with open_contents(rotten, options=ReadOptions(channels=1)) as source:
        refused(machine, source, digests, rf"'pc\.ram': .*differ in chunk {row} ")


def test_what_does_not_fit_is_refused_before_anything_happens(
    saved: dict[str, Path], start_machine: StartMachine
) -> None:
    with open_contents(saved["plain"]) as source:
        machine = start_machine(memory_bytes=2 * RAM_BYTES, incoming=True)
        with pytest.raises(MismatchError, match="size in bytes differs"):
            stream_into(machine.monitor, source)
        other = start_machine(memory_bytes=RAM_BYTES, incoming=True)
        with pytest.raises(MismatchError, match="digests are of other blocks"):
            stream_into(other.monitor, source, digests=[[]])
        assert machine.monitor.migration().status == "none"
        running = start_machine(memory_bytes=RAM_BYTES, paused=True)
        with pytest.raises(PeerError, match="does not wait"):
            stream_into(running.monitor, source)


def at_the_fifth_piece(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something to QEMU in the middle of the stream."""

    def acting(*arguments: Any, **named: Any) -> Iterator[memoryview]:
        for number, piece in enumerate(plain_pieces(*arguments, **named)):
            if number == 5:
                act()
            yield piece

    monkeypatch.setattr(streamload, "plain_pieces", acting)


def test_qemu_dies_in_the_middle(
    saved: dict[str, Path], start_machine: StartMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = start_machine(memory_bytes=RAM_BYTES, incoming=True)
    at_the_fifth_piece(monkeypatch, machine.kill)
    with open_contents(saved["plain"]) as source:
        with pytest.raises(PeerError) as caught:
            stream_into(machine.monitor, source)
        assert "\n" not in str(caught.value)
        # The source has not suffered.
        assert collect(source)["pc.ram"] == saved["ram"].read_bytes()


def test_qemu_takes_nothing_for_long(
    saved: dict[str, Path], start_machine: StartMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = start_machine(memory_bytes=RAM_BYTES, incoming=True)
    monkeypatch.setattr(streamload, "_SILENCE_SECONDS", 0.2)
    awake = threading.Timer(1.0, machine.process.send_signal, [signal.SIGCONT])

    def stop() -> None:
        machine.process.send_signal(signal.SIGSTOP)
        awake.start()

    at_the_fifth_piece(monkeypatch, stop)
    with open_contents(saved["plain"]) as source, pytest.raises(PeerError, match="took nothing"):
        stream_into(machine.monitor, source)
    awake.join()
    assert machine.monitor.migration().status == "failed"
    assert machine.monitor.run_state() == "inmigrate"
