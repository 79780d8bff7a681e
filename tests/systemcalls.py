"""What a program asked of the file system, in order, with all data: strace's word, parsed.

A call stands where it *ended*, and says how many others had ended when it began: a sync covers what
had ended before it began and nothing else, however threads and processes interleave.

Seen are all ways in which this program changes files. What would go past it (io_uring, a shared
mapping of a file that can be written) makes `read_trace` fail, so that nothing is called durable
because nobody saw it being written. SQLite's index of its log (``-shm``) is such a mapping; it is
made anew after a crash, so it is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

Kind = Literal[
    "open", "write", "truncate", "punch", "copy", "rename", "link", "unlink", "mkdir", "rmdir",
    "sync", "tell",
]  # fmt: skip

#: Follows the path of a file that has no name, or has it no more.
DELETED: Final = " (deleted)"
_TRACED: Final = (
    "open,openat,creat,close,dup,dup2,dup3,lseek,write,pwrite64,writev,pwritev,pwritev2,ftruncate,"
    "truncate,fallocate,copy_file_range,sendfile,ioctl,rename,renameat,renameat2,link,linkat,"
    "chdir,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,sync_file_range,syncfs,mmap,io_uring_enter"
)
_LINE: Final = re.compile(r"^(\d+) +(.*)$", re.DOTALL)
_WHOLE: Final = re.compile(r"^(\w+)\((.*)\) += (-?\d+|\?)(.*)$", re.DOTALL)
_UNFINISHED: Final = "<unfinished ...>"
_REST: Final = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$", re.DOTALL)
_TEXT: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR: Final = re.compile(r"(AT_FDCWD|-?\d+)<((?:\\x[0-9a-f]{2}|[^>\\])*)>(\(deleted\))?")


@dataclass(frozen=True, slots=True)
class Call:
    """One call that succeeded; offsets and lengths in bytes.

    Attributes:
        number: of the call, in the order in which they ended.
        begun: how many calls had ended when this one began.
        process: the thread that made it.
        path: of the file or folder, absolute; of ``rename``, ``link`` and ``copy`` the source.
        target: of ``rename``, ``link`` and ``copy``.
        offset: in the file that is written; of ``truncate`` the new size; None: at its end.
        source_offset: of ``copy``.
        flags: of ``open``.
    """

    kind: Kind
    path: str
    number: int = 0
    begun: int = 0
    process: int = 0
    target: str = ""
    offset: int | None = None
    source_offset: int = 0
    length: int = 0
    data: bytes = b""
    flags: frozenset[str] = frozenset()

    @property
    def changes_data(self) -> bool:
        """Whether it changes the content of a file that is there."""
        return self.kind in ("write", "truncate", "punch", "copy") or (
            self.kind == "open" and "O_TRUNC" in self.flags
        )

    @property
    def changed_path(self) -> str:
        """The file whose content it changes."""
        return self.target if self.kind == "copy" else self.path


@dataclass(frozen=True, slots=True)
class Recording:
    """A program that ran to its end under strace."""

    calls: list[Call]
    code: int
    out: str
    err: str


def record(command: Sequence[str], root: Path, *, trace: Path) -> Recording:
    """Run a program, and note all it and its children do below ``root``.

    Args:
        command: the program; what it writes to its standard output are calls of kind ``tell``.
        root: an absolute path without links.
        trace: where strace's own output goes; outside ``root``.
    """
    strace = [
        "strace", "--seccomp-bpf", "-f", "-y", "-xx", "-s", str(1 << 26), "-e", "signal=none",
        "-e", f"trace={_TRACED}", "-o", str(trace), "--",
    ]  # fmt: skip
    done = subprocess.run([*strace, *command], capture_output=True, text=True, check=False)
    return Recording(read_trace(trace.read_text(), root), done.returncode, done.stdout, done.stderr)


def read_trace(text: str, root: Path) -> list[Call]:
    """Parse strace's output; calls that failed, and what is outside ``root``, are left out."""
    return list(_Reader(str(root)).read(text))


@dataclass
class _Raw:
    """A call as strace tells it."""

    name: str
    arguments: str
    result: int
    rest: str
    begun: int
    process: int


