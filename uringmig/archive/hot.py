"""The hot tier: contents become a plain mapped-ram image, which stock QEMU loads as it lies.

Read ahead by the contents' channels, written by ours: both ends of the copy are busy at the same
time, both by O_DIRECT. The order is the writer's: pages, drain, bitmaps, stream, sync, publish. Of
a guest that runs, pages that changed while they were copied are written once more, in place, while
it stands still (`livecopy`); it goes on before bitmaps are written and anything is synced.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from uringmig.archive.copied import CopiedGuest, EntryLabel, TierResult, describe_entry
from uringmig.archive.copyjournal import BITS_BYTES, Chunk
from uringmig.archive.copyrun import CopyRun
from uringmig.archive.dedup import Earlier, SlotReader
from uringmig.archive.intake import NOTHING, Intake, TakenWindow, WindowIntake
from uringmig.archive.livecopy import copy_live
from uringmig.archive.liveintake import LiveIntake
from uringmig.archive.partialcopy import PartialCopy
from uringmig.contents.live import LiveContents
from uringmig.contents.source import Contents, Row
from uringmig.format.layout import ImageLayout, plan_layout
from uringmig.image import digest
from uringmig.image.changed import look_again
from uringmig.image.draft import ImageDraft
from uringmig.image.window import Rewritten, WindowPages, settle_window
from uringmig.options import PAGE_SIZE, WINDOW_BYTES, WriteOptions
from uringmig.pages import bitmap
from uringmig.pages.runs import runs_from_bits
from uringmig.progress import ChannelCounters, ProgressCallback
from uringmig.storage.buffers import aligned_buffer
from uringmig.storage.enginechoice import EngineChoice, choose_engine
from uringmig.storage.requests import IoPlan
from uringmig.transfer.plan import Window, plan_runs


def write_hot(
    contents: Contents,
    out: Path,
    *,
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    label: EntryLabel | None = None,
    resume: Path | None = None,
    previous: Path | None = None,
    progress: ProgressCallback | None = None,
    engine: EngineChoice | None = None,
) -> TierResult:
    """Write contents as a mapped-ram image, published with its manifest.

    Args:
        contents: opened by the caller, and stays the caller's.
        out: the image's final name.
        options: how to write; the manifest is always written.
        label: what the entry is called; None: after the file, made here.
        resume: a journal. If a killed copy of the same contents left it, with its partial file,
            the copy goes on from there; else it starts anew. Gone when this returns or raises.
        previous: an earlier image, usually of the same VM: pages that lie there unchanged become
            blocks shared with it (reflink). Where that cannot be the result has a warning.
        progress: called with a `Snapshot` about ten times a second and at every phase.
        engine: an engine of the caller's instead of ``options.engine``; for tests and benches.

    Raises:
        FormatError: the contents break a rule of their format.
        MismatchError: the source changed while it was read.
        StorageError: nothing is published.
        HostError: io_uring is required and cannot be had.
    """
    with ExitStack() as stack:
        copy = HotCopy(contents, out, options, resume, previous, progress, engine, stack)
        return copy.run(label)


class HotCopy:
    """The story of one copy; its partial file and buffers end with ``stack``."""

    def __init__(
        self,
        contents: Contents,
        out: Path,
        options: WriteOptions,
        resume: Path | None,
        previous: Path | None,
        progress: ProgressCallback | None,
        engine: EngineChoice | None,
        stack: ExitStack,
    ) -> None:
        started = time.monotonic()
        engine = engine or choose_engine(options.engine)  # before anything is made
        self._contents = contents
        self._out = out
        self._options = options
        self._guest = CopiedGuest(contents)
        sizes = [(block.idstr, block.used_length) for block in contents.blocks]
        self._layout = plan_layout(contents.configuration, sizes, section_id=contents.section_id)
        self._dense = frozenset(
            number
            for number, block in enumerate(contents.blocks)
            if block.used_length <= options.dense_up_to
        )
        self._earlier = Earlier(previous)
        self._partial = PartialCopy(
            out,
            tier="hot",
            source=None if isinstance(contents, LiveContents) else contents.fingerprint(),
            shape=_shape(contents, self._layout, self._dense, self._earlier.identity),
            direct=options.direct,
            journal=resume,
        )
        stack.enter_context(self._partial)
        self._target = self._partial.target
        self._rows = self._guest.take_over(self._partial.taken_over)
        self._draft = ImageDraft(
            self._target.main,
            contents.configuration,
            self._layout,
            section_id=contents.section_id,
        )
        self._draft.begin(keep=True)  # the partial file's mark, and what was taken over
        self._slots = self._earlier.share(
            self._target, self._layout, options.direct, anew=not self._partial.taken_over
        )
        if self._slots is not None:
            stack.callback(self._slots.close)
        self._copy = CopyRun(
            self._guest,
            self._partial,
            options=options,
            engine=engine,
            progress=progress,
            started=started,
        )

    def run(self, label: EntryLabel | None) -> TierResult:
        """Copy, finish, publish."""
        if isinstance(contents := self._contents, LiveContents):
            copy_live(contents, self._guest, self._dense, self._go_over)
        else:
            intake = Intake(
                contents, self._rows, filled=self._dense, gap_bytes=self._options.bridge
            )
            self._take_all(intake, self._rows)
        return self._finish(label)

    def _go_over(self, rows: Sequence[Row], *, again: bool, running: bool) -> None:
        """See `LivePass`."""
        contents = self._contents
        assert isinstance(contents, LiveContents), "there is one pass over a file"
        copies = running or self._slots is not None
        intake = LiveIntake(contents, rows, filled=self._dense, copies=copies)
        self._take_all(intake, rows, again=again, paced=running or not again)

    def _take_all(
        self,
        intake: WindowIntake,
        rows: Sequence[Row],
        *,
        again: bool = False,
        paced: bool = True,
    ) -> None:
        """Copy rows and drain; see `CopyRun.copy`."""
        self._copy.copy(
            intake,
            rows,
            lambda counters: _HotWork(
                intake,
                self._guest,
                self._layout,
                self._dense,
                self._slots,
                self._options,
                self._copy,
                counters,
                again=again,
            ),
            self._chunk,
            again=again,
            paced=paced,
        )

    def _chunk(self, row: Row) -> Chunk:
        """What the journal keeps of a row."""
        packed = bitmap.pack(self._guest.bits(row)).tobytes()
        return Chunk(*row, packed.ljust(BITS_BYTES, b"\0"), self._guest.digest(row))

    def _finish(self, label: EntryLabel | None) -> TierResult:
        """Write all that is not pages, make it durable, give it its name."""
        blocks = self._guest.blocks
        self._earlier.free_unset(
            self._target.main,
            self._layout,
            [block.bitmap for block in blocks],
            lambda: self._copy.tell("write"),
        )
        tail = self._contents.device_state().tail
        guest = self._contents.guest()
        finished = self._draft.finish(
            [block.bitmap for block in blocks],
            tail,
            tell=self._copy.tell,
            publish=self._partial.publish,
        )
        fields = describe_entry(
            self._guest, self._out, "hot", label, self._guest.content_digest(tail)
        )
        described = self._draft.describe(
            finished,
            [block.digests for block in blocks],
            settings=self._copy.settings,
            seconds=self._copy.seconds(finished.durable),
            notes=self._copy.notes,
            pieces=self._guest.piece_tables(),
            archive=fields,
            guest=guest,
        )
        main = self._target.main
        shared = self._earlier.shared_bytes(main) if self._slots is not None else 0
        result = self._copy.publish(
            finished.durable, described, fields, shared_bytes=shared, ratio=1.0
        )
        return msgspec.structs.replace(result, warnings=tuple(self._earlier.warnings))


class _HotWork:
    """One channel's side: takes a window in, finds its pages, writes them to their slots.

    ``again``: the windows have been written before, and only what differs is written.
    """

    def __init__(
        self,
        intake: WindowIntake,
        guest: CopiedGuest,
        layout: ImageLayout,
        dense: frozenset[int],
        slots: SlotReader | None,
        options: WriteOptions,
        copy: CopyRun,
        counters: ChannelCounters,
        *,
        again: bool,
    ) -> None:
        self._again = again
        # As many windows as requests in flight can fill, and one that is being looked at.
        self.windows_max = options.windows_held
        self._intake = intake
        self._guest = guest
        self._layout = layout
        self._dense = dense
        self._slots = slots
        self._slot_buffer = aligned_buffer(WINDOW_BYTES if slots is not None else PAGE_SIZE)
        self._options = options
        self._done = copy.done
        self._counters = counters
        # One more, for a window with nothing to write whose digest is still to be made.
        self._free = [aligned_buffer(WINDOW_BYTES) for _ in range(self.windows_max + 1)]
        self._open: dict[Window, TakenWindow] = {}
        self._half: set[Window] = set()

    def plan(self, window: Window) -> IoPlan:
        """Take in whichever window comes next, and plan the writes of its pages."""
        held = self._open[window] = self._intake.take(self._free.pop())
        if self._again:
            pages = self._changed(held)
        elif held.start:
            pages = self._settled(held)
        else:  # its bits are clear from the start
            pages = None
        if pages is None:
            self._counters.zero_bytes += 0 if self._again else len(held.memory)
            return NOTHING
        block_index, row = held.row
        if self._slots is not None:
            # Not bridged: to write a gap would end the sharing of its pages.
            runs = runs_from_bits(self._slots.differing(held, pages.stored, self._slot_buffer))
        else:
            runs = pages.runs(self._options.bridge)
        return plan_runs(
            runs,
            address=held.memory.ctypes.data,
            file_offset=self._layout.blocks[block_index].pages_offset + row * WINDOW_BYTES,
            block_size=self._options.block_size,
        )

    def _settled(self, held: TakenWindow, later: Rewritten | None = None) -> WindowPages:
        """Decide what becomes of a window's pages, and keep their bits.

        Slots may hold an interrupted copy's bytes or an earlier image's: a dense block's memory is
        all there, zeros too (`Intake`), and all of it is written.
        """
        dense = held.row[0] in self._dense
        pages = settle_window(
            held.nonzero(), held.readable(), dense=dense, fresh=False, later=later
        )
        self._guest.note(held.row, pages.bits)
        if later is None:
            self._counters.zero_bytes += PAGE_SIZE * int(np.count_nonzero(~pages.bits))
        return pages

    def _changed(self, held: TakenWindow) -> WindowPages | None:
        """What of a window is to be written once more; None: it is as it was written."""
        look = look_again(self._guest.pieces(held.row), held.memory, held.start, held.length)
        if not len(look.changed):
            return None
        bits = self._guest.bits(held.row)
        self._guest.note_digest(held.row, held.digest())
        self._guest.note_pieces(held.row, look.pieces)
        return self._settled(held, Rewritten(selected=look.pages(len(bits)), bits=bits))

    def submitted(self, window: Window) -> None:
        """Digest the window while it is still in the cache and the device has work."""
        held = self._open[window]
        if not self._again:
            whole, pieces = held.digests()
            self._guest.note_digest(held.row, whole)
            self._guest.note_pieces(held.row, pieces)
        self._settle(window)

    def finished(self, window: Window) -> None:
        """Note that the pages are where they belong."""
        self._settle(window)

    def _settle(self, window: Window) -> None:
        """Let go of a window that is both written and digested, whichever came first."""
        if window not in self._half:
            self._half.add(window)
            return
        self._half.remove(window)
        held = self._open.pop(window)
        self._done.append(held.row)
        self._free.append(held.buffer)


def _shape(
    contents: Contents, layout: ImageLayout, dense: frozenset[int], earlier: str | None
) -> str:
    """Digest of all that decides where bytes go and how they look."""
    text = msgspec.json.encode(
        [
            contents.configuration.pack().hex(),
            contents.section_id,
            [[place.idstr, place.used_length, place.pages_offset] for place in layout.blocks],
            sorted(dense),
            earlier,
        ]
    )
    return digest.bytes_digest(text).hex()
