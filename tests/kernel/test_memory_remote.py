"""Memory of a real child process, read from outside: every page, and none allocated by looking."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from imagereader import read_image
from remoteprocess import PAGE, SIZE, expected_page, opened, read_all, remote_memory

from uringmig.errors import HostError, PeerError, StateError
from uringmig.memory.source import CopiedMemory
from uringmig.options import WriteOptions
from uringmig.writer import MappedRamWriter, RamBlock

MIB = 1 << 20
#: Ends, neighbours, pages alone, and a whole huge page.
TOUCHED = [0, 1, 2, 700, 702, 1023, 1024, *range(4096, 4608), SIZE // PAGE - 1]
BELOW = [1, 5, 700, 9000, 9001]


def expected(touched: Sequence[int], below: Sequence[int] = ()) -> bytes:
    whole = bytearray(SIZE)
    for pages, salt in ((below, 7), (touched, 1)):
        for page in pages:
            whole[page * PAGE : page * PAGE + PAGE] = expected_page(page, salt=salt)
    return bytes(whole)


@pytest.fixture(params=["memfd", "tmpfs", "ordinary"])
def file_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | None]:
    """What is mapped: a memfd (None), a file in /dev/shm, one on a disk."""
    if request.param == "memfd":
        yield None
        return
    folder = Path("/dev/shm") if request.param == "tmpfs" else tmp_path
    path = folder / f"uringmig-test-remote-{os.getpid()}"
    with path.open("xb") as file:
        file.truncate(SIZE)
    yield path
    path.unlink()


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "words"])
@pytest.mark.parametrize("kind", ["anonymous", "huge"])
def test_anonymous_memory(kind: str, scan: bool) -> None:
    """Every page is read, and nothing is allocated: neither pages nor, by much, page tables."""
    with remote_memory(kind, SIZE, TOUCHED) as remote, opened(remote, scan=scan) as memory:
        before = remote.pages_there()
        assert read_all(memory).tobytes() == expected(TOUCHED)
        assert remote.pages_there() == before
        memory.probe()


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "words"])
def test_private_copies_over_a_file(file_path: Path | None, scan: bool) -> None:
    """Where the process has no page of its own the file's shows; holes of both stay holes."""
    with (
        remote_memory("private", SIZE, TOUCHED, path=file_path, below=BELOW) as remote,
        opened(remote, scan=scan) as memory,
    ):
        blocks = file_path.stat().st_blocks if file_path else 0
        before = remote.pages_there()
        assert read_all(memory).tobytes() == expected(TOUCHED, BELOW)
        # Of the file's own pages, those that it had not mapped are in its page tables now, with
        # their neighbours in the page cache (fault-around).
        assert remote.pages_there() - before <= 16 * len(BELOW)
        assert (file_path.stat().st_blocks if file_path else 0) == blocks


