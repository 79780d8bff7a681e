"""Files made to hurt: mutated, cut, and claiming more than there is.

Whatever the bytes, reading ends in success or in a `UringmigError` of exit code 3: no other
exception, no endless loop, and no memory out of proportion to the data in the file. Where the
independent reader of the tests takes a file too, both must have read the same memory.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagereader
import imagewriter
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagewriter import PAGE, Block, Device, Image, build_image

from uringmig.errors import UringmigError
from uringmig.format.constants import TAIL_BYTES_MAX
from uringmig.options import ReadOptions, WriteOptions
from uringmig.reader import MappedRamReader
from uringmig.verify import verify
from uringmig.writer import MappedRamWriter, RamBlock

OPTIONS = ReadOptions(channels=1, depth=4, engine="pwrite", direct="off")


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def sound() -> Image:
    """Two blocks of 64 pages as close together as the format allows: a small file, all of it used.

    An early device, a late one, a uuid and a command make every part of the reader run.
    """
    return build_image(
        config=imagewriter.configuration(uuid=bytes(16), target_page_bits=12),
        blocks=[
            Block(idstr="pc.ram", used_length=64 * PAGE, pages_offset=0x1000,
                  pages={index: page(index) for index in (0, 1, 7, 63)}),
            Block(idstr="/rom@etc/x", used_length=64 * PAGE, pages_offset=0x42000,
                  pages={index: page(index) for index in (2, 3)}),
        ],
        tail=imagewriter.trailer(
            early=[Device(idstr="vm0", section_id=40, body=b"e" * 30)],
            devices=[Device(), Device(idstr="cpu", section_id=3, body=b"")],
            commands=imagewriter.command(11),
        ),
    )  # fmt: skip


SOUND = sound()
SOUND_BYTES = SOUND.to_bytes()
#: Where the main stream and the bitmaps are; the rest is pages, whose bytes are free.
STREAM = [
    *range(SOUND.fields["pc.ram.bitmap"] + 8),
    *range(SOUND.fields["/rom@etc/x.idstr"], SOUND.fields["/rom@etc/x.bitmap"] + 8),
    *range(SOUND.fields["trailer"], SOUND.size),
]
#: Lengths, sums and offsets that have hurt readers before.
NUMBERS = [
    0, 1, 2, 7, 8, 0x10, 0xFF, 0x100, 0xFFF, 0x1000, 0x1001, 0x2000, 0x40000, 0x41000, 0x42000,
    0xFFFF, 0x10000, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 52) - 1,
    (1 << 63) - 4096, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
    SOUND.size - 1, SOUND.size, SOUND.size + 1,
]  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A change of the bytes from ``at`` on: ``cut`` of them replaced by ``put``."""

    at: int
    cut: int
    put: bytes


def numbers() -> st.SearchStrategy[bytes]:
    """A number in one of the stream's widths."""
    return st.builds(
        lambda number, width: struct.pack(">Q", number)[8 - width :],
        st.one_of(st.sampled_from(NUMBERS), st.integers(0, (1 << 64) - 1)),
        st.sampled_from([1, 2, 4, 8]),
    )


def mutations() -> st.SearchStrategy[Mutation]:
    at = st.one_of(
        st.sampled_from(sorted(set(SOUND.fields.values()))),
        st.sampled_from(STREAM),
        st.integers(0, SOUND.size),
    )
    put = st.one_of(numbers(), st.binary(max_size=12), st.builds(bytes, st.integers(0, 5000)))
    overwritten = st.builds(lambda at, put: Mutation(at, len(put), put), at, put)
    replaced = st.builds(Mutation, at, st.integers(0, 40), put)
    shortened = st.builds(lambda at: Mutation(at, SOUND.size, b""), at)
    copied = st.builds(
        lambda at, source, length: Mutation(at, length, SOUND_BYTES[source : source + length]),
        at,
        st.sampled_from(STREAM),
        st.integers(1, 64),
    )
    return st.one_of(overwritten, overwritten, replaced, copied, shortened)


def mutate(data: bytes, changes: list[Mutation]) -> bytes:
    mutated = bytearray(data)
    for change in changes:
        mutated[change.at : change.at + change.cut] = change.put
    return bytes(mutated)


def refusal(action: Callable[[], object]) -> UringmigError | None:
    """How an action was refused; no other exception is a refusal."""
    try:
        action()
    except UringmigError as error:
        return error
    return None


def read_all(path: Path) -> dict[str, bytes] | None:
    """What the product reads; None where it refuses as it should; anything else is a failure."""
    contents = {}

    def read() -> None:
        verify(path, options=OPTIONS)
        with MappedRamReader(path, options=OPTIONS) as reader:
            for info in reader.blocks:
                assert info.used_length <= path.stat().st_size, "more than the file can hold"
                memory = bytearray(b"\xa5" * info.used_length)
                reader.read_into(info.idstr, memory)
                contents[info.idstr] = bytes(memory)

    error = refusal(read)
    if error is None:
        return contents
    assert error.exit_code == 3, repr(error)
    assert "\n" not in str(error)
    return None


