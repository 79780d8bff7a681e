"""A save's manifest has the digest of each 64 KiB, and a verification says which one is wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uringmig import MappedRamWriter, RamBlock, WriteOptions, verify
from uringmig.archive.copied import CopiedGuest
from uringmig.archive.copyjournal import BITS_BYTES, Chunk
from uringmig.archive.hot import write_hot
from uringmig.contents.opening import open_contents
from uringmig.errors import FormatError
from uringmig.image import manifest
from uringmig.image.digest import PIECE_BYTES, piecewise_digest
from uringmig.options import WINDOW_BYTES
from uringmig.reader import MappedRamReader
from uringmig.units import KiB, MiB

FAST = WriteOptions(channels=2, engine="pwrite")


def memory() -> NDArray[np.uint8]:
    """10 MiB and a page: dense, a hole of 3 MiB, every other page, and a short last piece."""
    data = np.zeros(10 * MiB + 4096, np.uint8)
    noise = np.random.default_rng(5).integers(1, 256, len(data), np.uint8)
    data[: 4 * MiB] = noise[: 4 * MiB]
    pages = data[7 * MiB :].reshape(-1, 4096)
    pages[::2] = noise[7 * MiB :].reshape(-1, 4096)[::2]
    return data


def save(path: Path, data: NDArray[np.uint8], **fields: Any) -> Path:
    blocks = [RamBlock("pc.ram", data, dense=False), RamBlock("rom", data[: 192 * KiB])]
    with MappedRamWriter(path, blocks, options=FAST, **fields) as writer:
        writer.write_all()
        writer.finish()
    return path


def sidecar(image: Path) -> Path:
    return Path(f"{image}.manifest.json")


def tables(image: Path) -> list[bytes]:
    said = manifest.decode(sidecar(image).read_bytes())
    return [block.pieces or b"" for block in said.blocks]


def expected_table(data: NDArray[np.uint8]) -> bytes:
    """Of all pieces that are not zero: in a block that is not dense, those with a set page."""
    _, found = piecewise_digest(data, [0], [len(data)])
    full = [
        number for number in range(len(found)) if data[number * PIECE_BYTES :][:PIECE_BYTES].any()
    ]
    return found[full].tobytes()


def test_a_save_has_them_and_they_fit(tmp_path: Path) -> None:
    data = memory()
    image = save(tmp_path / "vm", data)
    text = json.loads(sidecar(image).read_bytes())
    assert (text["version"], text["piece_bytes"]) == (2, 64 * KiB)
    assert base64.b64decode(text["blocks"][0]["pieces"]) == expected_table(data)
    assert tables(image) == [expected_table(data), expected_table(data[: 192 * KiB])]
    assert verify(image).mismatches == ()


def test_without_any_page_and_with_a_dense_block_over_a_hole(tmp_path: Path) -> None:
    """Zero pages that are set have a digest like all others; an empty guest's one page too."""
    empty = save(tmp_path / "empty", np.zeros(8 * MiB, np.uint8))
    zero = (
        expected_table(np.ones(1, np.uint8))[:0]
        + piecewise_digest(np.zeros(PIECE_BYTES, np.uint8), [0], [PIECE_BYTES])[1].tobytes()
    )
    assert tables(empty)[1] == zero * 3
    assert verify(empty).mismatches == ()


def test_a_later_round_is_in_them(tmp_path: Path) -> None:
    """They are of the memory as it was written last; a piece that became zero has none."""
    data = memory()
    with MappedRamWriter(
        tmp_path / "vm", [RamBlock("pc.ram", data, dense=False)], options=FAST
    ) as writer:
        writer.write_all()
        data[: 128 * KiB] = 0
        data[5 * MiB + 9] = 9
        changed = [*range(32), 5 * MiB // 4096]
        writer.write_pages("pc.ram", np.array(changed, np.int64))
        writer.finish()
    assert tables(tmp_path / "vm") == [expected_table(data)]
    assert verify(tmp_path / "vm").mismatches == ()


def test_no_manifest_no_digests(tmp_path: Path) -> None:
    blocks = [RamBlock("pc.ram", memory())]
    options = WriteOptions(channels=1, engine="pwrite", manifest=False)
    with MappedRamWriter(tmp_path / "vm", blocks, options=options) as writer:
        writer.write_all()
        writer.finish()
    assert not sidecar(tmp_path / "vm").exists()


def flip(path: Path, *offsets: int) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1]))