def test_what_is_there_is_found_exactly() -> None:
    """Extents are the touched pages of a mapping without huge pages, and the next one is found."""
    with remote_memory("private", SIZE, TOUCHED) as remote, opened(remote) as memory:
        extents = memory.data_extents(start=0, length=SIZE)
        pages = [
            page
            for start, length in zip(extents.start.tolist(), extents.length.tolist(), strict=True)
            for page in range(start // PAGE, (start + length) // PAGE)
        ]
        assert pages == TOUCHED
        assert memory.next_data(0) == 0
        assert memory.next_data(3 * PAGE) == 700 * PAGE
        assert memory.next_data(4608 * PAGE) == SIZE - PAGE
        assert memory.next_data(SIZE) == SIZE
        assert isinstance(memory, CopiedMemory)


def test_asking_window_by_window_walks_the_page_tables_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a limit the kernel walks to the end of what it found: quadratic for dense memory."""
    walked = []
    real_ioctl = fcntl.ioctl

    def looking(fd: int, request: int, argument: bytearray) -> int:
        found: int = real_ioctl(fd, request, argument)
        start, walk_end = struct.unpack_from("=Q8xQ", argument, 2 * 8)
        walked.append(walk_end - start)
        return found

    with remote_memory("anonymous", SIZE, range(SIZE // PAGE)) as remote, opened(remote) as memory:
        monkeypatch.setattr(fcntl, "ioctl", looking)
        for start in range(0, SIZE, MIB):
            assert memory.next_data(start) == start
    assert walked == [PAGE] * (SIZE // MIB)


def test_asking_window_by_window_reads_a_window_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without the ioctl, on kernels before 6.7."""
    lengths = []
    real_pread = os.pread

    def looking(fd: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return real_pread(fd, length, offset)

    with (
        remote_memory("anonymous", SIZE, range(SIZE // PAGE)) as remote,
        opened(remote, scan=False) as memory,
    ):
        monkeypatch.setattr(os, "pread", looking)
        for start in range(0, SIZE, 4 * MIB):
            assert memory.next_data(start) == start
    assert sum(lengths) <= 8 * SIZE // PAGE


def test_pages_that_were_only_read_are_zero() -> None:
    """A page that its process only read is the zero page: nothing to copy."""
    with remote_memory("anonymous", SIZE, [3]) as remote, opened(remote) as memory:
        assert memory.next_data(4 * PAGE) == SIZE
        assert memory.data_extents(start=0, length=SIZE).total_bytes == PAGE


def test_ten_thousand_extents_in_one_window() -> None:
    """More ranges than one call takes."""
    touched = range(0, 4096, 2)
    with remote_memory("private", SIZE, touched) as remote, opened(remote) as memory:
        assert read_all(memory, window=16 * MIB).tobytes() == expected(touched)


def test_a_process_that_ended() -> None:
    """One line; and a range outside the memory is the caller's fault."""
    with remote_memory("anonymous", SIZE, TOUCHED) as remote, opened(remote) as memory:
        with pytest.raises(StateError):
            memory.data_extents(start=SIZE, length=PAGE)
        extents = memory.data_extents(start=0, length=4 * MIB)
        os.kill(remote.pid, 9)
        os.waitid(os.P_PID, remote.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(PeerError, match="ended"):
            memory.read(extents, np.zeros(4 * MIB, np.uint8), start=0)


def test_no_right_to_read(tmp_path: Path) -> None:
    """Another user's process: refused by name before anything else."""
    with remote_memory("anonymous", SIZE, TOUCHED) as remote, opened(remote) as memory:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgid(65534)
                os.setuid(65534)
                memory.probe()
            except HostError as error:
                code = 0 if "no right" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["anonymous", "huge", "private"])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("engine", ["auto", "pwrite"])
def test_saved_by_the_writer(kind: str, dense: bool, engine: str, tmp_path: Path) -> None:
    """An image of another process's memory beside one of our own; holes of both are zero."""
    mine = np.zeros(2 * MIB + PAGE, np.uint8)
    mine[PAGE] = 1
    options = WriteOptions(channels=1, depth=1, engine=engine, direct="preferred")  # type: ignore[arg-type]  # one of the names
    with remote_memory(kind, SIZE, TOUCHED) as remote, opened(remote) as memory:
        blocks = [RamBlock("mine", mine, dense=False), RamBlock("theirs", memory, dense=dense)]
        before = remote.pages_there()
        with MappedRamWriter(tmp_path / "vm.mig", blocks, options=options) as writer:
            writer.write_all()
            writer.write_all()  # every buffer has held another window by now
            writer.write_pages("theirs", np.array([2, 3, 701, 5000, 9000]))
            writer.finish()
        assert remote.pages_there() == before
    image = read_image(tmp_path / "vm.mig")
    assert image.contents["theirs"] == expected(TOUCHED)
    assert image.contents["mine"] == mine.tobytes()
    bits = image.blocks[1].bits
    assert len(bits) == (SIZE // PAGE if dense else len(TOUCHED))


def test_digests_are_of_the_bytes_written(tmp_path: Path) -> None:
    """What verify compares: windows with holes, in part and whole."""
    from uringmig.verify import verify

    with (
        remote_memory("anonymous", SIZE, TOUCHED) as remote,
        opened(remote) as memory,
        MappedRamWriter(tmp_path / "vm.mig", [RamBlock("theirs", memory)]) as writer,
    ):
        writer.write_all()
        result = writer.finish()
    assert result.manifest_path is not None
    assert verify(tmp_path / "vm.mig").mismatches == ()
