"""Job files on the command line: their text, and the archive that one stands for."""

from __future__ import annotations

import os
import select
from pathlib import Path

from uringmig import signals
from uringmig.batch.job import BYTES_MAX, parse_jobs
from uringmig.errors import StateError, explained


def read_job_text(path: Path) -> str:
    """The job file's text.

    Raises:
        StateError: it is no text of a sane size, or cannot be read.
        LimitError: this process may open no more files.
        StorageError: its disk is failing.
    """
    try:
        # A pipe is opened without waiting for its writer, and waited for where a signal ends that.
        with open(path, "rb", opener=_open_at_once) as file:
            data = b""
            while len(data) <= BYTES_MAX:
                signals.wait_until_ready(file.fileno(), select.POLLIN, timeout_s=None)
                more = os.read(file.fileno(), BYTES_MAX + 1 - len(data))
                if not more:
                    break
                data += more
            return data.decode()
    except OSError as error:
        why = f"{path}: cannot read the job file: {error.strerror}"
        raise explained(error) or StateError(why) from None
    except UnicodeDecodeError as error:
        raise StateError(f"{path}: not UTF-8 at byte {error.start}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open for reading without waiting."""
    return os.open(path, flags | os.O_NONBLOCK)


def archive_of(path: Path) -> Path:
    """The archive that a job file fills.

    Raises:
        StateError: it is no job file, or one that fills several archives.
    """
    job_file = parse_jobs(read_job_text(path), path=str(path.absolute()))
    archives = sorted({job.archive for job in job_file.jobs})
    if len(archives) > 1:
        raise StateError(f"{path}: fills several archives, name one: {', '.join(archives)}")
    return Path(archives[0])
