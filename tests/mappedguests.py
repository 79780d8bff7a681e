"""Images of small guests whose manifests say where their memory lay, for conversions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagewriter import Device, trailer
from smallguests import OPTIONS, Memories, ramblocks_of

from uringmig import DeviceState, MappedRamWriter
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.streaming import plain_pieces

#: (start, length, block, offset) of guest-physical ranges.
Ranges = Sequence[tuple[int, int, str | None, int]]


def save_guest(
    path: Path, guest: Memories, ranges: Ranges | None = None, devices: Sequence[Device] = ()
) -> Path:
    """Save a guest; its manifest has a map if there are ranges."""
    with MappedRamWriter(path, ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish(DeviceState(trailer(devices=devices)))
    if ranges is not None:
        edit_manifest(path, guest=facts(ranges), version=2)
    return path


def facts(ranges: Ranges, **more: Any) -> dict[str, Any]:
    """What a manifest says of a machine."""
    names = ("qemu_package", "machine", "cpu_type", "cpu_count", "kvm", "name", "uuid")
    return {
        "qemu_version": "10.0.2",
        "target": "x86_64",
        **dict.fromkeys(names),
        "memory_map": [
            {
                "start": start, "length": length, "block": block, "offset": offset,
                "read_only": False, "region": block or "elsewhere",
            }
            for start, length, block, offset in ranges
        ],
        **more,
    }  # fmt: skip


def edit_manifest(image: Path, **fields: Any) -> None:
    path = Path(f"{image}.manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_plain(image: Path, plain: Path) -> Path:
    """The same guest as a plain stream."""
    with MappedRamContents(image) as contents, plain.open("wb") as file:
        for piece in plain_pieces(contents):
            file.write(piece)
    return plain
