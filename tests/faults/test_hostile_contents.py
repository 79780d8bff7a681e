"""Sources made to hurt: every kind of file bent, cut and lying; and devices that fail under one.

Whatever the bytes, opening and reading ends in success or in an error of exit code 3 (2 where a
memory file is no memory): one line, no other exception, no endless loop, bounded memory.
"""

from __future__ import annotations

import errno
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import imagewriter
import numpy as np
import pytest
from contentsreading import collect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagewriter import PAGE, Device
from mainstreams import (
    EOS,
    PlainBlock,
    page_record,
    plain_start,
    plain_tail,
    ram_section,
    word,
    zero_record,
)
from realguest import shared_path

from uringmig.contents import plainfile
from uringmig.contents.mappedram import MappedRamContents
from uringmig.contents.memoryfiles import MemoryFileBlock, open_memory
from uringmig.contents.opening import open_contents
from uringmig.contents.plainfile import PlainFileContents
from uringmig.contents.source import Contents, all_rows
from uringmig.errors import FormatError, StorageError, UringmigError
from uringmig.format import constants
from uringmig.format.plainstream import PlainComposer
from uringmig.options import ReadOptions
from uringmig.storage.engine import Engine, Operation
from uringmig.storage.enginechoice import EngineChoice
from uringmig.storage.pwrite import PwriteEngine
from uringmig.testing.faults import FaultEngine, random_outcomes

QUICK = ReadOptions(channels=1, depth=4, engine="pwrite", direct="off")
#: More rows than this are not read: a claim that costs nothing until then.
ROWS_MAX = 64
MEMORY = 6 * PAGE
DEVICES = [Device(), Device(idstr="cpu", section_id=3, body=b"\x06\x00\x00\x00\x02{}")]
EARLY = [Device(idstr="early", section_id=40, body=b"e" * 30)]


