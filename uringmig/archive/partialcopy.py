"""A copy on its way to its name: the partial file, and the journal from which it can go on.

The partial file begins with a mark and a token that the journal repeats, until its real first bytes
are written at the end: so neither is ever taken for something of another copy, and no reader takes
the partial file for an image.

What is left of a copy that ends early depends on its last checkpoint, not on how it ended: if there
is one, a signal, a full disk, a peer that goes away and kill -9 all leave both files. Without one a
clean end leaves nothing, and neither do contents that are not what they should be.

The journal only saves work: one that cannot be read or written costs no copy, and is told.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, Self

from uringmig.archive import copyjournal
from uringmig.archive.copyjournal import Chunk, Journal, JournalHeader
from uringmig.errors import BytesError, FormatError, StateError, StorageError
from uringmig.image import manifest
from uringmig.options import DirectMode
from uringmig.storage.imagetarget import NamedTarget
from uringmig.storage.mainfile import MainFile, open_for_reading

_MARK: Final = b"uringmig partial"
_MODE: Final = 0o600


class PartialCopy:
    """The file being written, and what an interrupted copy of the same left durable in it.

    A context manager, which closes it and keeps what a later copy can go on with.

    Args:
        out: the final name.
        tier: of the image.
        source: fingerprint of the contents; None: they are never the same again, so a journal that
            lies there is removed and none is made.
        shape: digest of all that decides where bytes go and how they look.
        direct: O_DIRECT or not.
        journal: where the journal is, or goes; None: nothing is resumed.

    Attributes:
        target: the file's two descriptors.
        taken_over: chunks that need not be copied again.
        resumable: whether checkpoints are of any use.
        notes: what is wrong with the journal, one line each.

    Raises:
        StateError: the name is taken by something that is not a file.
        StorageError: the files cannot be made, or another copy writes them.
    """

    def __init__(
        self,
        out: Path,
        *,
        tier: manifest.Tier,
        source: str | None,
        shape: str,
        direct: DirectMode,
        journal: Path | None,
    ) -> None:
        self._journal_path = journal
        self.notes: list[str] = []
        self.resumable = journal is not None and source is not None
        self._journal: MainFile | None = None
        self._journal_end = 0
        self._header = JournalHeader(
            tier=tier,
            source=source or "",
            shape=shape,
            token=os.urandom(copyjournal.TOKEN_BYTES).hex(),
        )
        former: Journal | None = None

        def keep(main: MainFile) -> bool:
            # Under the partial file's lock: nobody appends to the journal meanwhile.
            nonlocal former
            if journal is not None and source is not None:
                try:
                    former = _load(journal, self._header)
                except (FormatError, StorageError) as error:
                    why = error if isinstance(error, StorageError) else f"{journal}: {error}"
                    self.notes.append(f"the copy begins anew, its journal is lost: {why}")
            return former is not None and main.read_at(0, len(_mark(former))) == _mark(former)

        self.target = NamedTarget(out, mode=direct, sidecar_suffix=manifest.SUFFIX, keep=keep)
        self.taken_over: tuple[Chunk, ...] = ()
        if self.target.kept and former is not None:
            self.taken_over = former.chunks
            self._header = former.header
            self._journal_end = former.valid_bytes
        try:
            self.target.main.write_at(0, _MARK + bytes.fromhex(self._header.token))
        except BaseException:
            self.close(keep=self._journal_end > 0)
            raise

    def checkpoint(self, chunks: Sequence[Chunk]) -> None:
        """Make the file durable, then note that these chunks are.

        Their writes must have completed. Others may be in flight. Where the journal cannot be
        written there are no more checkpoints.

        Raises:
            StorageError: nothing may be said to be safe after this.
        """
        assert self.resumable, "there is no journal"
        self.target.main.sync()
        try:
            self._write_down(chunks)
        except StorageError as error:
            self.resumable = False
            self.notes.append(f"if the copy is interrupted, less of it can be kept: {error}")

    def _write_down(self, chunks: Sequence[Chunk]) -> None:
        """Add chunks to the journal, durably.

        Raises:
            StorageError: what it says of earlier ones still holds.
        """
        assert self._journal_path is not None
        if self._journal is None:
            self._journal = _open_journal(self._journal_path)
            self._journal.set_size(self._journal_end)
        records = copyjournal.encode_chunks(chunks)
        if not self._journal_end:
            records = copyjournal.encode_start(self._header) + records
        self._journal.write_at(self._journal_end, records)
        self._journal_end += len(records)
        self._journal.sync()

    def publish(self, sidecar: bytes | None) -> str | None:
        """Give the durable file its name and remove the journal; returns the manifest's path.

        Raises:
            StorageError: the name does not exist, or still holds its former content.
        """
        return self.target.publish(sidecar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; see the module for what stays."""
        # Wrong contents, or a caller's mistake, are the same the next time.
        hopeless = kind is None or issubclass(kind, (BytesError, StateError))
        self.close(keep=not hopeless and self._journal_end > 0)

    def close(self, *, keep: bool = False) -> None:
        """Remove the journal, and the partial file unless it was published.

        Args:
            keep: leave both for a later copy.
        """
        if self._journal is not None:
            self._journal.close()
        if self._journal_path is not None and not keep:
            with contextlib.suppress(OSError):
                self._journal_path.unlink()
        self.target.close(keep=keep)


def _mark(journal: Journal) -> bytes:
    """What a journal's partial file begins with."""
    return _MARK + bytes.fromhex(journal.header.token)


def _load(path: Path, wanted: JournalHeader) -> Journal | None:
    """Read a journal, if there is one of the same copy.

    Raises:
        FormatError: it is damaged, or no journal.
        StorageError: it cannot be read.
    """
    if not os.path.lexists(path):
        return None
    with closing(open_for_reading(str(path))) as file:
        if file.size > copyjournal.BYTES_MAX:
            raise FormatError(f"a journal of {file.size} bytes")
        journal = copyjournal.decode(file.read_at(0, file.size))
    found = journal.header
    same = (found.tier, found.source, found.shape) == (wanted.tier, wanted.source, wanted.shape)
    return journal if same else None


def _open_journal(path: Path) -> MainFile:
    """Open or create the journal."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return MainFile(os.open(path, flags, _MODE), str(path))
    except OSError as error:
        raise StorageError("cannot create", errno=error.errno, path=path) from None