def check(path: Path, data: bytes) -> bool:
    """Read a hostile file both ways; returns whether the product took it."""
    path.write_bytes(data)
    found = read_all(path)
    try:
        oracle = imagereader.read_image(path, placement="any")
    except (ValueError, RecursionError):
        return found is not None
    if found is None:
        assert not any(block.bits for block in oracle.blocks), "refused, and nothing is wrong"
    else:
        assert found == oracle.contents
    return found is not None


def test_unharmed_file_is_read(tmp_path: Path) -> None:
    """Otherwise all the refusals below could be of something else."""
    assert check(tmp_path / "image", SOUND_BYTES)


@pytest.mark.parametrize("flip", [0x01, 0x10, 0x80, 0xFF])
def test_every_byte_of_the_stream_flipped(tmp_path: Path, flip: int) -> None:
    """No byte outside the page areas can bring the reader down."""
    refused = 0
    for at in STREAM:
        data = bytearray(SOUND_BYTES)
        data[at] ^= flip
        refused += not check(tmp_path / "image", bytes(data))
    # Bitmap bits, machine name, device bodies and such are free; the frame is not.
    assert refused > len(STREAM) // 3


def test_cut_at_every_byte_of_the_stream(tmp_path: Path) -> None:
    """No prefix of an image is an image."""
    for size in STREAM:
        assert not check(tmp_path / "image", SOUND_BYTES[:size])


@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(mutations(), min_size=1, max_size=4))
def test_mutated_files(tmp_path_factory: pytest.TempPathFactory, changes: list[Mutation]) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated"
    check(path, mutate(SOUND_BYTES, changes))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), kept=st.sampled_from([0, 4, 8, 9, *STREAM[:160]]))
