"""Traces are read as strace writes them: what was done to which file, in which order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from forgetfuldisk import Disk
from systemcalls import Call, read_trace, record

ROOT = Path("/r")

#: Changes files in every way that is understood, also by threads and by a child of its own.
PROGRAM = """
import ctypes, os, subprocess, sys, threading
os.chdir(sys.argv[1])
def spread(start):
    for number in range(start, 64, 2):
        os.pwrite(fd, bytes([number]) * 1000, number * 1000)
fd = os.open("many", os.O_RDWR | os.O_CREAT)
threads = [threading.Thread(target=spread, args=(start,)) for start in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
os.pwritev(fd, [b"one", b"two"], 100)
os.lseek(fd, 7, os.SEEK_SET)
os.write(fd, b"behind a seek")
os.write(fd, b" and on")
os.ftruncate(fd, 70000)
fallocate = ctypes.CDLL(None).fallocate64
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
assert fallocate(fd, 3, 5000, 20000) == 0
os.ftruncate(fd, 40000)
os.fdatasync(fd)
with open("log", "ab") as log: log.write(b"first")
with open("log", "ab") as log: log.write(b", second")
with open("rewritten", "w") as file: file.write("much text")
with open("rewritten", "w") as file: file.write("text")
os.mkdir("folder")
os.rename("rewritten", "kept")
os.replace("kept", "former")
os.link("former", "folder/second name")
os.unlink("former")
nameless = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
os.write(nameless, b"soon named")
here = os.open(".", os.O_RDONLY)  # with it Python calls linkat, which follows the link
os.link(f"/proc/self/fd/{nameless}", "named \\u00e9", src_dir_fd=here)
os.write(nameless, b", and more")
folder = os.open("folder", os.O_RDONLY)
os.mkdir("gone", dir_fd=folder)
os.rmdir("gone", dir_fd=folder)
os.fsync(folder)
subprocess.run([sys.executable, "-c", "open('of a child', 'wb').write(bytes(range(256)))"])
print("done")
"""


def test_a_real_program_is_seen_whole(tmp_path: Path) -> None:
    """What the calls say, carried out again, is what lies on the disk."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "former").write_text("is replaced")
    disk = Disk(root)
    recording = record([sys.executable, "-c", PROGRAM, str(root)], root, trace=tmp_path / "trace")
    assert recording.code == 0, recording.err
    for call in recording.calls:
        disk.apply(call)
    assert disk.differences(root) == []
    kinds = {call.kind for call in recording.calls}
    assert kinds >= {
        "open", "write", "truncate", "punch", "rename", "link", "unlink", "mkdir", "rmdir", "sync",
        "tell",
    }  # fmt: skip
    assert [call.number for call in recording.calls] == list(range(len(recording.calls)))
    assert all(call.begun <= call.number for call in recording.calls)


def hexadecimal(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def line(text: str) -> str:
    """A line of a trace; <path> and "text" are written in hex, as with ``strace -xx``."""
    for path in ("/r/vm.partial", "/r/vm", "/r"):
        text = text.replace(f"<{path}>", f"<{hexadecimal(path)}>")
    for words in ("/r/vm.partial", "/r/vm", "data", "/elsewhere"):
        text = text.replace(f'"{words}"', f'"{hexadecimal(words)}"')
    return text


def read(*lines: str) -> list[Call]:
    return read_trace("\n".join(map(line, lines)), ROOT)


def test_a_sync_covers_what_had_ended_before_it_began() -> None:
    """A write that was under way when the sync began may not be covered, whichever ended first."""
    calls = read(
        '7 pwrite64(3</r/vm>, "data", 4, 0) = 4',
        '8 pwrite64(3</r/vm>, "data", 4, 4 <unfinished ...>',
        "7 fdatasync(3</r/vm> <unfinished ...>",
        "8 <... pwrite64 resumed>)          = 4",
        "7 <... fdatasync resumed>)         = 0",
    )
    assert [(call.kind, call.offset, call.begun) for call in calls] == [
        ("write", 0, 0),
        ("write", 4, 1),
        ("sync", None, 1),
    ]


def test_a_short_write_counts_for_what_it_wrote() -> None:
    (call,) = read('7 pwrite64(3</r/vm>, "data", 4, 10) = 2')
    assert (call.data, call.length, call.offset) == (b"da", 2, 10)


def test_shared_blocks_are_a_copy() -> None:
    (call,) = read(
        "7 ioctl(3</r/vm.partial>, FICLONERANGE, {src_fd=4</r/vm>, src_offset=4096, "
        "src_length=8192, dest_offset=1048576}) = 0"
    )
    assert (call.kind, call.path, call.target) == ("copy", "/r/vm", "/r/vm.partial")
    assert (call.source_offset, call.length, call.offset) == (4096, 8192, 1 << 20)
    assert call.changed_path == "/r/vm.partial"


def test_what_failed_or_is_elsewhere_is_left_out() -> None:
    assert not read(
        '7 rename("/r/vm.partial", "/r/vm") = -1 ENOENT (No such file or directory)',
        '7 unlink("/elsewhere") = 0',
        "7 +++ exited with 0 +++",
        "7 --- SIGCHLD {si_signo=SIGCHLD} ---",
    )


@pytest.mark.parametrize(
    "text",
    [
        "7 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3</r/vm>, 0) = 0x7f00",
        "7 io_uring_enter(4, 1, 0, 0, NULL, 8) = 1",
        "7 copy_file_range(3</r/vm>, NULL, 4</r/vm.partial>, NULL, 10, 0) = 10",
        '7 renameat2(AT_FDCWD, "/r/vm", AT_FDCWD, "/r/vm.partial", RENAME_EXCHANGE) = 0',
    ],
)
def test_what_would_go_unseen_is_refused(text: str) -> None:
    """Nothing passes for synced because nobody saw it being written."""
    with pytest.raises(AssertionError):
        read(text)
