"""The pool of huge pages: filled for the tests that want some, and put back."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

POOL = Path("/proc/sys/vm/nr_hugepages")
POOL_PAGES = 4


def pool_count(which: str) -> int:
    """Read HugePages_Total, _Free or _Rsvd: pages of the default size."""
    found = re.search(rf"HugePages_{which}:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1])


def huge_page_bytes() -> int:
    """The size of a huge page of the default size."""
    found = re.search(r"Hugepagesize:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def pool_of(pages: int) -> Iterator[None]:
    """Have so many free huge pages, and give them back; skips where they cannot be had."""
    before = POOL.read_text()
    try:
        POOL.write_text(str(pool_count("Total") + pages - pool_count("Free")))
    except OSError as error:
        pytest.skip(f"no right to make huge pages: {error}")
    try:
        if pool_count("Free") < pages:
            pytest.skip(f"not enough contiguous memory for {pages} huge pages")
        yield
    finally:
        POOL.write_text(before)


@contextmanager
def mounted_hugetlbfs(folder: Path) -> Iterator[Path]:
    """Mount it there, in a new folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def huge_page() -> Iterator[int]:
    """See to a pool of at least 4 free huge pages; give the huge page size in bytes."""
    with pool_of(POOL_PAGES):
        yield huge_page_bytes()
