"""Reading an entry back falls back to other means no more silently than writing it did."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from batchjobs import job, make_image, write_jobs
from loopdisk import needs, run
from seccomp import refuse_io_uring

from uringmig.batch.attempt import carry_out
from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Archived, Attempt
from uringmig.progress import Snapshot
from uringmig.storage import liburing
from uringmig.units import MiB


@pytest.fixture
def no_direct(tmp_path: Path) -> Iterator[Path]:
    """A folder whose files nobody can open with O_DIRECT."""
    needs()
    point = tmp_path / "ramfs"
    point.mkdir()
    run("mount", "-t", "ramfs", "ramfs", str(point))
    yield point
    run("umount", str(point))


def order_of(folder: Path, tier: str) -> Attempt:
    """An attempt at a job that is verified, with everything in ``folder``."""
    make_image(folder / "vm.mig", size=MiB)
    path = write_jobs(folder, job("vm", "image = 'vm.mig'", tier=tier, verify=True))
    [parsed] = parse_jobs(path.read_text(), path=str(path)).jobs
    (folder / "archive").mkdir()
    image = folder / "archive" / "vm.mig"
    return Attempt(
        key="vm", job=parsed, entry="vm", image=str(image), journal=f"{image}.journal",
        previous=None, rate=0,
    )  # fmt: skip


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_what_reading_back_has_to_do_without_is_noted(tmp_path: Path, tier: str) -> None:
    """The io_uring that wrote the entry is refused from the publication on."""
    order = order_of(tmp_path, tier)
    results = []

    def tell(snapshot: Snapshot) -> None:
        if snapshot.phase == "publish":
            liburing.load.cache_clear()
            refuse_io_uring(errno.EPERM)

    # The filter is the thread's, and ends with it.
    thread = threading.Thread(target=lambda: results.append(carry_out(order, tell)))
    thread.start()
    thread.join()
    liburing.load.cache_clear()
    [archived] = results
    assert isinstance(archived, Archived)
    assert archived.verified
    [note] = archived.notes
    assert note.startswith("using pwrite: io_uring")


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_what_writing_and_reading_back_do_without_is_one_note(no_direct: Path, tier: str) -> None:
    """By the entry's own name; nobody can look for a partial file any more."""
    archived = carry_out(order_of(no_direct, tier), lambda _: None)
    assert isinstance(archived, Archived)
    assert archived.verified
    images = [note.partition(": no O_DIRECT (")[0] for note in archived.notes]
    assert sorted(images) == [
        str(no_direct / "archive" / "vm.mig"), str(no_direct / "vm.mig"),
    ]  # fmt: skip
