"""Standard descriptors as daemons, pipelines and full disks leave them: same outcome and code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from batchjobs import check_archive, job, make_image, write_jobs
from commandline import PROGRAM, Ended, uringmig

from uringmig.units import MiB

CLOSINGS = ("2>&-", ">&-", "<&-", "<&- >&- 2>&-")


def as_shell(redirection: str, *arguments: object) -> Ended:
    """Run the program with standard descriptors as a shell's redirection leaves them."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job file whose archive has one entry, ``a``."""
    folder = tmp_path_factory.mktemp("archive")
    make_image(folder / "vm.mig", size=4 * MiB)
    path = write_jobs(folder, job("a", "image = 'vm.mig'"), defaults='entry = "{name}"')
    assert uringmig("archive", "run", path).code == 0
    return folder / "archive"


@pytest.mark.parametrize("closing", ["2>&-", "<&- >&- 2>&-"])
def test_every_command_does_the_same_with_descriptors_closed(
    tmp_path: Path, archive: Path, closing: str
) -> None:
    """What nobody can read is not said; everything else, and the exit code, is as ever."""
    image = archive / "a.mig"
    commands = {
        ("inspect", image): 0,
        ("verify", image): 0,
        ("verify", tmp_path / "none"): 5,
        ("verify", "--nonsense"): 2,
        ("save", "--qmp", tmp_path / "none", tmp_path / "out"): 4,
        ("load", "--qmp", tmp_path / "none", image): 4,
        ("archive", "list", archive): 0,
        ("archive", "show", archive, "a"): 0,
        ("archive", "verify", archive): 0,
        ("archive", "restore", archive, "a", tmp_path / "restored"): 0,
        ("archive", "prune", archive, "--keep-last", 1): 0,
        ("archive", "reindex", archive): 0,
        ("--version",): 0,
        ("--help",): 0,
        ("archive", "run", "--help"): 0,
    }
    for one in CLOSINGS:
        assert as_shell(one, "verify", image).code == 0
    codes = {arguments: as_shell(closing, *arguments).code for arguments in commands}
    assert codes == commands
    assert uringmig("verify", tmp_path / "restored").code == 0


@pytest.mark.parametrize("closing", CLOSINGS)
def test_a_run_archives_with_descriptors_closed(tmp_path: Path, closing: str) -> None:
    """Nothing that is said gets into an image, a lock or a worker's socket."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(
        tmp_path,
        job("good", "image = 'vm.mig'"),
        job("cold", "image = 'vm.mig'", tier="cold", verify=True),
        job("gone", "image = 'none.mig'"),
    )
    done = as_shell(closing, "archive", "run", path, "--json", "--report", tmp_path / "report")
    assert done.code == 5
    assert len(check_archive(tmp_path / "archive")) == 2
    assert len(list((tmp_path / "report").iterdir())) == 2


def test_a_bench_with_descriptors_closed(tmp_path: Path) -> None:
    options = ("--seconds", "1", "--size", "16M", "--out", tmp_path / "profile")
    assert as_shell("<&- >&- 2>&-", "bench", tmp_path, *options).code == 0
    assert (tmp_path / "profile").stat().st_size > 0


def test_no_file_gets_a_standard_descriptor(tmp_path: Path) -> None:
    """What is opened after `prepare` is none of 0 to 2, and what is printed is not in it."""
    opened = tmp_path / "opened"
    code = (
        "import os; [os.close(number) for number in range(3)]\n"
        "from uringmig import stdio; stdio.prepare()\n"
        f"file = open({str(opened)!r}, 'w'); print('printed', flush=True)\n"
        "file.write(str(file.fileno()))\n"
        "assert all(os.get_inheritable(number) for number in range(3))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert int(opened.read_text()) > 2


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["archive", "--help"], ["inspect"], ["inspect", "--json"]],
)
def test_output_to_a_full_disk_is_a_warning(archive: Path, arguments: list[str]) -> None:
    """Help and version too, which do not go through our own output."""
    more = [archive / "a.mig"] if "inspect" in arguments else []
    done = as_shell(">/dev/full", *arguments, *more)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "warning: cannot write the output: No space left on device" in done.err


def test_complaints_to_a_full_disk_are_a_warning(archive: Path, tmp_path: Path) -> None:
    """Standard error that takes nothing: exit 1 where all else is well, else as ever."""
    image = archive / "a.mig"
    bare = tmp_path / "bare.mig"
    bare.write_bytes(image.read_bytes())
    assert as_shell("2>/dev/full", "inspect", image).code == 0, "nothing was to be said"
    assert as_shell("2>/dev/full", "verify", bare).code == 1
    assert as_shell("2>/dev/full", "verify", tmp_path / "none").code == 5
    assert as_shell("2>/dev/full", "nonsense").code == 2
    assert as_shell(">/dev/full 2>/dev/full", "inspect", image).code == 1


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"], ["archive", "list"]])
def test_a_reader_that_leaves_is_no_trouble(archive: Path, arguments: list[str]) -> None:
    """As `uringmig ... | head -1`, of which the shell shows the program's own code."""
    more = {"inspect": [archive / "a.mig"], "list": [archive]}.get(arguments[-1], [])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PROGRAM, *arguments, *more], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_descriptors_that_cannot_be_written(archive: Path) -> None:
    """Open for reading only, as a wrong redirection leaves them."""
    assert as_shell("1</dev/null", "inspect", archive / "a.mig").code == 1
    assert as_shell("2</dev/null", "inspect", archive / "a.mig").code == 0


def test_a_slow_reader_of_a_pipe_that_does_not_block(archive: Path) -> None:
    """Somebody who shares the pipe has made it non-blocking: everything still gets through."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    text = b""
    with subprocess.Popen([*PROGRAM, "archive", "run", "--help"], stdout=write) as process:
        # Filled by us beforehand, so that the program meets a full pipe.
        try:
            while True:
                os.write(write, bytes(4096))
        except BlockingIOError:
            os.close(write)
        while data := os.read(read, 65536):
            text += data
    os.close(read)
    assert process.returncode == 0
    assert b"--metrics-file" in text.replace(b"\0", b"")


def test_a_terminal_that_is_gone(archive: Path) -> None:
    """A session that was hung up, with SIGHUP ignored (nohup): the work is done, and is 0."""
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "verify", archive / "a.mig", "--rate", "4M", "--depth", "1"],
        stdin=inner, stdout=inner, stderr=inner,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    os.close(inner)
    os.close(outer)
    assert process.wait() == 0
