"""Private huge pages of a real child process, read from outside; the pool is small."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from hugepool import mounted_hugetlbfs, pool_count
from remoteprocess import PAGE, expected_page, opened, read_all, remote_memory


def test_private_huge_pages(huge_page: int, tmp_path: Path) -> None:
    """hugetlbfs, mapped privately: no huge page is taken from the pool for a hole."""
    with mounted_hugetlbfs(tmp_path / "huge") as folder:
        size = 4 * huge_page
        (folder / "ram").touch()
        os.truncate(folder / "ram", size)
        touched = [3, huge_page // PAGE + 1]
        with (
            remote_memory("private", size, touched, path=folder / "ram") as remote,
            opened(remote, size=size) as memory,
        ):
            free = pool_count("Free")
            whole = read_all(memory)
            for page in touched:
                found = whole[page * PAGE : (page + 1) * PAGE].tobytes()
                assert found == expected_page(page, salt=1)
            assert np.count_nonzero(whole.reshape(-1, PAGE).any(axis=1)) == len(touched)
            assert pool_count("Free") == free
