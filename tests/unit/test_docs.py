"""The pages of docs/ that ci/docs makes say what the code says now."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import uringmig

ROOT = Path(__file__).parents[2]


def make_docs(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "ci" / "docs.py", *arguments],
        capture_output=True, text=True, cwd=root, check=False,
    )  # fmt: skip


def test_made_pages_are_up_to_date() -> None:
    """docs/api.md is what the docstrings say, docs/uringmig.1 what the command line's help says."""
    done = make_docs(ROOT, "--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stale_page_is_seen(tmp_path: Path) -> None:
    """``--check`` names the page that differs and leaves it; without it the page is made anew."""
    shutil.copytree(ROOT / "uringmig", tmp_path / "uringmig")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "ci").mkdir()
    shutil.copy(ROOT / "ci" / "docs.py", tmp_path / "ci" / "docs.py")
    page = tmp_path / "docs" / "api.md"
    page.write_text(page.read_text() + "\nand more\n")
    checked = make_docs(tmp_path, "--check")
    assert (checked.returncode, "docs/api.md" in checked.stderr) == (1, True)
    assert page.read_text().endswith("and more\n")
    assert make_docs(tmp_path).returncode == 0
    assert page.read_text() == (ROOT / "docs" / "api.md").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    """What `uringmig.__all__` names has a heading of its own in docs/api.md."""
    page = (ROOT / "docs" / "api.md").read_text()
    for name in uringmig.__all__:
        assert re.search(rf"^### `{name}`$", page, re.MULTILINE), name


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    """A relative link in docs/ names a file that is there."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
