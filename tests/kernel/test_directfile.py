"""The page descriptor: O_DIRECT required, preferred or off on real file systems; passed pairs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from imagereader import read_image
from loopdisk import mounted
from smallguests import MIB, OPTIONS, PAGE, check_image, copy_of, make_guest, ramblocks_of

from uringmig import (
    MappedRamReader,
    MappedRamWriter,
    ReadOptions,
    StateError,
    StorageError,
    WriteOptions,
    verify,
)
from uringmig.storage import directfile
from uringmig.storage.directfile import Alignment, open_direct
from uringmig.storage.engine import Operation

KINDS = ["ext4", "xfs", "btrfs", "tmpfs"]


def takes_direct(path: Path) -> bool:
    """Ask the kernel by doing: open and one aligned read."""
    path.write_bytes(bytes(PAGE))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017 - it need not fail
        return False
    os.close(fd)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_save_on_a_real_file_system(tmp_path: Path, kind: str) -> None:
    """Every mode does what it says there, and the result records what really ran."""
    guest = make_guest()
    with mounted(kind, tmp_path, size=320 * MIB) as folder:
        can = takes_direct(folder / "trial")
        assert can or kind == "tmpfs"
        for mode in ("required", "preferred", "off"):
            options = WriteOptions(
                channels=2, depth=4, block_size=64 << 10, direct=mode, dense_up_to=256 << 10
            )  # fmt: skip
            with ExitStack() as stack:
                if mode == "required" and not can:
                    stack.enter_context(pytest.raises(StorageError, match="O_DIRECT is required"))
                writer = stack.enter_context(
                    MappedRamWriter(folder / "vm", ramblocks_of(guest), options=options)
                )
                writer.write_all()
                result = writer.finish()
                assert result.direct == (mode != "off" and can)
                assert any("no O_DIRECT" in note for note in result.notes) == (
                    mode == "preferred" and not can
                )
                check_image(folder / "vm", copy_of(guest))
                reading = ReadOptions(direct=mode)
                assert not verify(folder / "vm", options=reading).mismatches


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_alignment_is_probed_and_works(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path, size=320 * MIB) as folder:
        (folder / "file").touch()
        file = open_direct(str(folder / "file"), Operation.WRITE, "required")
        try:
            assert file.direct
            assert file.note is None
            for value in (file.alignment.memory, file.alignment.offset):
                assert 0 < value <= PAGE
                assert value & (value - 1) == 0
            assert os.get_blocking(file.fd)
        finally:
            os.close(file.fd)


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize(
    ("alignment", "reason"),
    [(Alignment(0, 0), "refuses it"), (Alignment(512, 65536), "65536-byte alignment")],
)
def test_alignment_that_pages_cannot_keep_is_no_direct_io(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: Operation,
    alignment: Alignment,
    reason: str,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    monkeypatch.setattr(directfile, "probe_alignment", lambda fd: alignment)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only how many
    with pytest.raises(StorageError, match=f"required.*{reason}.*--direct preferred"):
        open_direct(str(path), operation, "required")
    file = open_direct(str(path), operation, "preferred")
    assert not file.direct
    assert reason in str(file.note)
    os.close(file.fd)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    for mode in ("required", "preferred", "off"):
        with pytest.raises(StorageError) as caught:
            open_direct(str(tmp_path / "none"), Operation.READ, mode)
        assert caught.value.errno == errno.ENOENT


def test_fallback_of_a_reader_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = make_guest()
    with MappedRamWriter(tmp_path / "vm", ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        writer.finish()
    monkeypatch.setattr(directfile, "probe_alignment", lambda fd: Alignment(0, 0))
    with MappedRamReader(tmp_path / "vm") as reader:
        assert any("no O_DIRECT" in note for note in reader.notes)
    with pytest.raises(StorageError, match="required"):
        MappedRamReader(tmp_path / "vm", options=ReadOptions(direct="required"))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """What a management application passes: a direct and a plain open of one file."""
    path = str(tmp_path / "passed")
    main = os.open(path, os.O_RDWR | os.O_CREAT)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield direct, main
    os.close(direct)
    os.close(main)


def test_save_through_passed_descriptors(tmp_path: Path, pair: tuple[int, int]) -> None:
    """They stay open and the caller's, the flags as they were; no manifest, no other name."""
    guest = make_guest()
    with MappedRamWriter.on_descriptors(*pair, ramblocks_of(guest), options=OPTIONS) as writer:
        writer.write_all()
        result = writer.finish()
    assert result.direct
    assert result.manifest_path is None
    assert [os.get_inheritable(fd) for fd in pair] == [False, False]
    for fd in pair:
        os.fstat(fd)
    check_image(tmp_path / "passed", copy_of(guest))
    assert [path.name for path in tmp_path.iterdir()] == ["passed"]


