"""The disk that forgets: what was synced is there, and all else may be lost, each in its way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from forgetfuldisk import Disk, SparseBytes, crash
from hypothesis import given
from hypothesis import strategies as st
from systemcalls import Call

CREATE = frozenset({"O_CREAT"})
SEEDS = range(200)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "old").write_bytes(b"o" * 5000)
    return folder


def numbered(root: Path, *calls: Call) -> list[Call]:
    return [
        replace(
            call,
            number=at,
            begun=at,
            path=str(root / call.path),
            target=call.target and str(root / call.target),
        )
        for at, call in enumerate(calls)
    ]


def ends(root: Path, *calls: Call) -> list[dict[str, bytes]]:
    """Every way in which these calls, all made, may end."""
    beginning = Disk(root)
    found: list[dict[str, bytes]] = []
    for seed in SEEDS:
        crash(beginning, numbered(root, *calls), cut=len(calls), seed=seed, root=root)
        left = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
        if left not in found:
            found.append(left)
    crash(beginning, (), cut=0, seed=0, root=root)  # as it was
    return found


def make(name: str) -> Call:
    return Call("open", name, flags=CREATE)


def write(name: str, data: bytes, offset: int = 0) -> Call:
    return Call("write", name, offset=offset, length=len(data), data=data)


def sync(name: str = ".") -> Call:
    return Call("sync", name)


def test_what_is_synced_is_never_lost(root: Path) -> None:
    """The file's content by its own sync, its name by the folder's."""
    old = {"old": b"o" * 5000}
    found = ends(root, make("new"), write("new", b"n" * 9000), sync("new"), sync())
    assert found == [old | {"new": b"n" * 9000}]


def test_a_synced_file_may_lose_its_name_and_a_named_one_its_content(root: Path) -> None:
    old = {"old": b"o" * 5000}
    data = b"n" * 9000
    without_folder = ends(root, make("new"), write("new", data), sync("new"))
    assert sorted(map(len, without_folder)) == [1, 2]
    assert all(one in (old, old | {"new": data}) for one in without_folder)
    without_sync = ends(root, make("new"), write("new", data), sync())
    contents = {one["new"] for one in without_sync}
    assert {b"", data} <= contents
    # Torn at a sector, with a hole, and with nothing but its end.
    assert any(0 < len(one) < 9000 for one in contents)
    assert any(len(one) == 9000 and one.startswith(bytes(512)) for one in contents)


def test_a_write_that_ended_after_the_sync_began_may_be_lost(root: Path) -> None:
    calls = [make("new"), sync(), write("new", b"n"), sync("new")]
    assert {one["new"] for one in ends(root, *calls)} == {b"n"}
    beginning = Disk(root)
    late = numbered(root, *calls)
    late[-1] = replace(late[-1], begun=2)
    contents = set()
    for seed in SEEDS:
        crash(beginning, late, cut=len(late), seed=seed, root=root)
        contents.add((root / "new").read_bytes())
    assert contents == {b"", b"n"}


def test_a_name_that_is_replaced_is_never_missing(root: Path) -> None:
    """A rename happens at once, or not at all; without a sync the new content may be lost."""
    synced = ends(
        root,
        make("old.partial"), write("old.partial", b"new"), sync("old.partial"),
        Call("rename", "old.partial", target="old"),
    )  # fmt: skip
    assert {one["old"] for one in synced} == {b"o" * 5000, b"new"}
    unsynced = ends(
        root,
        make("old.partial"), write("old.partial", b"new"),
        Call("rename", "old.partial", target="old"),
    )  # fmt: skip
    assert {one["old"] for one in unsynced} == {b"o" * 5000, b"new", b""}


def test_names_may_be_lost_each_by_itself(root: Path) -> None:
    """Two unsynced names: none, either, or both."""
    found = ends(root, make("a"), make("b"))
    assert {frozenset(one) - {"old"} for one in found} == {
        frozenset(names) for names in ((), ("a",), ("b",), ("a", "b"))
    }


def test_a_removal_may_be_lost(root: Path) -> None:
    assert {len(one) for one in ends(root, Call("unlink", "old"))} == {0, 1}
    assert ends(root, Call("unlink", "old"), sync()) == [{}]


def test_a_truncation_may_be_lost_and_what_came_after_be_kept(root: Path) -> None:
    truncate = Call("open", "old", flags=frozenset({"O_CREAT", "O_TRUNC"}))
    contents = {one["old"] for one in ends(root, truncate, write("old", b"new"))}
    assert contents == {b"o" * 5000, b"", b"new", b"new" + b"o" * 4997}


def test_a_second_name_is_of_the_same_file(root: Path) -> None:
    """What is lost of a file is lost under both its names."""
    for left in ends(root, Call("link", "old", target="second"), sync(), write("old", b"x" * 5000)):
        assert left["old"] == left["second"]


def test_a_folder_that_is_lost_takes_all_with_it(root: Path) -> None:
    beginning = Disk(root)
    calls = numbered(
        root, Call("mkdir", "folder"), make("folder/file"), sync("folder/file"), sync("folder")
    )
    seen = set()
    for seed in SEEDS:
        crash(beginning, calls, cut=len(calls), seed=seed, root=root)
        seen.add((root / "folder" / "file").exists())
    assert seen == {True, False}


def test_a_seed_gives_the_same_end_again(root: Path) -> None:
    beginning = Disk(root)
    calls = numbered(root, make("a"), write("a", b"a" * 70000), make("b"), write("b", b"b" * 9000))
    ends_of_seed = []
    for _ in range(2):
        crash(beginning, calls, cut=4, seed=11, root=root)
        ends_of_seed.append({path.name: path.read_bytes() for path in root.iterdir()})
    assert ends_of_seed[0] == ends_of_seed[1]


@given(st.integers(0, 10**9))
def test_sparse_bytes_are_as_a_file_in_memory(seed: int) -> None:
    """Writes, cuts and holes at any place."""
    source = random.Random(seed)
    content, plain = SparseBytes(), bytearray()
    for _ in range(8):
        offset, length = source.randint(0, 20000), source.randint(0, 9000)
        match source.choice(["write", "punch", "truncate"]):
            case "write":
                data = source.randbytes(length)
                if length:
                    content.write(offset, data)
                    plain.extend(bytes(max(0, offset - len(plain))))
                    plain[offset : offset + length] = data
            case "punch":
                content.punch(offset, length)
                end = min(len(plain), offset + length)
                if offset < end:
                    plain[offset:end] = bytes(end - offset)
            case "truncate":
                content.truncate(offset)
                plain = plain[:offset] + bytes(max(0, offset - len(plain)))
        assert content.size == len(plain)
        assert content.read(0, content.size) == plain
