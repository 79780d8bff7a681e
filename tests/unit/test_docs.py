"""The pages of docs/ that ci/docs makes say what the code says now."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import uringmig
from uringmig.batch import metrics
from uringmig.batch.job import _Settings, parse_jobs

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


def test_architecture_names_rooms_that_are_there() -> None:
    """Every module that docs/architecture.md names exists, and no room is missing from it."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "uringmig"
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]*)(?:\.[A-Za-z_.]+)?`", page):
        root = ROOT if name.startswith(("tests/", "uringmig/")) else package
        assert (
            (root / name).is_dir()
            or (root / f"{name}.py").is_file()
            or (root / f"{name}.md").is_file()
        ), name
    for path in package.iterdir():
        if path.name.startswith("_") or not (path.is_dir() or path.suffix == ".py"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.stem
        assert f"`{name}`" in page, f"no word of {name}"


def test_the_job_file_of_the_page_is_one() -> None:
    """The example of docs/archives.md parses, and its table has every key there is."""
    page = (ROOT / "docs" / "archives.md").read_text()
    example = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    jobs = parse_jobs(example[1], path="/etc/uringmig/jobs.toml").jobs
    assert [job.name for job in jobs] == ["web1", "old", "sim"]
    keys = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert keys - {"name", "vm", "source"} == set(_Settings.__struct_fields__)


def test_every_metric_is_on_the_page() -> None:
    """docs/operations.md names each metric that a run writes."""
    page = (ROOT / "docs" / "operations.md").read_text()
    written = set(re.findall(r'"(uringmig_\w+)"', Path(metrics.__file__).read_text()))
    assert len(written) > 15
    for name in written:
        shown = name if not name.startswith("uringmig_job_") else name.removeprefix("uringmig_job")
        assert name in page or f"...{shown}`" in page, name
