"""Job files on the command line: their text, and the archive that one stands for."""

from __future__ import annotations

from pathlib import Path

from uringmig.batch.job import BYTES_MAX, parse_jobs
from uringmig.errors import StateError


def read_job_text(path: Path) -> str:
    """The job file's text.

    Raises:
        StateError: it is no text of a sane size, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(BYTES_MAX + 1).decode()
    except OSError as error:
        raise StateError(f"{path}: cannot read the job file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise StateError(f"{path}: not UTF-8 at byte {error.start}") from None


def archive_of(path: str | Path) -> Path:
    """The archive itself, or the one that a job file fills.

    Raises:
        StateError: it is a file and no job file, or one that fills several archives.
    """
    place = Path(path)
    if not place.is_file():
        return place
    job_file = parse_jobs(read_job_text(place), path=str(place.absolute()))
    archives = sorted({job.archive for job in job_file.jobs})
    if len(archives) > 1:
        raise StateError(f"{place}: fills several archives, name one: {', '.join(archives)}")
    return Path(archives[0])