def test_damage_is_named_by_its_piece(tmp_path: Path) -> None:
    """Where in 4 MiB it is, in guest bytes; offset and digests are the chunk's."""
    image = save(tmp_path / "vm", memory())
    with MappedRamReader(image) as reader:
        pages = reader.image.blocks[0].pages_offset
    flip(image, pages + 2 * PIECE_BYTES + 5, pages + MiB, pages + 9 * MiB + 5)
    first, second = verify(image).mismatches
    assert "chunk 0" in str(first)
    assert "64 KiB from 0x20000, 0x100000" in str(first)
    assert (first.offset, first.block) == (pages, "pc.ram")
    assert "64 KiB from 0x900000" in str(second)
    assert second.offset == pages + 2 * WINDOW_BYTES


def test_many_damaged_pieces_are_counted(tmp_path: Path) -> None:
    image = save(tmp_path / "vm", memory())
    with MappedRamReader(image) as reader:
        pages = reader.image.blocks[0].pages_offset
    flip(image, *range(pages, pages + WINDOW_BYTES, PIECE_BYTES))
    (found,) = verify(image).mismatches
    assert "64 KiB from 0x0, 0x10000, 0x20000, 0x30000 and 60 more" in str(found)


def change(image: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    text = json.loads(sidecar(image).read_bytes())
    edit(text)
    sidecar(image).write_text(json.dumps(text))


def test_a_wrong_table_over_right_bytes_is_damage_too(tmp_path: Path) -> None:
    """Whoever checks single pages by the table would refuse good ones."""
    image = save(tmp_path / "vm", memory())

    def edit(text: dict[str, Any]) -> None:
        table = bytearray(base64.b64decode(text["blocks"][0]["pieces"]))
        table[3 * 12] ^= 1
        text["blocks"][0]["pieces"] = base64.b64encode(table).decode()

    change(image, edit)
    (found,) = verify(image).mismatches
    assert "the manifest is at odds with itself" in str(found)
    assert "64 KiB from 0x30000" in str(found)


def test_a_table_that_is_too_short_is_damage_and_the_rest_is_compared(tmp_path: Path) -> None:
    image = save(tmp_path / "vm", memory())
    with MappedRamReader(image) as reader:
        rom = reader.image.blocks[1].pages_offset
    flip(image, rom + PIECE_BYTES)
    change(image, lambda text: text["blocks"][0].update(pieces="AAAA"))
    short, damaged = verify(image).mismatches
    assert "digests of pieces" in str(short)
    assert (damaged.block, damaged.offset) == ("rom", rom)
    assert "64 KiB from 0x10000" in str(damaged)


def test_a_manifest_of_the_first_version_is_read_as_ever(tmp_path: Path) -> None:
    image = save(tmp_path / "vm", memory())

    def edit(text: dict[str, Any]) -> None:
        text["version"] = 1
        del text["piece_bytes"]
        for block in text["blocks"]:
            del block["pieces"]

    change(image, edit)
    assert verify(image).mismatches == ()
    with MappedRamReader(image) as reader:
        flip(image, reader.image.blocks[0].pages_offset)
    (found,) = verify(image).mismatches
    assert "chunk 0" in str(found)
    assert "64 KiB" not in str(found)


def test_a_hot_entry_has_them(tmp_path: Path) -> None:
    data = memory()
    with open_contents(save(tmp_path / "vm", data)) as contents:
        write_hot(contents, tmp_path / "copy", options=FAST)
    assert tables(tmp_path / "copy")[0] == expected_table(data)
    assert verify(tmp_path / "copy").mismatches == ()


def test_a_copy_that_went_on_from_a_journal_has_none(tmp_path: Path) -> None:
    """The journal has digests of windows only: half a table would be a wrong one."""
    with open_contents(save(tmp_path / "vm", memory())) as contents:
        guest = CopiedGuest(contents)
        assert guest.piece_tables() is not None
        guest.take_over([Chunk(0, 0, bytes(BITS_BYTES), bytes(16))])
        assert guest.piece_tables() is None


def test_holes_cost_nothing(tmp_path: Path) -> None:
    """An idle guest's manifest is as small as before, whatever its size."""
    data = np.zeros(256 * MiB, np.uint8)
    data[77 * MiB] = 1
    image = save(tmp_path / "vm", data)
    assert [len(table) for table in tables(image)] == [12, 36]
    text = json.loads(sidecar(image).read_bytes())
    for block in text["blocks"]:
        del block["pieces"]
    assert sidecar(image).stat().st_size < len(json.dumps(text, indent=1)) + 200


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.pop("piece_bytes"),
        lambda text: text.update(piece_bytes=4096),
        lambda text: text["blocks"][0].pop("pieces"),
        lambda text: text["blocks"][0].update(pieces="not base 64"),
        lambda text: text["blocks"][0].update(pieces=7),
        lambda text: text.update(version=1),
    ],
)
def test_half_a_table_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    image = save(tmp_path / "vm", memory()[: 8 * KiB * 24])
    change(image, edit)
    with pytest.raises(FormatError, match="manifest"):
        manifest.decode(sidecar(image).read_bytes())
