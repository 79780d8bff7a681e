"""The command line as its users meet it: the real program, its exit codes, what it prints."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from archiveentries import add_entry
from commandline import PROGRAM, Ended, finish, start, uringmig
from imagewriter import Block, build_image

from uringmig import MappedRamWriter, RamBlock
from uringmig.archive.directory import Archive
from uringmig.options import WriteOptions

MIB = 1 << 20


def write_image(path: Path, size_bytes: int) -> Path:
    """An image with every third page zero, and its manifest."""
    memory = np.random.default_rng(1).integers(0, 256, size_bytes, dtype=np.uint8)
    memory.reshape(-1, 4096)[::3] = 0
    with MappedRamWriter(path, [RamBlock("pc.ram", memory)]) as writer:
        writer.write_all()
        writer.finish()
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("cli") / "a.mig", 24 * MIB)


@pytest.fixture
def own_image(tmp_path: Path) -> Path:
    """An image that the test may damage."""
    return write_image(tmp_path / "own.mig", 12 * MIB)


@pytest.fixture
def no_direct(tmp_path: Path) -> Iterator[Path]:
    """A file system without O_DIRECT."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system without O_DIRECT (ramfs) needs root")
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def flip(path: Path, offset: int) -> None:
    """Damage one byte on disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def test_done_is_0(image: Path) -> None:
    done = uringmig("verify", image)
    assert (done.code, done.err) == (0, "")
    assert "no damage found" in done.out


def test_small_blocks_are_taken(image: Path) -> None:
    """Also below the default bridge, for which there is no option."""
    assert uringmig("verify", image, "--block-size", "4K").code == 0


def test_verify_without_a_manifest_is_1(own_image: Path) -> None:
    Path(f"{own_image}.manifest.json").unlink()
    done = uringmig("verify", own_image, "--json")
    assert done.code == done.result()["exit_code"] == 1
    assert done.err.startswith("uringmig: warning: no own.mig.manifest.json")
    assert len(done.result()["warnings"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["save", "out"],
        ["verify", "x", "--engine", "fast"],
        ["verify", "x", "--direct", "perhaps"],
        ["verify", "x", "--block-size", "big"],
        ["verify", "x", "--block-size", "1.0001K"],
        ["verify", "x", "--block-size", "5000"],
        ["verify", "x", "--channels", "0"],
        ["verify", "x", "--offset", "0xzz"],
        ["verify", "x", "--rate", "9" * 400],
        ["load", "x", "--qmp", "y", "--channels", "256"],
        ["load", "x", "--qmp", "y", "--then", "quit"],
    ],
)
def test_usage_is_2(arguments: list[str]) -> None:
    assert uringmig(*arguments).code == 2


@pytest.mark.parametrize("offset", ["0x7fffffffffffffff", "0xffffffffffffffffff", "9" * 20])
def test_an_offset_that_no_file_has_is_3(image: Path, offset: str) -> None:
    for command in ("inspect", "verify"):
        done = uringmig(command, image, "--offset", offset)
        assert done.code == 3
        assert "expected an offset in the file" in done.err


def test_a_hostile_file_is_3(tmp_path: Path, image: Path) -> None:
    for name, data in [
        ("empty", b""),
        ("noise", b"\x00" * 5000),
        ("escape", b"QEVM\0\0\0\3\x07\0\0\0\x08\x1b[2J\nxyz" + bytes(100)),
        ("cut", image.read_bytes()[:-40]),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        for command in ("inspect", "verify"):
            done = uringmig(command, path, "--json")
            assert done.code == 3, name
            assert done.out.count("\n") == done.err.count("\n") == 1
            assert done.err.startswith(f"uringmig: {path}: "), "which file is it?"
            assert "\x1b" not in done.err + done.out
            event = done.result()
            assert (event["event"], event["exit_code"]) == ("error", 3)
            assert event["kind"] == "FormatError"


def test_every_mismatch_has_a_line_and_is_3(own_image: Path) -> None:
    [block] = uringmig("inspect", own_image, "--json").result()["blocks"]
    offsets = [block["pages_offset"] + 4096 + place for place in (0, 4 * MIB, 8 * MIB + 8192)]
    for offset in offsets:
        flip(own_image, offset)
    done = uringmig("verify", own_image)
    assert (done.code, done.err) == (3, "")
    lines = done.out.splitlines()
    assert len(lines) == 3
    assert all("pc.ram" in line and f"chunk {row}" in line for row, line in enumerate(lines))
    event = uringmig("verify", own_image, "--json").result()
    assert event["exit_code"] == 3
    assert [one["offset"] - block["pages_offset"] for one in event["mismatches"]] == [
        row * 4 * MIB for row in range(3)
    ]


def test_no_qmp_socket_is_4(tmp_path: Path, image: Path) -> None:
    out = tmp_path / "out.mig"
    for arguments in (["save", out], ["load", image]):
        done = uringmig(*arguments, "--qmp", tmp_path / "none.sock", "--json")
        assert done.code == 4
        assert done.result()["kind"] == "PeerError"
    assert list(tmp_path.iterdir()) == []


def test_storage_is_5(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        done = uringmig("inspect", path, "--json")
        assert done.code == 5
        assert done.result()["kind"] == "StorageError"
        assert done.result()["path"] == str(path)


@pytest.mark.parametrize("kind", ["fifo", "endless", "folder"])
def test_a_manifest_that_is_no_file_is_5(own_image: Path, kind: str) -> None:
    """Reading it would never end."""
    sidecar = Path(f"{own_image}.manifest.json")
    sidecar.unlink()
    if kind == "fifo":
        os.mkfifo(sidecar)
    elif kind == "endless":
        sidecar.symlink_to("/dev/zero")
    else:
        sidecar.mkdir()
    done = uringmig("verify", own_image)
    assert (done.code, done.err) == (5, f"uringmig: {sidecar}: not a regular file\n")


def test_direct_required_where_there_is_none_is_5_and_preferred_says_so(no_direct: Path) -> None:
    image = write_image(no_direct / "a.mig", MIB)
    assert uringmig("verify", image, "--direct", "required").code == 5
    done = uringmig("verify", image)
    assert done.code == 0
    assert done.err.count("no O_DIRECT (") == done.err.count("\n") == 1
    assert uringmig("inspect", image).code == 0


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_io_uring_required_where_it_is_refused_is_6(image: Path, number: int) -> None:
    done = uringmig("verify", image, "--engine", "io_uring", refuse_ring=number)
    assert done.code == 6
    assert done.err.startswith("uringmig: io_uring: ")
    assert errno.errorcode[number] in done.err
    fallback = uringmig("verify", image, refuse_ring=number)
    assert fallback.code == 0
    assert fallback.err.startswith("uringmig: note: using pwrite: io_uring: ")
    assert fallback.err.count("\n") == 1
    version = uringmig("--version", refuse_ring=number)
    assert version.code == 0
    assert "engine using pwrite: io_uring: " in version.out


def test_a_bug_of_ours_is_70_and_never_1(image: Path) -> None:
    """1 would say that all is done, with warnings."""
    bug = "import sys, uringmig.cli as c, uringmig.cli.verify; "
    bug += "sys.modules['uringmig.cli.verify'].verify_image = lambda *_, **__: 1 / 0; c.main()"
    done = subprocess.run(
        [sys.executable, "-c", bug, "verify", image, "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    [event] = Ended(done.returncode, done.stdout, done.stderr).events()
    assert (event["event"], event["kind"], event["exit_code"]) == (
        "error", "ZeroDivisionError", 70,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_end_changes_nothing(image: Path, number: signal.Signals) -> None:
    """What is done is not called interrupted while Python takes itself down."""
    late = "import atexit, os, uringmig.cli as c; "
    late += f"atexit.register(os.kill, os.getpid(), {int(number)}); c.main()"
    done = subprocess.run([sys.executable, "-c", late, "inspect", image], check=False)
    assert done.returncode == 0


def test_version_names_liburing_and_the_engine() -> None:
    done = uringmig("--version")
    assert done.code == 0
    first, second, third = done.out.splitlines()
    assert re.fullmatch(r"uringmig \d+\.\d+\.\d+", first)
    assert re.fullmatch(r"liburing 2\.\d+ \(.+\)", second)
    assert third.startswith("engine ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_128_and_its_number(image: Path, number: signal.Signals) -> None:
    # 16 MiB at this rate take 8 seconds; the first event shows that it is under way.
    process = start("verify", image, "--rate", "2M", "--depth", "1", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    done = finish(process)
    assert done.code == 128 + number
    assert done.err == f"uringmig: stopped by {number.name}\n"
    assert done.result()["exit_code"] == 128 + number


def test_json_lines_are_progress_and_one_result(image: Path) -> None:
    done = uringmig("verify", image, "--rate", "16M", "--depth", "1", "--json")
    events = done.events()
    assert [event["event"] for event in events[-2:]] == ["progress", "result"]
    progress = [event for event in events if event["event"] == "progress"]
    assert len(events) == len(progress) + 1
    shares = [event["share"] for event in progress]
    assert shares == sorted(shares)
    # About one second: a bounded number of events, not one a snapshot.
    assert 2 <= len(progress) <= 2 + 2 * events[-1]["seconds"]


def test_inspect_tells_pages_runs_and_places(image: Path) -> None:
    event = uringmig("inspect", image, "--json").result()
    pages = 24 * MIB // 4096
    [block] = event["blocks"]
    assert block["pages_zero"] == pages // 3
    assert block["pages_set"] == pages - pages // 3
    assert block["runs"] == {"runs": pages // 3, "median_pages": 2, "longest_pages": 2}
    assert block["pages_offset"] % MIB == 0
    assert event["manifest_path"] == f"{image}.manifest.json"
    assert event["machine"] == "none"
    people = uringmig("inspect", image)
    assert people.code == 0
    assert re.search(rf"^pc\.ram +24\.0 MiB +{block['pages_set']} ", people.out, re.MULTILINE)


def test_a_page_area_off_the_boundary_is_a_warning(tmp_path: Path) -> None:
    """Legal, and QEMU loads it; but it does not put page areas there, for direct-io's sake."""
    off, far = tmp_path / "off", tmp_path / "far"
    block = Block(idstr="pc.ram", used_length=8 * 4096, pages={1: b"x" * 4096})
    build_image(blocks=[replace(block, pages_offset=0x5000)]).write(off)
    build_image(blocks=[replace(block, pages_offset=2 * MIB)]).write(far)
    done = uringmig("inspect", off)
    assert done.code == 1
    assert done.err.startswith("uringmig: warning: ramblock 'pc.ram': the page area at 0x5000 ")
    assert (uringmig("inspect", far).code, uringmig("inspect", far).err) == (0, "")


