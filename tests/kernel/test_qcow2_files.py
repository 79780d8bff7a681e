"""qcow2 files looked into: real ones by qemu-img tell what they are, damaged ones are refused."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from guestdisks import qemu_img
from hypothesis import given, settings
from hypothesis import strategies as st

from uringmig.errors import FormatError
from uringmig.format.qcow2 import L1_BYTES_MAX, SNAPSHOTS_MAX, Qcow2Snapshot
from uringmig.qemu.diskfile import Qcow2Look, look_at_qcow2
from uringmig.storage.mainfile import MainFile, open_for_reading
from uringmig.units import GiB, MiB


@contextmanager
def looked_at(path: Path) -> Iterator[Qcow2Look]:
    with closing(open_for_reading(str(path))) as file:
        yield look_at_qcow2(file)


def io(path: Path, *commands: str) -> None:
    """Write to a disk as a guest does."""
    qemu_img("--version")
    words = [word for command in commands for word in ("-c", command)]
    assert os.spawnlp(os.P_WAIT, "qemu-io", "qemu-io", *words, str(path)) == 0


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_what_qemu_writes_is_told(tmp_path: Path, compat: str, cluster: str) -> None:
    """Empty or not, at a snapshot or not; whatever version and size of cluster."""
    path = tmp_path / "d.qcow2"
    options = f"compat={compat},cluster_size={cluster}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, 8 * GiB)
    with looked_at(path) as look:
        assert look.is_empty
        assert look.header.size == 8 * GiB
        assert look.snapshots == ()
    io(path, "write -P 1 4G 4k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("snapshot", "-c", "two äö", path)
    with looked_at(path) as look:
        assert not look.is_empty
        assert [(one.id, one.name) for one in look.snapshots] == [("1", "one"), ("2", "two äö")]
        assert all(map(look.is_at, look.snapshots))
        assert look.named("three") is None
    io(path, "write -P 2 7G 512")
    with looked_at(path) as look:
        assert not any(map(look.is_at, look.snapshots))
    qemu_img("snapshot", "-a", "one", path)
    with looked_at(path) as look:
        assert all(map(look.is_at, look.snapshots))


def test_a_disk_that_grew_since_is_not_at_its_snapshot(tmp_path: Path) -> None:
    """The table is longer, and the new part may be empty: the guest sees another disk."""
    path = tmp_path / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, 8 * GiB)
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("resize", "-q", path, "+8G")
    with looked_at(path) as look:
        assert not look.is_at(look.snapshots[0])
    qemu_img("snapshot", "-a", "one", path)
    with looked_at(path) as look:
        assert look.is_at(look.snapshots[0])


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("q") / "d.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, 8 * MiB)
    io(path, "write -P 1 0 4k")
    qemu_img("snapshot", "-c", "one", path)
    return path.read_bytes()


def look_all(path: Path) -> None:
    """All that is ever asked of a file."""
    with looked_at(path) as look:
        _ = look.is_empty
        for one in look.snapshots:
            look.is_at(one)


@pytest.mark.parametrize(
    ("at", "field", "value", "what"),
    [
        (0, ">4s", b"QFI\xfa", "not a qcow2 file"),
        (4, ">I", 4, "version"),
        (36, ">I", L1_BYTES_MAX // 8 + 1, "entries of qcow2's L1"),
        (40, ">Q", 1 << 62, "L1 ends past the file"),
        (40, ">Q", 1 << 63, "offset of qcow2's L1"),
        (64, ">Q", 1 << 63, "offset of qcow2's snapshots"),
        (60, ">I", SNAPSHOTS_MAX + 1, "snapshots of a qcow2 file"),
        (60, ">I", 2000, "ends too early"),
        (64, ">Q", 1 << 62, "ends too early"),
    ],
)
def test_bounds_are_checked(
    honest: bytes, tmp_path: Path, at: int, field: str, value: object, what: str
) -> None:
    """Named with the rule; and nothing is read or made room for because a file says so."""
    data = bytearray(honest)
    struct.pack_into(field, data, at, value)
    path = tmp_path / "d"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FormatError, match=what):
        look_all(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * MiB
    tracemalloc.stop()


@pytest.mark.parametrize("length", [0, 3, 71, 72, 4096])
def test_a_file_that_is_cut_is_refused(honest: bytes, tmp_path: Path, length: int) -> None:
    path = tmp_path / "d"
    path.write_bytes(honest[:length])
    with pytest.raises(FormatError):
        look_all(path)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(
    data: st.DataObject, honest: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is in it, nothing but a `FormatError`."""
    with looked_at_bytes(honest) as file:
        header = look_at_qcow2(file).header
    spots = [0, 4, 36, 40, 60, 64, header.snapshots_offset, header.l1_offset]
    spoilt = bytearray(honest)
    at = data.draw(st.sampled_from(spots)) + data.draw(st.integers(0, 64))
    patch = data.draw(st.binary(min_size=1, max_size=16))
    spoilt[at : at + len(patch)] = patch
    with looked_at_bytes(bytes(spoilt)) as file, suppress(FormatError):
        look = look_at_qcow2(file)
        _ = look.is_empty
        for one in look.snapshots:
            look.is_at(one)


@contextmanager
def looked_at_bytes(data: bytes) -> Iterator[MainFile]:
    fd = os.memfd_create("qcow2")
    os.write(fd, data)
    with closing(MainFile(fd, "qcow2")) as file:
        yield file


@given(st.binary(max_size=300), st.integers(0, 5))
def test_any_list_of_snapshots_is_read_or_refused(data: bytes, count: int) -> None:
    with suppress(FormatError):
        assert len(Qcow2Snapshot.unpack_all(data, count, at=0)) == count
