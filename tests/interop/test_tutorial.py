"""docs/tutorial.md is run as it stands: every command on the page, in order, in one shell."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Final

import pytest

from uringmig.testing.guestimage import GUEST_FOLDER

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "tutorial.md"
_FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What the page promises to show.
COMMANDS: Final = (
    "save", "load", "inspect", "verify",
    "archive run", "archive list", "archive show", "archive verify", "archive restore",
    "archive prune",
)  # fmt: skip


def fences() -> list[tuple[str, str]]:
    """Language and text of every fenced block of the page."""
    return [(match[1], match[2]) for match in _FENCE.finditer(PAGE.read_text())]


def test_every_command_of_the_page_is_one_that_runs() -> None:
    """No command hides in a block that is only shown, and none that is promised is missing."""
    blocks = fences()
    assert {language for language, _ in blocks} == {"sh", "text"}
    for language, text in blocks:
        assert language == "sh" or not re.search(r"^(\$ )?(uringmig|qemu)\b", text, re.MULTILINE)
    script = "".join(text for language, text in blocks if language == "sh")
    for command in COMMANDS:
        assert re.search(rf"^uringmig {command} ", script, re.MULTILINE), command


def test_the_tutorial_runs_and_its_guest_remembers(qemu: str, tmp_path: Path) -> None:
    """The saved guest's digest is the restored one's and its counter goes on; nothing stays.

    ci/test has run ci/setup before, as the page asks; of the page's variables only TUTORIAL, the
    folder for everything, is given another value.
    """
    if not (GUEST_FOLDER / "vmlinuz").is_file():
        pytest.skip("no guest kernel and busybox (ci/setup fetches them)")
    folder = tmp_path / "t"
    script = tmp_path / "tutorial.sh"
    script.write_text(
        "set -euo pipefail\n" + "\n".join(text for language, text in fences() if language == "sh")
    )
    log = tmp_path / "tutorial.log"
    shared_before = _shared()
    # Into a file: the page's QEMUs would hold a pipe open after a command has failed.
    with log.open("wb") as sink:
        shell = subprocess.Popen(
            ["bash", script], cwd=ROOT, env={**os.environ, "TUTORIAL": str(folder)},
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            left = _shared() - shared_before
            for path in left:
                path.unlink()
    output = log.read_text()
    assert code == 0, output
    first = re.search(r"^digest (\w{32}), counter (\d+)$", output, re.MULTILINE)
    assert first is not None, output
    later = re.findall(r"^(\w+) remembers: digest (\w+), counter (\d+)$", output, re.MULTILINE)
    assert [name for name, *_ in later] == ["copy", "plain", "again"], output
    assert {digest for _, digest, _ in later} == {first[1]}
    assert all(int(count) > int(first[2]) for *_, count in later)
    assert not folder.exists()
    assert not left


def _shared() -> set[Path]:
    """Memory files of the page's guests."""
    return set(Path("/dev/shm").glob("uringmig-tutorial-*"))