def test_quiet_says_nothing_but_errors(image: Path, tmp_path: Path) -> None:
    done = uringmig("verify", image, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert uringmig("verify", tmp_path / "none", "-q").err.count("\n") == 1


def on_terminal(*arguments: object) -> tuple[str, str]:
    """What a run that succeeds shows on a terminal, and what it writes to standard output."""
    outer, inner = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=inner,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(inner)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the terminal's other side is closed
            while data := os.read(outer, 65536):
                shown += data
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(outer)
    assert process.returncode == 0
    return shown.decode(), out


def test_a_bar_on_a_terminal_and_only_there(image: Path) -> None:
    text, out = on_terminal("verify", image, "--rate", "16M", "--depth", "1", "-v")
    assert "verify" in text
    assert re.search(r"\d+%", text)
    assert re.search(r"\d+ MB/s", text)
    assert text.rstrip().endswith("\x1b[2K") or "\x1b[?25h" in text, "the cursor is hidden"
    assert out.count("\n") == 1
    assert "%" not in uringmig("verify", image).err


def test_the_bar_has_every_channel_that_writes_if_asked(tmp_path: Path) -> None:
    with Archive.open(tmp_path / "a", write=True) as archive:
        add_entry(archive, "one", ram_bytes=24 * MIB)
    where = ["archive", "restore", tmp_path / "a", "one"]
    text, _ = on_terminal(*where, tmp_path / "out", "--rate", "16M", "--depth", "1", "-v")
    assert re.search(r"\[[\d.]+ \w*B, [\d.]+ \w*B\]", text)
    text, _ = on_terminal(*where, tmp_path / "again", "--rate", "16M", "--depth", "1")
    assert "%" in text
    assert "[0 B" not in text


def test_a_reader_that_goes_away_is_no_error(image: Path) -> None:
    process = start("inspect", image)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()


def test_output_that_cannot_be_written_is_a_warning(image: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, "inspect", str(image)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert b"cannot write the output" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_name_that_is_not_text_is_no_traceback(image: Path) -> None:
    name = image.with_name(os.fsdecode(b"caf\xe9\x1b.mig"))
    name.symlink_to(image)
    for more in ([], ["--json"]):
        done = uringmig("inspect", name, *more)
        assert done.code == 0
        assert "\x1b" not in done.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_and_answers(shell: str) -> None:
    script = subprocess.run(
        [*PROGRAM, "--show-completion", shell],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "_URINGMIG_COMPLETE" in script


def test_completion_offers_commands_and_choices() -> None:
    def complete(line: str) -> list[str]:
        environment = {
            **os.environ,
            "_URINGMIG_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=True)
        # Each is the kind of completion (a word; a file name) and the word.
        return [line.removeprefix("plain,") for line in done.stdout.split()]

    assert complete("uringmig ") == [
        "save", "load", "repair", "inspect", "verify", "convert", "diff", "bench", "archive",
    ]  # fmt: skip
    assert complete("uringmig verify x --engine ") == ["auto", "io_uring", "pwrite"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_where_the_shell_looks(tmp_path: Path, shell: str) -> None:
    """For a shell that is named, or else for the one at hand."""
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": f"/usr/bin/{shell}"}
    environment.pop("XDG_DATA_HOME", None)
    for arguments in (["--install-completion", shell], ["--install-completion"]):
        done = subprocess.run(
            [*PROGRAM, *arguments], env=environment, capture_output=True, text=True, check=True
        )
        [written] = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert str(written) in done.stdout
        assert f"_URINGMIG_COMPLETE={shell}_complete" in written.read_text()
        written.unlink()


def test_completion_for_a_shell_that_has_none_is_refused() -> None:
    done = uringmig("--show-completion", "csh")
    assert done.code == 2
    assert "name one of bash, fish, zsh" in done.err


def test_defaults_shown_are_those_of_the_options() -> None:
    done = subprocess.run(
        [*PROGRAM, "save", "--help"],
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("channels", "depth", "engine", "direct"):
        # Of an option with a long list of choices the words begin on the next line.
        words = done.stdout.partition(f"--{name} ")[2].partition("  --")[0]
        assert f"[default: {getattr(WriteOptions(), name)}]" in words
