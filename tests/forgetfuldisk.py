"""A disk that forgets: what may be left of a run of file operations when the power goes.

Fed with the calls of a trace (`systemcalls`), in order, up to any of them; `forget` then says, by a
seed, what one such moment may leave. What it takes from what the kernel promises:

* ``fsync`` and ``fdatasync`` of a file make durable all content and the size that calls gave it
  which had ended before the sync began, and nothing of its name.
* ``fsync`` of a folder does so for the names in it.
* All else may be lost, whatever came later and was kept: of a write any sectors (512 bytes or
  4 KiB), of all others (truncation, a hole, shared blocks) each by itself. What is lost leaves what
  was there before; a kept write gives a file at least the length that it needs.
* A name changes at once: after a rename within one folder the file has its old name or its new one,
  and a name that is replaced is never missing. This every journalling file system promises, and
  POSIX asks for.

How unsynced names are lost is one of four kinds, each of which a real disk shows:

* ``none``: the file system's journal was committed just then, with all names and no file's content;
* ``all``: nothing came after the last commit of the journal;
* ``prefix``: changes of names reach the disk in their order, over all folders (ext4, xfs, and btrfs
  without a log), so any number of the last ones are lost;
* ``any``: each by itself, which is all that POSIX promises and what a file system that logs single
  files (btrfs) may do.

Files are sparse here as they are there, so that a large guest that is nearly empty costs little.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from systemcalls import DELETED, Call

BLOCK: Final = 4096
_ZEROS: Final = bytes(BLOCK)
Loss = Literal["none", "all", "prefix", "any"]
LOSSES: Final[tuple[Loss, ...]] = ("none", "all", "prefix", "any")


class SparseBytes:
    """The content of a file: a size, and the blocks that are not all zero."""

    def __init__(self, size: int = 0, blocks: dict[int, bytes] | None = None) -> None:
        self.size = size
        self.blocks = blocks or {}

    @classmethod
    def of_file(cls, path: Path) -> SparseBytes:
        """Read a file."""
        content = cls()
        data = path.read_bytes()
        content.write(0, data)
        content.size = len(data)
        return content

    def copy(self) -> SparseBytes:
        return SparseBytes(self.size, dict(self.blocks))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a range; zeros where there is nothing."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        whole = b"".join(self.blocks.get(number, _ZEROS) for number in range(first, last))
        return whole[offset - first * BLOCK :][:length]

    def write(self, offset: int, data: bytes) -> None:
        """Write a range; the file is at least as long then."""
        for number in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
            start = max(offset, number * BLOCK)
            end = min(offset + len(data), (number + 1) * BLOCK)
            piece = data[start - offset : end - offset]
            if len(piece) != BLOCK:
                former = self.blocks.get(number, _ZEROS)
                piece = former[: start % BLOCK] + piece + former[end - number * BLOCK :]
            if piece == _ZEROS:
                self.blocks.pop(number, None)
            else:
                self.blocks[number] = piece
        self.size = max(self.size, offset + len(data))

    def punch(self, offset: int, length: int) -> None:
        """Zero a range; the file stays as long as it is."""
        size = self.size
        length = min(length, max(0, size - offset))
        for number in [n for n in self.blocks if offset <= n * BLOCK < offset + length - BLOCK + 1]:
            del self.blocks[number]
        for number in (offset // BLOCK, (offset + length) // BLOCK):
            start, end = max(offset, number * BLOCK), min(offset + length, (number + 1) * BLOCK)
            if start < end:
                self.write(start, bytes(end - start))
        self.size = size

    def truncate(self, size: int) -> None:
        """Cut or lengthen the file."""
        if size < self.size:
            self.punch(size, self.size - size)
        self.size = size

    def put_into(self, path: Path) -> None:
        """Make a file of this content."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, self.size)
            for number, block in self.blocks.items():
                os.pwrite(fd, block[: self.size - number * BLOCK], number * BLOCK)
        finally:
            os.close(fd)


@dataclass(eq=False)
class Inode:
    """A file: what is durable of it, what was done since, and what a program sees.

    Calls in ``pending`` are writes (with their data), truncations and holes.
    """

    durable: SparseBytes
    seen: SparseBytes
    pending: list[Call] = field(default_factory=list)

    def change(self, call: Call) -> None:
        """Take in a change of the content."""
        _apply(self.seen, call)
        self.pending.append(call)

    def sync(self, begun: int) -> None:
        """Make durable what had ended before the sync began."""
        for call in [call for call in self.pending if call.number < begun]:
            _apply(self.durable, call)
        self.pending = [call for call in self.pending if call.number >= begun]

    def after_loss(self, source: random.Random) -> SparseBytes:
        """What may be left."""
        if not self.pending:
            return self.durable
        left = self.durable.copy()
        kept = source.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for call in self.pending:
            if call.kind == "write":
                _keep_sectors(left, call, source, kept)
            elif source.random() < kept:
                _apply(left, call)
        return left