@dataclass
class _Reader:
    """The state that one needs to read a trace: open descriptors and where they stand."""

    root: str
    #: What relative names begin with: the one folder of all processes.
    here: str = field(default_factory=os.getcwd)
    count: int = 0
    position: dict[tuple[int, str], int | None] = field(default_factory=dict)
    opened: dict[int, str] = field(default_factory=dict)

    def read(self, text: str) -> Iterator[Call]:
        unfinished: dict[int, tuple[str, str, int]] = {}
        for line in text.splitlines():
            match = _LINE.match(line)
            assert match, line[:200]
            process, rest = int(match[1]), match[2]
            if rest.endswith(_UNFINISHED):
                name, _, arguments = rest.removesuffix(_UNFINISHED).partition("(")
                unfinished[process] = (name, arguments.rstrip(" ,"), self.count)
                continue
            begun = self.count
            if resumed := _REST.match(rest):
                name, arguments, begun = unfinished.pop(process)
                assert name == resumed[1], line[:200]
                separator = ", " if arguments and not resumed[2].startswith((")", ",")) else ""
                rest = f"{name}({arguments}{separator}{resumed[2].lstrip()}"
            whole = _WHOLE.match(rest)
            if whole is None or whole[3] == "?" or int(whole[3]) < 0:
                continue  # an exit, a signal, or a call that failed
            raw = _Raw(whole[1], whole[2], int(whole[3]), whole[4], begun, process)
            for call in self._calls(raw):
                yield replace(call, number=self.count, begun=begun, process=process)
                self.count += 1

    def _calls(self, raw: _Raw) -> Iterator[Call]:
        """What one system call comes to."""
        found = getattr(self, f"_{_SAME.get(raw.name, raw.name)}", None)
        if found is not None:
            for call in found(raw, _split(raw.arguments)):
                if call.kind == "tell" or self._within(call.path) or self._within(call.target):
                    yield call

    def _within(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def _open(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        flags = frozenset(["O_CREAT", "O_TRUNC", "O_WRONLY"])
        if raw.name != "creat":
            flags = frozenset(arguments[2 if raw.name == "openat" else 1].split("|"))
        fd, path = _descriptor(f"{raw.result}{raw.rest}")
        self.opened[fd] = path
        self.position[fd, path] = None if "O_APPEND" in flags else 0
        if flags & {"O_CREAT", "O_TRUNC", "O_TMPFILE"}:
            yield Call("open", path, flags=flags)

    def _lseek(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        key = _descriptor(arguments[0])
        if self.position.get(key, 0) is not None:
            self.position[key] = raw.result
        yield from ()

    def _write(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        fd, path = _descriptor(arguments[0])
        data = _texts(raw.arguments[len(arguments[0]) :])[: raw.result]
        if fd == 1:
            yield Call("tell", path, data=data)
            return
        if raw.name.startswith("p"):
            # The flags of pwritev2 come last.
            offset: int | None = int(arguments[-2 if raw.name == "pwritev2" else -1])
        else:
            offset = self.position.get((fd, path), 0)
            if offset is not None:
                self.position[fd, path] = offset + raw.result
        yield Call("write", path, offset=offset, length=raw.result, data=data)

    def _truncate(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        (path,) = self._paths(arguments) or (_descriptor(arguments[0])[1],)
        yield Call("truncate", path, offset=int(arguments[1]))

    def _fallocate(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        path = _descriptor(arguments[0])[1]
        offset, length = int(arguments[2]), int(arguments[3])
        if "PUNCH_HOLE" in arguments[1]:
            yield Call("punch", path, offset=offset, length=length)
        else:
            assert arguments[1] in ("0", "FALLOC_FL_KEEP_SIZE"), arguments[1]

    def _ioctl(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        if "CLONE" not in arguments[1]:
            return
        target = _descriptor(arguments[0])[1]
        named = dict(
            one.split("=", 1) for one in re.findall(r"\w+=[^,}]*", raw.arguments) if "=" in one
        )
        source = _descriptor(named.get("src_fd", arguments[-1]))[1]
        yield Call(
            "copy",
            source,
            target=target,
            offset=int(named.get("dest_offset", "0"), 0),
            source_offset=int(named.get("src_offset", "0"), 0),
            length=int(named.get("src_length", "0"), 0),
        )

    def _copy_file_range(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        if self._within(_descriptor(arguments[2])[1]):
            raise AssertionError(f"{raw.name} into {arguments[2]}: teach this module its meaning")
        yield from ()

    def _rename(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        paths = self._paths(arguments)
        assert "RENAME_EXCHANGE" not in arguments[-1], "teach this module what an exchange is"
        yield Call("rename", paths[0], target=paths[1])

    def _link(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        paths = self._paths(arguments)
        if nameless := re.fullmatch(r"/proc/(?:self|\d+)/fd/(\d+)", paths[0]):
            paths[0] = self.opened[int(nameless[1])]
        yield Call("link", paths[0], target=paths[1])

    def _unlink(self, raw: _Raw, arguments: list[str]) -> Iterator[Call]:
        (path,) = self._paths(arguments)
        yield Call("rmdir" if "AT_REMOVEDIR" in raw.arguments else "unlink", path)

    def _rmdir(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        yield Call("rmdir", self._paths(arguments)[0])

    def _mkdir(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        yield Call("mkdir", self._paths(arguments)[0])

    def _sync(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        yield Call("sync", _descriptor(arguments[0])[1])

    def _mmap(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        if "MAP_SHARED" in arguments[3] and "PROT_WRITE" in arguments[2] and "<" in arguments[4]:
            path = _descriptor(arguments[4])[1]
            if self._within(path) and not path.endswith("-shm"):
                raise AssertionError(f"{path} is changed through a mapping, which nobody sees")
        yield from ()

    def _chdir(self, _: _Raw, arguments: list[str]) -> Iterator[Call]:
        self.here = self._paths(arguments)[0]
        yield from ()

    def _paths(self, arguments: list[str]) -> list[str]:
        """Absolute paths that a call names, each perhaps after the folder it is relative to."""
        paths, folder = [], self.here
        for argument in arguments:
            if argument.startswith('"'):
                paths.append(_place(folder, argument))
            elif _DESCRIPTOR.match(argument):
                folder = _descriptor(argument)[1]
        return paths

    def _io_uring_enter(self, _: _Raw, __: list[str]) -> Iterator[Call]:
        raise AssertionError("io_uring is used, whose writes are no calls of their own")


#: Calls of one meaning, by the name of the method that takes them.
_SAME: Final = {
    "openat": "open", "creat": "open", "pwrite64": "write", "writev": "write", "pwritev": "write",
    "pwritev2": "write", "ftruncate": "truncate", "renameat": "rename", "renameat2": "rename",
    "linkat": "link", "unlinkat": "unlink", "mkdirat": "mkdir", "fsync": "sync",
    "fdatasync": "sync", "sendfile": "copy_file_range",
}  # fmt: skip


def _split(arguments: str) -> list[str]:
    """Arguments; braces and brackets hold together, and strings hold no comma (-xx)."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(r"[\[\]{},]", arguments):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            depth -= 1
        elif not depth:
            pieces.append(arguments[start : match.start()].strip())
            start = match.end()
    return [*pieces, arguments[start:].strip()]


def _decoded(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


def _texts(arguments: str) -> bytes:
    """All strings of a call, joined."""
    pieces = []
    for text, cut in _TEXT.findall(arguments):
        assert not cut, "strace cut a string"
        pieces.append(_decoded(text))
    return b"".join(pieces)


def _name(hexadecimal: str) -> str:
    """A path as strace shows it after a descriptor: in hex, or as it is."""
    if hexadecimal.startswith("\\x"):
        return os.fsdecode(_decoded(hexadecimal))
    return hexadecimal


def _descriptor(text: str) -> tuple[int, str]:
    """Number and path of a descriptor."""
    match = _DESCRIPTOR.search(text)
    if match is None:
        number = re.match(r"-?\d+", text)
        return (int(number[0]) if number else -1), ""
    number_text = match[1]
    path = _name(match[2]) + (DELETED if match[3] else "")
    return (-100 if number_text == "AT_FDCWD" else int(number_text)), path


def _place(folder: str, text: str) -> str:
    match = _TEXT.match(text)
    assert match, text
    name = os.fsdecode(_decoded(match[1]))
    # linkat(FD, "", ..., AT_EMPTY_PATH) names the file of the descriptor itself.
    return os.path.normpath(os.path.join(folder, name)) if name else folder  # noqa: PTH118