def page(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(PAGE)


def plain_stream(capabilities: Iterable[str] = ()) -> bytes:
    shared = 0 if capabilities else None
    blocks = [
        PlainBlock(idstr="pc.ram", used_length=MEMORY, gpa=shared),
        PlainBlock(idstr="rom", used_length=2 * PAGE, gpa=shared),
    ]
    body = b""
    if not capabilities:
        body = page_record(0, page(0), "pc.ram") + zero_record(PAGE) + page_record(0, page(1))
        body += b"".join(page_record(at * PAGE, page(at)) for at in (2, 3, 5)) + zero_record(PAGE)
    body += page_record(PAGE, page(8), "rom") + zero_record(0)
    sections = ram_section(2, body + word(EOS)) + ram_section(3, word(EOS))
    return plain_start(blocks, capabilities=list(capabilities)) + plain_tail(
        early=EARLY, devices=DEVICES, ram=sections
    )


def libvirt_header(form: int, *, length: int = 200) -> bytes:
    fields = struct.pack("<5I", 2, length, 1, form, 0)
    return (b"LibvirtQemudSave" + fields + bytes(56) + b"<domain/>\0").ljust(92 + length, b"\0")


def sparse_image() -> bytes:
    return imagewriter.build_image(
        base=292,
        before=libvirt_header(6),
        blocks=[
            imagewriter.Block(
                idstr="pc.ram", used_length=MEMORY, pages_offset=0x1000, pages={1: page(1)}
            )
        ],
        tail=imagewriter.trailer(early=EARLY, devices=DEVICES),
    ).to_bytes()


FILES = {
    "plain": plain_stream(),
    "raw": libvirt_header(0) + plain_stream(),
    "sparse": sparse_image(),
    "state": plain_stream(["x-ignore-shared"]),
}


@pytest.fixture(scope="module")
def ram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "ram"
    path.write_bytes(bytes(PAGE) + page(3) * 5)
    return path


def open_kind(kind: str, path: Path, ram: Path) -> Contents:
    if kind == "state":
        return open_memory([MemoryFileBlock("pc.ram", ram)], path)
    return open_contents(path, options=QUICK)


def read_all(kind: str, path: Path, ram: Path) -> None:
    """Open a hostile file and read it, what it claims in proportion to what it holds."""
    with open_kind(kind, path, ram) as source:
        stored = source.stored_bytes()
        assert kind == "state" or stored <= path.stat().st_size, "more pages than are in it"
        rows = all_rows(source.blocks)[:ROWS_MAX]
        windows = list(source.windows(rows))
        assert len(windows) == len(rows)
        for window in windows:
            assert window.data is None or window.data.total_bytes <= len(window.memory)
        # What was taken can be composed into a stream again.
        PlainComposer(
            source.configuration,
            [(block.idstr, block.used_length) for block in source.blocks],
            section_id=source.section_id,
            device_state=source.device_state(),
        )


def taken(kind: str, path: Path, ram: Path, data: bytes) -> bool:
    """Whether a hostile file was taken; else it was refused as it should be."""
    path.write_bytes(data)
    try:
        read_all(kind, path, ram)
    except UringmigError as error:
        refusal = error
    else:
        return True
    # With another length than its block's the memory file is the wrong argument.
    assert refusal.exit_code == 3 or (kind == "state" and refusal.exit_code == 2), repr(refusal)
    assert "\n" not in str(refusal)
    return False


@pytest.mark.parametrize("kind", FILES)
def test_unharmed_files_are_read(kind: str, tmp_path: Path, ram: Path) -> None:
    """Otherwise all the refusals below could be of something else."""
    assert taken(kind, tmp_path / "file", ram, FILES[kind])


def interesting(data: bytes) -> list[int]:
    """Offsets of bytes that are not amid a page: of headers, words, names, sections."""
    values = np.frombuffer(data, np.uint8)
    busy = np.lib.stride_tricks.sliding_window_view(values == 0, 5).any(axis=1)
    return sorted({*range(min(500, len(data))), *np.flatnonzero(busy).tolist()})


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_bent_files(
    kind: str, tmp_path_factory: pytest.TempPathFactory, ram: Path, data: st.DataObject
) -> None:
    sound = FILES[kind]
    bent = bytearray(sound)
    numbers = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0xFFFFFFFF, 1 << 31, 1 << 63, 1 << 45])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(interesting(sound)) | st.integers(0, len(sound)))
        put = data.draw(
            st.binary(max_size=9)
            | st.builds(
                lambda n, w: struct.pack(">Q", n)[8 - w :], numbers, st.sampled_from([1, 4, 8])
            )
            | st.builds(
                lambda start, length: sound[start : start + length],
                st.sampled_from(interesting(sound)),
                st.integers(1, 5000),
            )
        )
        cut = data.draw(st.sampled_from([len(put), len(put), 0, 1, 4096, len(sound)]))
        bent[at : at + cut] = put
    taken(kind, tmp_path_factory.getbasetemp() / f"bent-{kind}", ram, bytes(bent))


@pytest.mark.parametrize("kind", FILES)
def test_no_beginning_of_a_file_is_one(kind: str, tmp_path: Path, ram: Path) -> None:
    sound = FILES[kind]
    for size in {*range(0, len(sound), 211), *range(len(sound) - 40, len(sound))}:
        assert not taken(kind, tmp_path / "cut", ram, sound[:size]), size


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_every_byte_of_libvirts_header(flip: int, tmp_path: Path, ram: Path) -> None:
    refused = 0
    for at in range(36):
        bent = bytearray(FILES["raw"])
        bent[at] ^= flip
        refused += not taken("raw", tmp_path / "bent", ram, bytes(bent))
    assert refused > 25


def test_a_sparse_file_as_long_as_there_are(ram: Path) -> None:
    """It begins and ends as a stream does, and has 4 PiB of hole between."""
    path = shared_path()
    try:
        with path.open("wb") as file:
            file.write(FILES["plain"][:5000])
            file.seek(4 << 50)
            file.write(FILES["plain"][-1500:])
        tracemalloc.start()
        with pytest.raises(FormatError, match=r"ram flags|unknown ramblock"):
            open_contents(path, options=QUICK)
        # What is counted here is Python's and numpy's; the buffers are counted by options.
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
        path.unlink()


def test_stretches_of_a_file_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = big_file("plain", tmp_path / "file")
    monkeypatch.setattr(plainfile, "_STRETCH_BYTES", 4 << 20)
    with open_contents(tmp_path / "file") as source:
        assert collect(source) == {"a": memory}