@dataclass(eq=False)
class Folder:
    """A folder; entries are files or folders."""

    durable: dict[str, Inode | Folder] = field(default_factory=dict)
    seen: dict[str, Inode | Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class NameChange:
    """One change of one folder that happens at once: what goes, and what comes."""

    number: int
    folder: Folder
    gone: tuple[str, Inode | Folder] | None = None
    come: tuple[str, Inode | Folder] | None = None

    def apply(self, names: dict[str, Inode | Folder]) -> None:
        """Change names, as far as they are what this change met."""
        if self.gone is not None and names.get(self.gone[0]) is self.gone[1]:
            del names[self.gone[0]]
        if self.come is not None:
            names[self.come[0]] = self.come[1]


class Disk:
    """One folder and all below it, as it was at first and as calls change it.

    Args:
        root: as it lies there now, taken to be durable.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.top = _read_folder(root)
        self._names: list[NameChange] = []
        #: Files without a name, and such as lost theirs while somebody may have them open.
        self._ghosts: dict[str, Inode] = {}

    def copy(self) -> Disk:
        """A disk of its own, from the same durable beginning; before anything was applied."""
        other = object.__new__(Disk)
        other.root, other.top = self.root, _copy_folder(self.top)
        other._names, other._ghosts = [], {}
        return other

    def apply(self, call: Call) -> None:
        """Take in what a program did."""
        match call.kind:
            case "open":
                self._open(call)
            case "write":
                inode = self._inode(call.path)
                offset = inode.seen.size if call.offset is None else call.offset
                inode.change(_write(call.number, offset, call.data))
            case "copy":
                data = self._inode(call.path).seen
                length = call.length or data.size - call.source_offset
                content = data.read(call.source_offset, length)
                assert call.offset is not None
                self._inode(call.target).change(_write(call.number, call.offset, content))
            case "truncate" | "punch":
                self._inode(call.path).change(call)
            case "rename":
                self._rename(call)
            case "link":
                inode = self._inode(call.path)
                folder, name = self._place(call.target)
                self._change(NameChange(call.number, folder, come=(name, inode)))
            case "mkdir":
                folder, name = self._place(call.path)
                self._change(NameChange(call.number, folder, come=(name, Folder())))
            case "unlink" | "rmdir":
                folder, name = self._place(call.path)
                found = folder.seen[name]
                if isinstance(found, Inode):
                    self._ghosts[call.path + DELETED] = found
                self._change(NameChange(call.number, folder, gone=(name, found)))
            case "sync":
                self._sync(call)

    def differences(self, root: Path) -> list[str]:
        """Where a folder is not what the program that was recorded must see; nothing is lost."""
        return _differences(self.top, root)

    def forget(self, seed: int, root: Path) -> None:
        """Leave in ``root`` what the power's going now may leave; whatever is there is removed."""
        source = random.Random(seed)
        loss = source.choice(LOSSES)
        shutil.rmtree(root, ignore_errors=True)
        kept = self._kept_names(loss, source)
        left: dict[Inode, SparseBytes] = {}
        _put_folder(self.top, root, kept, source, left)

    def _kept_names(self, loss: Loss, source: random.Random) -> list[NameChange]:
        """Which of the unsynced changes of names are not lost."""
        if loss == "none":
            return self._names
        if loss == "all":
            return []
        if loss == "prefix":
            return self._names[: source.randint(0, len(self._names))]
        return [change for change in self._names if source.random() < 0.5]

    def _open(self, call: Call) -> None:
        if call.path.endswith(DELETED):
            self._ghosts.setdefault(call.path, Inode(SparseBytes(), SparseBytes()))
            return
        folder, name = self._place(call.path)
        found = folder.seen.get(name)
        if found is None:
            inode = Inode(SparseBytes(), SparseBytes())
            self._change(NameChange(call.number, folder, come=(name, inode)))
        elif "O_TRUNC" in call.flags and isinstance(found, Inode):
            found.change(Call("truncate", call.path, number=call.number, offset=0))

    def _rename(self, call: Call) -> None:
        folder, name = self._place(call.path)
        other, new_name = self._place(call.target)
        assert folder is other, "a rename from folder to folder: state here what may be left of it"
        found = folder.seen[name]
        replaced = folder.seen.get(new_name)
        if isinstance(replaced, Inode):
            self._ghosts[call.target + DELETED] = replaced
        self._change(NameChange(call.number, folder, gone=(name, found), come=(new_name, found)))

    def _change(self, change: NameChange) -> None:
        change.apply(change.folder.seen)
        self._names.append(change)

    def _sync(self, call: Call) -> None:
        found = self._find(call.path)
        if isinstance(found, Inode):
            found.sync(call.begun)
            return
        done = [one for one in self._names if one.folder is found and one.number < call.begun]
        for change in done:
            change.apply(found.durable)
        self._names = [one for one in self._names if one not in done]

    def _place(self, path: str) -> tuple[Folder, str]:
        """A name's folder, and the name in it."""
        above, _, name = path.rpartition("/")
        folder = self._find(above)
        assert isinstance(folder, Folder), path
        return folder, name

    def _find(self, path: str) -> Inode | Folder:
        if path in self._ghosts:
            return self._ghosts[path]
        found: Inode | Folder = self.top
        for name in Path(path).relative_to(self.root).parts:
            assert isinstance(found, Folder), path
            found = found.seen[name]
        return found

    def _inode(self, path: str) -> Inode:
        found = self._find(path)
        assert isinstance(found, Inode), path
        return found


def crash(beginning: Disk, calls: Iterable[Call], *, cut: int, seed: int, root: Path) -> None:
    """Leave in ``root`` what may be left if the power goes after the first ``cut`` calls."""
    disk = beginning.copy()
    for call in calls:
        if call.number >= cut:
            break
        disk.apply(call)
    disk.forget(seed, root)


def _apply(content: SparseBytes, call: Call) -> None:
    assert call.offset is not None
    match call.kind:
        case "write":
            content.write(call.offset, call.data)
        case "truncate":
            content.truncate(call.offset)
        case "punch":
            content.punch(call.offset, call.length)


def _write(number: int, offset: int, data: bytes) -> Call:
    return Call("write", "", number=number, offset=offset, length=len(data), data=data)


def _sectors(call: Call, size: int) -> Iterator[tuple[int, bytes]]:
    """A write's pieces that no sector's end cuts through."""
    assert call.offset is not None
    start, end = call.offset, call.offset + len(call.data)
    while start < end:
        stop = min(end, (start // size + 1) * size)
        yield start, call.data[start - call.offset : stop - call.offset]
        start = stop


def _keep_sectors(left: SparseBytes, call: Call, source: random.Random, kept: float) -> None:
    """Keep a whole write, nothing of it, its beginning, or any of its sectors."""
    how = source.choice(["whole", "torn", "any"])
    if how == "whole":
        if source.random() < kept:
            _apply(left, call)
        return
    sectors = list(_sectors(call, source.choice([512, BLOCK])))
    if how == "torn":
        sectors = sectors[: source.randint(0, len(sectors))]
        kept = 1.0
    for offset, data in sectors:
        if source.random() < kept:
            left.write(offset, data)


def _read_folder(path: Path) -> Folder:
    names: dict[str, Inode | Folder] = {}
    for one in sorted(path.iterdir()):
        if one.is_dir():
            names[one.name] = _read_folder(one)
        elif one.is_file():
            content = SparseBytes.of_file(one)
            names[one.name] = Inode(content, content.copy())
    return Folder(dict(names), dict(names))


def _copy_folder(folder: Folder) -> Folder:
    names: dict[str, Inode | Folder] = {
        name: _copy_folder(one)
        if isinstance(one, Folder)
        else Inode(one.durable.copy(), one.durable.copy())
        for name, one in folder.durable.items()
    }
    return Folder(dict(names), dict(names))


def _differences(folder: Folder, path: Path) -> list[str]:
    names = {one.name for one in path.iterdir() if one.is_dir() or one.is_file()}
    found = [f"{path / name} is on one side only" for name in names ^ set(folder.seen)]
    for name in sorted(names & set(folder.seen)):
        one = folder.seen[name]
        if isinstance(one, Folder):
            found += _differences(one, path / name)
        elif one.seen.read(0, one.seen.size) != (path / name).read_bytes():
            found.append(f"{path / name} has another content")
    return found


def _put_folder(
    folder: Folder,
    path: Path,
    kept: list[NameChange],
    source: random.Random,
    left: dict[Inode, SparseBytes],
) -> None:
    """Make a folder as it may be left."""
    names = dict(folder.durable)
    for change in kept:
        if change.folder is folder:
            change.apply(names)
    path.mkdir(mode=0o700, parents=True)
    for name, found in names.items():
        if isinstance(found, Folder):
            _put_folder(found, path / name, kept, source, left)
            continue
        if found not in left:
            left[found] = found.after_loss(source)
        left[found].put_into(path / name)
