"""The pool of huge pages: filled for the tests that want some, and put back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

POOL = Path("/proc/sys/vm/nr_hugepages")
POOL_PAGES = 4


def pool_count(which: str) -> int:
    """Read HugePages_Total, _Free or _Rsvd: pages of the default size."""
    found = re.search(rf"HugePages_{which}:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def huge_page() -> Iterator[int]:
    """See to a pool of at least 4 free huge pages; give the huge page size in bytes."""
    before = POOL.read_text()
    try:
        POOL.write_text(str(pool_count("Total") + POOL_PAGES - pool_count("Free")))
    except OSError as error:
        pytest.skip(f"no right to make huge pages: {error}")
    if pool_count("Free") < POOL_PAGES:
        POOL.write_text(before)
        pytest.skip("not enough contiguous memory for 4 huge pages")
    found = re.search(r"Hugepagesize:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    yield int(found[1]) * 1024
    POOL.write_text(before)