@pytest.mark.parametrize("alignment", [Alignment(0, 0), Alignment(512, 8192)])
def test_passed_descriptor_without_use_is_refused(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch, alignment: Alignment
) -> None:
    """Zeros are what ext4 says with data=journal, where it opens with O_DIRECT all the same."""
    os.pwrite(pair[1], b"precious", 0)
    monkeypatch.setattr(directfile, "probe_alignment", lambda _: alignment)
    with pytest.raises(StorageError, match="of no use"):
        MappedRamWriter.on_descriptors(*pair, ramblocks_of(make_guest()), options=OPTIONS)
    assert os.pread(pair[1], 100, 0) == b"precious"


def test_bytes_below_the_base_are_kept(tmp_path: Path, pair: tuple[int, int]) -> None:
    """A file with a header of somebody else's; what stood behind goes."""
    os.pwrite(pair[1], b"header" + b"x" * (40 * MIB), 0)
    guest = make_guest()
    with MappedRamWriter.on_descriptors(
        *pair, ramblocks_of(guest), options=OPTIONS, base=8192
    ) as writer:
        writer.write_all()
        writer.finish()
    image = read_image(tmp_path / "passed", base=8192)
    assert image.contents == copy_of(guest)
    assert (tmp_path / "passed").read_bytes()[:8192] == b"header" + b"x" * 8186


def test_wrong_pairs_are_refused_with_what_is_wrong(tmp_path: Path, pair: tuple[int, int]) -> None:
    direct, main = pair
    path = str(tmp_path / "passed")
    os.pwrite(main, b"precious", 0)
    with ExitStack() as stack:

        def opened(flags: int, name: str = path) -> int:
            fd = os.open(name, flags)
            stack.callback(os.close, fd)
            return fd

        def duplicate(fd: int) -> int:
            copy = os.dup(fd)
            stack.callback(os.close, copy)
            return copy

        read, write = os.pipe()
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        other = opened(os.O_RDWR | os.O_CREAT, str(tmp_path / "other"))
        wrong = [
            (direct, opened(os.O_RDWR | os.O_DIRECT), "has O_DIRECT"),
            (main, opened(os.O_RDWR), "no O_DIRECT"),
            (main, direct, "no O_DIRECT"),
            (direct, duplicate(direct), "not a dup"),
            (main, duplicate(main), "no O_DIRECT"),
            (direct, direct, "has O_DIRECT"),
            (direct, other, "not of the same file"),
            (opened(os.O_RDONLY | os.O_DIRECT), main, "not open for writing"),
            (direct, opened(os.O_RDONLY), "not open for writing"),
            (direct, opened(os.O_WRONLY), "not open for reading"),
            (direct, 1 << 20, "Bad file descriptor"),
            (direct, write, "not a regular file"),
            (opened(os.O_RDWR | os.O_DIRECT | os.O_APPEND), main, "O_APPEND"),
            (direct, opened(os.O_RDWR | os.O_APPEND), "O_APPEND"),
        ]
        for one, another, reason in wrong:
            with pytest.raises(StateError, match=reason):
                MappedRamWriter.on_descriptors(one, another, ramblocks_of(make_guest()))
    assert os.pread(main, 100, 0) == b"precious"
