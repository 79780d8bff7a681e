"""Small entries for archives: images of small guests, hot, with the fields of an entry."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from smallguests import MIB, OPTIONS, PWRITE, Memories, make_guest, ramblocks_of

from uringmig import MappedRamReader, MappedRamWriter
from uringmig.archive.cold import open_cold, write_cold
from uringmig.archive.copied import EntryLabel
from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive
from uringmig.archive.entry import Entry
from uringmig.contents.mappedram import MappedRamContents
from uringmig.image import digest, manifest
from uringmig.storage.publication import Publication

KIB = 1 << 10


def publish_hot_image(path: Path, guest: Memories, **fields: Any) -> None:
    """Publish an image whose manifest makes it an entry; ``fields`` replace what it says."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        with MappedRamWriter(image, ramblocks_of(guest), options=OPTIONS, engine=PWRITE) as writer:
            writer.write_all()
            writer.finish()
        with MappedRamReader(image) as reader:
            tail = reader.device_state().tail
        said = json.loads(Path(f"{image}{manifest.SUFFIX}").read_bytes())
        data = image.read_bytes()
    blocks = [
        (block["idstr"], block["used_length"], [bytes.fromhex(one) for one in block["digests"]])
        for block in said["blocks"]
    ]
    said["created"] = fields.pop("created", said["created"])
    said["archive"] = {
        "name": path.name.removesuffix(".mig"),
        "vm": "web1",
        "tier": "hot",
        "host": "node1",
        "source_kind": "mapped-ram",
        "source_path": "/var/web1.mig",
        "source_fingerprint": "",
        "content_digest": digest.content_digest(
            machine=said["machine"], blocks=blocks, device_state=tail
        ),
        "memory_bytes": sum(block["used_length"] for block in said["blocks"]),
        "stored_bytes": 4096 * sum(block["pages_set"] for block in said["blocks"]),
    } | fields
    publication = Publication(path, sidecar=manifest.SUFFIX)
    publication.main.write_at(0, data)
    publication.main.sync()
    publication.publish(json.dumps(said).encode())


def add_entry(
    archive: Archive, name: str, *, seed: int = 0, ram_bytes: int = 512 * KIB, **fields: Any
) -> Entry:
    """Make a hot entry of a small guest."""
    image = archive.place(name, "hot").image
    publish_hot_image(image, make_guest(seed, ram_bytes=ram_bytes), **fields)
    return archive.add(image)


def put_damage(archive: Archive, name: str, *damaged: Damage) -> None:
    """Let places of an entry be known to be damaged, as a verification does."""
    archive.note_checked(archive.find(name), cursor=0, verified_at=None, damaged=damaged)


def add_cold_entry(
    archive: Archive, name: str, *, seed: int = 0, ram_bytes: int = 512 * KIB, vm: str = "web1"
) -> Entry:
    """Make a cold entry of the same guest as `add_entry` with this seed and size."""
    image = archive.place(name, "cold").image
    label = EntryLabel(name=name, vm=vm, host="node1")
    guest = make_guest(seed, ram_bytes=ram_bytes)
    with tempfile.TemporaryDirectory() as folder:
        hot = Path(folder) / "image"
        with MappedRamWriter(hot, ramblocks_of(guest), options=OPTIONS, engine=PWRITE) as writer:
            writer.write_all()
            writer.finish()
        with MappedRamContents(hot) as contents:
            write_cold(contents, image, options=OPTIONS, label=label, engine=PWRITE)
    return archive.add(image)


def flip(path: str, offset: int) -> None:
    """Let one bit on the disk rot."""
    with Path(path).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
        file.flush()
        os.fsync(file.fileno())


def place_of(entry: Entry, chunk: int) -> tuple[int, str]:
    """Offset of a byte that a chunk's digest covers, and of the chunk as it is told.

    For entries of 9 MiB of RAM: three chunks, then one of each other block.
    """
    row = min(chunk, 2)
    block = max(0, chunk - 2)
    row = row if block == 0 else 0
    if entry.tier == "cold":
        with open_cold(entry.image) as cold:
            frames = cold.index.frames
            number = [*zip(frames.block_index, frames.row, strict=True)].index((block, row))
            return int(frames.offset[number]) + 100, hex(frames.offset[number])
    with MappedRamReader(entry.image) as reader:
        info = reader.blocks[block]
        bits = reader.bitmap(info.idstr)[row * 128 : row * 128 + 128]
        page = next(n for n in range(len(bits) * 8) if bits[n // 8] >> n % 8 & 1)
        start = info.layout.pages_offset + row * 4 * MIB
        return start + page * 4096 + 7, hex(start)