def test_device_state_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "TAIL_BYTES_MAX", 100)
    body = page_record(0, page(0), "a") + word(EOS)
    devices = [Device(), Device(idstr="cpu", body=b"c" * 80)]
    tail = plain_tail(ram=ram_section(3, body), devices=devices)
    stream = plain_start([PlainBlock(idstr="a", used_length=PAGE)]) + tail
    (tmp_path / "plain").write_bytes(stream)
    with pytest.raises(FormatError, match="bytes of device state"):
        open_contents(tmp_path / "plain")


def test_a_memory_file_that_is_none(tmp_path: Path, ram: Path) -> None:
    (tmp_path / "state").write_bytes(FILES["state"])
    (tmp_path / "short").write_bytes(bytes(PAGE))
    for path in (tmp_path / "short", tmp_path, tmp_path / "missing"):
        with pytest.raises(UringmigError) as caught:
            open_memory([MemoryFileBlock("pc.ram", path)], tmp_path / "state")
        assert caught.value.exit_code in (2, 5)
    with pytest.raises(UringmigError, match="each once"):
        open_memory([MemoryFileBlock("pc.ram", ram)] * 2, tmp_path / "state")


# Devices that fail under a source.

Open = Callable[[Path, EngineChoice], Contents]
KINDS: dict[str, Open] = {
    "plain": lambda path, engine: PlainFileContents(path, engine=engine),
    "mapped": lambda path, engine: MappedRamContents(path, engine=engine),
}


def big_file(kind: str, path: Path) -> bytes:
    """A guest of 12 MiB in some form; returns its memory."""
    memory = np.random.default_rng(5).bytes(12 << 20)
    pages = {at: memory[at * PAGE : (at + 1) * PAGE] for at in range(len(memory) // PAGE)}
    if kind == "mapped":
        block = imagewriter.Block(idstr="a", used_length=len(memory), pages=pages)
        imagewriter.build_image(blocks=[block]).write(path)
    else:
        records = [page_record(0, pages[0], "a")]
        records += [page_record(at * PAGE, pages[at]) for at in range(1, len(pages))]
        start = plain_start([PlainBlock(idstr="a", used_length=len(memory))])
        path.write_bytes(start + plain_tail(ram=ram_section(3, b"".join(records) + word(EOS))))
    return memory


def faulty(script: Callable[[], Iterable[int]], *, seed: int = 1) -> EngineChoice:
    def make(fd: int, operation: Operation, depth: int) -> Engine:
        return FaultEngine(PwriteEngine(fd, operation, depth), script(), seed=seed, hold_max=3)

    return EngineChoice("faulty", make)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_short_and_passing_results_are_no_failure(kind: str, seed: int, tmp_path: Path) -> None:
    memory = big_file(kind, tmp_path / "file")
    engine = faulty(lambda: random_outcomes(seed), seed=seed)
    with KINDS[kind](tmp_path / "file", engine) as source:
        assert collect(source) == {"a": memory}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_disk_is_one(kind: str, tmp_path: Path) -> None:
    """EIO at any request: the windows that came are right, and the error names its place."""
    memory = big_file(kind, tmp_path / "file")
    armed = False
    with KINDS[kind](
        tmp_path / "file", faulty(lambda: [1 << 62] * 3 + [-errno.EIO] if armed else [])
    ) as source:
        armed = True
        seen = 0

        def read() -> None:
            nonlocal seen
            for read in source.windows(all_rows(source.blocks)):
                at = read.row << 22
                assert read.memory.tobytes() == memory[at : at + len(read.memory)]
                seen += 1

        with pytest.raises(StorageError, match=r"read failed at offset .*EIO"):
            read()
        assert seen < 3
        armed = False
        assert collect(source) == {"a": memory}


def test_an_error_while_a_plain_stream_is_indexed(tmp_path: Path) -> None:
    big_file("plain", tmp_path / "file")
    with pytest.raises(StorageError, match="EIO"):
        PlainFileContents(tmp_path / "file", engine=faulty(lambda: [1 << 62, -errno.EIO]))
