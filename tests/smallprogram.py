"""The real program, but for small guests: a checkpoint is due after 1 MiB, and looked for often.

Run as a script in place of ``uringmig``; its workers are of the same kind. Some commands are added
that do by the library what no command does for so little: ``save-guest PATH NUMBER WITH-MANIFEST``,
``store-profile FILE``, ``remove-entry ARCHIVE NAME``, ``heal ARCHIVE``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from smallguests import OPTIONS, PWRITE, Memories, aligned, ramblocks_of

from uringmig import MappedRamWriter
from uringmig.archive import copyrun
from uringmig.archive.directory import Archive
from uringmig.batch import pool, worker
from uringmig.bench import profile
from uringmig.cli import main
from uringmig.storage.devices import place_of
from uringmig.transfer import channel
from uringmig.units import KiB, MiB

COMMAND = [sys.executable, __file__]


def be_small(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Make checkpoints of what is small, in this process; a test passes one that is undone."""
    set_attribute(copyrun, "CHECKPOINT_BYTES", MiB)
    set_attribute(channel, "_INTERVAL_SECONDS", 0.001)


def small_guest(number: int, *, ram_bytes: int = 512 * KiB) -> Memories:
    """A guest nearly without data, so that traces of it are small; each number has another one.

    Two thirds of the pages that one number sets are set in the next one too, to other bytes.
    """
    source = np.random.default_rng(number)
    guest = {"pc.ram": aligned(ram_bytes), "pc.rom": aligned(16 * KiB)}
    ram = guest["pc.ram"].reshape(-1, 4096)
    for at in range(0, len(ram), 32):
        ram[at + number : at + number + 3] = source.integers(1, 256, (3, 4096), np.uint8)
    guest["pc.rom"][:4096] = number + 1
    return guest


def save_guest(
    path: Path, number: int, *, with_manifest: bool = True, ram_bytes: int = 512 * KiB
) -> None:
    """Save a small guest by the library."""
    guest = small_guest(number, ram_bytes=ram_bytes)
    options = replace(OPTIONS, manifest=with_manifest)
    with MappedRamWriter(path, ramblocks_of(guest), options=options, engine=PWRITE) as writer:
        writer.write_all()
        writer.finish()


def store_profile(file: Path) -> None:
    """Keep the settings of a place, as `bench` does in the end."""
    settings = profile.ProfileSettings(
        channels=2, depth=8, block_size=MiB, bridge=16 * KiB, direct="preferred", engine="pwrite"
    )
    measured = profile.Measured(ceiling=MiB, rate=MiB, spread=0.1, request_seconds=0.01)
    place = place_of(str(file.parent))
    entry = profile.ProfileEntry(
        place=place, created="2026-01-01T00:00:00Z", settings=settings, measured=measured
    )
    profile.store_entry(entry, file)


def remove_entry(archive: Path, name: str) -> None:
    """Remove an entry of an archive."""
    with Archive.open(archive, write=True) as opened:
        opened.remove(name)


if __name__ == "__main__":
    be_small()
    pool.LocalPool.__init__.__kwdefaults__["command"] = (*COMMAND, "worker")  # type: ignore[index]
    match sys.argv[1:]:
        case ["worker", number]:
            sys.argv[1:] = [number]
            worker.main()
        case ["save-guest", path, number, with_manifest]:
            save_guest(Path(path), int(number), with_manifest=with_manifest == "True")
            print("saved", flush=True)
        case ["store-profile", path]:
            store_profile(Path(path))
            print("stored", flush=True)
        case ["remove-entry", path, name]:
            remove_entry(Path(path), name)
            print("removed", flush=True)
        case ["heal", path]:
            Archive.open(path, write=True).close()
        case _:
            main()
