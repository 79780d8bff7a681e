"""What README.md shows runs as it stands: its shell lines and its ten lines of Python."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from uringmig.errors import PeerError
from uringmig.qemu.monitor import Monitor

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    """The page's only block in a language."""
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def test_the_page_is_short() -> None:
    """A newcomer reads all of it; what is longer has a page in docs/."""
    assert len(PAGE.splitlines()) <= 130


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / target).exists(), target


def test_its_python_runs(tmp_path: Path) -> None:
    """The library in ten lines: an image is written, and read back."""
    lines = block("python")
    assert len(lines.splitlines()) <= 10
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"vm.mig", "vm.mig.manifest.json"}


def test_its_vm_is_saved_and_restored(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A save and a restore in five lines, of an ordinary VM."""
    folder = tmp_path_factory.mktemp("r")
    lines = block("sh")
    assert len(lines.splitlines()) <= 5
    try:
        done = subprocess.run(
            ["bash", "-euc", lines], cwd=folder, env=dict(os.environ), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with Monitor(folder / "new.qmp") as monitor:
            assert monitor.run_state() == "running"
    finally:
        # Both stay in the background, as daemons do.
        for name in ("vm.qmp", "new.qmp"):
            with contextlib.suppress(PeerError), Monitor(folder / name) as monitor:
                monitor.execute("quit")
