"""The journal of a run as a file: read when a run begins, appended to while it goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from uringmig.batch.journal import Begun, Record, RunState, encode, replay
from uringmig.errors import StorageError
from uringmig.storage.smallfile import publish_bytes
from uringmig.units import MiB

#: Ten thousand jobs with every retry leave a tenth of this.
_BYTES_MAX: Final = 256 * MiB


def read_state(path: Path) -> RunState:
    """What the journal at ``path`` says; an empty state if there is none.

    Raises:
        StorageError: there is one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            return replay(file.read(_BYTES_MAX))
    except FileNotFoundError:
        return RunState()
    except OSError as error:
        raise StorageError("cannot read the journal", errno=error.errno, path=path) from None


class RunRecord:
    """An open journal; a record is durable when `append` returns.

    Attributes:
        trouble: why records are no longer kept, or "": a run goes on without a journal, for the
            disk that is too full for it may still hold what matters.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.trouble = ""

    def begin(self, begun: Begun) -> None:
        """Replace the journal by that of a new run.

        Raises:
            StorageError: it cannot be written, and no records are kept.
        """
        publish_bytes(self._path, encode(begun))
        self._open()

    def go_on(self, state: RunState) -> None:
        """Append to the journal that ``state`` was read from, behind what is believed of it.

        Raises:
            StorageError: it cannot be written, and no records are kept.
        """
        self._open()
        try:
            os.ftruncate(self._fd, state.length)
        except OSError as error:
            self.close()
            raise StorageError(
                "cannot cut the journal", errno=error.errno, path=self._path
            ) from None

    def append(self, record: Record) -> None:
        """Add a record, durably; see `trouble`."""
        if self._fd < 0 or self.trouble:
            return
        data = encode(record)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fdatasync(self._fd)
        except OSError as error:
            self.trouble = f"{self._path}: the journal ends here: {error.strerror}"

    def close(self) -> None:
        """Close the file; harmless when called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        """Open the existing file."""
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(
                "cannot open the journal", errno=error.errno, path=self._path
            ) from None