def test_any_bytes_after_a_sound_beginning(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kept: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    check(path, SOUND_BYTES[:kept] + data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of our own with its manifest."""
    path = tmp_path_factory.mktemp("saved") / "image"
    blocks = [
        RamBlock("pc.ram", page(1) * 3 + bytes(2 * PAGE) + page(2)),
        RamBlock("rom", bytes(PAGE) + page(3)),
    ]
    options = WriteOptions(channels=1, engine="pwrite", direct="off", dense_up_to=0)
    with MappedRamWriter(path, blocks, options=options) as writer:
        writer.write_all()
        writer.finish()
    assert not verify(path, options=OPTIONS).mismatches
    return path


@settings(max_examples=500, deadline=None)
@given(
    changes=st.lists(
        st.builds(
            Mutation, st.integers(0, 2500), st.integers(0, 40),
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from([b"-1", b"1e999", b"null", b"[", b'"', b"18446744073709551616"]),
            ),
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_mutated_manifests(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[Mutation]
) -> None:
    """A manifest is a file like any other: refused, or compared with what is there."""
    path = tmp_path_factory.getbasetemp() / "with-manifest"
    if not path.exists():
        shutil.copy(saved, path)
    manifest = Path(f"{saved}.manifest.json").read_bytes()
    Path(f"{path}.manifest.json").write_bytes(mutate(manifest, changes))
    error = refusal(lambda: verify(path, options=OPTIONS))
    assert error is None or error.exit_code == 3, repr(error)


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_deep_manifest(saved: Path, tmp_path: Path, depth: int) -> None:
    path = tmp_path / "image"
    shutil.copy(saved, path)
    Path(f"{path}.manifest.json").write_bytes(b'{"x":' * depth + b"1" + b"}" * depth)
    with pytest.raises(UringmigError) as caught:
        verify(path, options=OPTIONS)
    assert caught.value.exit_code == 3


# Sparse files that claim more than any host has. They cost nothing to make on a tmpfs, which takes
# files of 8 EiB less a page. Each is read in a process of its own, whose peak memory is looked at.

EIB = 1 << 60
MIB = 1 << 20
PEAK_BYTES_MAX = 100 * MIB

READ = """
import json, sys
from uringmig.errors import UringmigError
from uringmig.options import ReadOptions
from uringmig.reader import MappedRamReader
from uringmig.verify import verify

options = ReadOptions(channels=1, depth=4, engine="pwrite", direct="off")
def kibibytes(name):  # getrusage would count the peak of the process that forked this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))
before = kibibytes("VmRSS")
result = {"error": None, "exit_code": 0}
try:
    with MappedRamReader(sys.argv[1], options=options) as reader:
        result["pages_set"] = sum(info.pages_set for info in reader.blocks)
        first = reader.blocks[0]
        reader.read_into(first.idstr, bytearray(4096), start=0, length=4096)
    del reader
    verify(sys.argv[1], options=options)
except UringmigError as error:
    result.update(error=str(error), exit_code=error.exit_code)
result["grown"] = (kibibytes("VmHWM") - before) << 10
sys.stdout.write(json.dumps(result))
"""


@pytest.fixture
def sparse() -> Iterator[Path]:
    """A name on a file system without a limit on sparse files."""
    path = Path("/dev/shm") / f"uringmig-hostile-{random.SystemRandom().randrange(1 << 60):x}"
    yield path
    path.unlink(missing_ok=True)


def read_apart(path: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ram(used_length: int, **knobs: Any) -> Block:
    given = {"idstr": "pc.ram", "used_length": used_length, "bitmap": b"\x01", **knobs}
    return Block(**given)


def many(count: int, used_length: int) -> list[Block]:
    return [ram(used_length, idstr=f"block{index}") for index in range(count)]


def with_text(text: bytes) -> dict[str, Any]:
    return {"blocks": [ram(PAGE)], "tail": imagewriter.trailer(text=text)}


CLAIMS: dict[str, tuple[dict[str, Any], int | None, bool]] = {
    # name: (knobs, size of the file or None for as written, whether it is taken)
    "a block of 1 EiB": ({"blocks": [ram(EIB)]}, None, False),
    "a block of 4 PiB": ({"blocks": [ram(1 << 52)]}, None, False),
    "a block of 32 TiB": ({"blocks": [ram(1 << 45)]}, None, True),
    "4097 blocks": ({"blocks": many(4097, PAGE)}, None, False),
    "pages at 4 EiB": ({"blocks": [ram(PAGE, pages_offset=4 * EIB)]}, None, True),
    "a bitmap at 4 EiB": (
        {"blocks": [ram(PAGE, bitmap_offset=4 * EIB, bitmap=b"\x01" + bytes(7))]}, None, True,
    ),
    "7 EiB after the stream": ({"blocks": [ram(PAGE)]}, 7 * EIB, False),
    "7 EiB of header": (
        {"blocks": [], "config": imagewriter.configuration(machine_length=(1 << 32) - 1)},
        7 * EIB, False,
    ),
    "4 GiB of capabilities": (
        {"blocks": [], "config": imagewriter.configuration(capability_count=(1 << 32) - 1)},
        7 * EIB, False,
    ),
    "nothing at all, 7 EiB of it": ({"blocks": [], "magic": 0}, 7 * EIB, False),
    "a description of 4 GiB": (
        {"blocks": [ram(PAGE)], "tail": imagewriter.trailer(text_length=(1 << 32) - 1)},
        4 << 30, False,
    ),
    "a million devices": (
        with_text(b'{"devices":[' + b'{"name":"a","instance_id":0},' * 1_000_000 + b"0]}"),
        None, False,
    ),
    "30 MiB of brackets": (with_text(b"[" * (30 * MIB)), None, False),
    "30 MiB of keys": (with_text(b'{"devices":[],"a":"' + b"x" * (30 * MIB) + b'"}'), None, True),
    "30 MiB of fields": (
        with_text(b'{"devices":[{"name":"a","instance_id":0,"fields":['
                  + b'{"size":1},' * (2 * MIB) + b"0]}]}"),
        None, False,
    ),
    "30 MiB of description heads": (
        {"blocks": [ram(PAGE)], "tail": b"\x06\x00\x00\x00\x06" * (6 * MIB)}, None, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_cost_nothing(sparse: Path, name: str) -> None:
    """Peak memory grows with what the file holds, not with what it says."""
    knobs, size, taken = CLAIMS[name]
    image = build_image(**knobs)
    image.write(sparse, size=size)
    held = sparse.stat().st_blocks * 512
    result = read_apart(sparse)
    assert result["exit_code"] == (0 if taken else 3), result
    assert result["grown"] < PEAK_BYTES_MAX + 3 * held, (result, held)


@pytest.mark.parametrize(("hole", "taken"), [(200 * MIB, True), (257 * MIB, False)])
def test_device_state_is_bounded(sparse: Path, hole: int, taken: bool) -> None:
    """Device state is held whole, and in few copies, but never more of it than the stated limit."""
    device = Device(body=b"", described_bytes=hole)
    head = imagewriter.full_section(device)[:-5]
    text = imagewriter.description_json([device])
    rest = imagewriter.footer(2) + imagewriter.EOF_BYTE + imagewriter.description(text)
    image = build_image(blocks=[ram(PAGE)], tail=head)
    image.write(sparse, size=image.size + hole + len(rest))
    with sparse.open("r+b") as file:
        file.seek(image.size + hole)
        file.write(rest)
    result = read_apart(sparse)
    assert result["exit_code"] == (0 if taken else 3), result
    assert result["grown"] < PEAK_BYTES_MAX + 3 * TAIL_BYTES_MAX, result
