"""What does an archive's index cost with many entries: opening, list, find, has, prune?

By hand: ``python -m perf.archiveindex [ENTRIES] [FOLDER]``. Entries are made cheaply: a
manifest, and an image that is one hole.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from uringmig.archive.directory import Archive
from uringmig.archive.pruning import prune

_IMAGE_BYTES = 1 << 20
_BEGIN = datetime(2020, 1, 1, tzinfo=UTC)


def make_entries(folder: Path, count: int) -> None:
    """Fill an archive with entries that nobody could restore, but everybody lists."""
    for number in range(count):
        image = folder / f"vm{number % 100}-{number}.mig"
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        said = {
            "format": "uringmig-manifest",
            "version": 1,
            "created": (_BEGIN + timedelta(hours=number)).isoformat(),
            "machine": "pc-q35-10.0",
            "file_size": _IMAGE_BYTES,
            "archive": {
                "name": image.stem,
                "vm": f"vm{number % 100}",
                "tier": "hot",
                "host": "node1",
                "source_kind": "qmp",
                "source_path": "/run/vm.qmp",
                "source_fingerprint": "",
                "content_digest": f"{number:032x}",
                "memory_bytes": _IMAGE_BYTES,
                "stored_bytes": 0,
            },
        }
        Path(f"{image}.manifest.json").write_text(json.dumps(said))


@contextmanager
def timed(what: str, times: int = 1) -> Iterator[None]:
    """Print how long one of so many took."""
    started = time.perf_counter()
    yield
    print(f"{what}: {(time.perf_counter() - started) / times * 1e3:.1f} ms", flush=True)


def main(count: int, parent: str | None) -> None:
    """Measure one archive from its first opening to its pruning."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name) / "a"
        Archive.open(folder, write=True).close()
        make_entries(folder, count)
        with timed("open for writing, no row yet"):
            Archive.open(folder, write=True).close()
        time.sleep(3.5)
        with timed("open for writing, no stamp yet"):
            Archive.open(folder, write=True).close()
        with timed("open for writing, nothing to do"):
            Archive.open(folder, write=True).close()
        with Archive.open(folder, write=False) as archive:
            with timed(f"list of {count}"):
                names = [entry.name for entry in archive.entries()]
            some = names[:: max(1, count // 100)]
            with timed("find", len(some)):
                for one in some:
                    archive.find(one)
            with timed("has what is not there", 100):
                for number in range(100):
                    archive.has(f"nobody{number}")
            with timed("latest_of", 10):
                for number in range(10):
                    archive.latest_of(f"vm{number}")
        with Archive.open(folder, write=True) as archive:
            with timed("remove one"):
                archive.remove(names[0])
            with timed(f"prune of half of {count}"):
                keep = max(1, count // 200)
                going = [one for one in prune(archive, keep_last=keep, delete=True).decisions
                         if not one.keep]  # fmt: skip
            print(f"pruned {len(going)}, left {len(archive.entries())}")


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 10_000,
        sys.argv[2] if len(sys.argv) > 2 else None,
    )
