"""Route B: save a VM whose RAM is shared files. Device state by socket, RAM from our own mapping.

The guest is never lost: QEMU migrates to a socket of ours with the return path on and so keeps the
guest until we send SHUT. It stops the guest itself, at the end of its stream; should we fail, or be
killed, the socket closes and QEMU lets the guest run on. SHUT(0) is sent only when the image has
its name and is durable.  QEMU: migration/migration.c, source_return_path_thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from uringmig import signals
from uringmig.contents.devicestream import DeviceStream
from uringmig.errors import BusyError, PeerError
from uringmig.format.constants import CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM
from uringmig.format.devicesections import is_asleep
from uringmig.memory.mapping import FileMemory
from uringmig.memory.source import MemorySource
from uringmig.options import WriteOptions
from uringmig.progress import ProgressCallback
from uringmig.qemu.backing import open_backing
from uringmig.qemu.guestfacts import describe_guest
from uringmig.qemu.monitor import Monitor, growing_pauses
from uringmig.qemu.qmp import CommandError
from uringmig.qemu.receiving import receive
from uringmig.qemu.vmsave import DONE_BUT, Then, VmSave, state_to_save
from uringmig.result import SaveResult
from uringmig.writer import MappedRamWriter, RamBlock

#: Capabilities that would change the stream or who may stop the guest; unknown ones are left out.
_SWITCHED_OFF: Final = (
    CAPABILITY_MAPPED_RAM, "multifd", "postcopy-ram", "postcopy-preempt", "x-colo", "xbzrle",
    "dirty-bitmaps", "background-snapshot", "switchover-ack", "pause-before-switchover", "compress",
    "block", "zero-copy-send", "release-ram",
)  # fmt: skip
_DESCRIPTOR_NAME: Final = "uringmig"
#: QEMU: enum mig_rp_message_type, MIG_RP_MSG_SHUT; be16 type, be16 length, be32 value.
_SHUT: Final = struct.Struct(">HHI")
_MIG_RP_MSG_SHUT: Final = 1
#: QEMU acts on SHUT at once; block devices may take long to become active again.
_ENDING_SECONDS: Final = 60.0


def save_shared(
    monitor: Monitor,
    out: str | os.PathLike[str],
    *,
    options: WriteOptions = WriteOptions(),  # noqa: B008 - frozen
    then: Then | None = None,
    progress: ProgressCallback | None = None,
) -> VmSave:
    """Save a running or stopped VM with shared RAM to one mapped-ram image.

    Args:
        monitor: of the VM.
        out: the image's final name.
        options: how to write.
        then: let the guest ``cont``, ``quit`` QEMU, or ``leave`` it stopped (state postmigrate, or
            paused if it sleeps: from postmigrate QEMU cannot go back to sleep, and dies of trying);
            None: QEMU takes the guest back as it was, running if it ran. Then, and with ``cont``,
            it shows its migration as failed, "Sibling indicated error 1", which is how it is told
            to.
        progress: called with a `Snapshot` about ten times a second.

    Raises:
        PeerError: the VM's RAM is not shared, it has a device that cannot be copied, or QEMU
            failed; the guest is as it was.
        FormatError: QEMU's stream breaks a rule; the guest is as it was.
        StorageError: the image cannot be written; the guest is as it was.
        HostError: io_uring is required and cannot be had.
    """
    before, healed = state_to_save(monitor)
    image: SaveResult | None = None
    stream: DeviceStream | None = None
    notes: list[str] = []
    unproved: list[str] = []
    let_go_at = time.monotonic()
    handed_over = False
    try:
        with (
            mapped_memories(monitor, unproved) as memories,
            monitor.saved_settings(),
            migrating(monitor) as connection,
        ):
            image, stream = _save(monitor, connection, out, memories, options, progress, unproved)
            image = replace(image, notes=(*image.notes, *unproved))
            asleep = is_asleep(stream.full)
            keep = then is None or then == "cont" or (then == "leave" and asleep)
            notes += let_go(monitor, connection, keep=keep)
            let_go_at = time.monotonic()
            handed_over = not notes
    except PeerError as error:
        if image is None or stream is None:
            raise
        notes.append(f"{DONE_BUT} {error}")
    notes += _go_on(monitor, then, handed_over=handed_over)
    stopped = 0.0
    if before == "running" and stream.stopped_at is not None:
        stopped = let_go_at - stream.stopped_at
    return VmSave(
        image=image,
        how="migrate",
        blocks_mapped=tuple(memories),
        blocks_copied=tuple(stream.private),
        stopped_seconds=stopped,
        state_before=before,
        state_after=None if then == "quit" and handed_over else _state_after(monitor),
        notes=(*image.notes, *healed, *notes),
    )


@contextlib.contextmanager
def mapped_memories(
    monitor: Monitor, notes: list[str] | None = None
) -> Iterator[dict[str, MemorySource]]:
    """Map every memory backend in use, by idstr.

    Args:
        monitor: of the VM.
        notes: what the operator should know of them is added here.

    Raises:
        PeerError: the VM has a backend that is not a shared file.
    """
    with ExitStack() as stack:
        memories: dict[str, MemorySource] = {}
        for backend in monitor.ram_backends():
            if backend.idstr is None:
                continue
            try:
                backing = open_backing(monitor, backend)
            except PeerError as error:
                raise PeerError(
                    f"{error}; a VM is saved with memory-backend-file,share=on as its RAM"
                ) from None
            stack.callback(os.close, backing.fd)
            if notes is not None and backing.note is not None:
                notes.append(backing.note)
            memory = FileMemory(backing.fd, offset=backend.offset, length=backend.size)
            stack.callback(memory.close)
            memories[backend.idstr] = memory
        yield memories


@contextlib.contextmanager
def migrating(monitor: Monitor) -> Iterator[socket.socket]:
    """Have QEMU migrate to a socket of ours; if the block fails, QEMU takes the guest back."""
    ours, theirs = socket.socketpair()
    with ours:
        # A descriptor passed over QMP needs no path that QEMU's user could reach.
        with theirs:
            monitor.pass_descriptor(_DESCRIPTOR_NAME, theirs.fileno())
        try:
            _configure(monitor)
            monitor.execute("migrate", uri=f"fd:{_DESCRIPTOR_NAME}")
        except BaseException as error:
            with signals.deferred(), contextlib.suppress(PeerError):
                monitor.execute("closefd", fdname=_DESCRIPTOR_NAME)
            # An interrupt may come when QEMU has already begun; settings need it to have ended.
            # Where QEMU refused, what goes on there, if anything, is another client's.
            if not isinstance(error, CommandError):
                _take_back(monitor, ours)
            raise
        try:
            yield ours
        except BaseException as error:
            reason = _take_back(monitor, ours)
            if isinstance(error, PeerError) and reason is not None:
                raise _failure(monitor, f"{error}; QEMU says: {reason}") from None
            raise


def _failure(monitor: Monitor, text: str) -> PeerError:
    """The error of a migration that QEMU gave up.

    Mostly it could not give its disks away; what uses them explains that, and may pass.
    """
    users: list[str] = []
    with contextlib.suppress(PeerError):
        jobs = monitor.execute("query-block-jobs")
        users += [f"a {job['type']} job ({job['device']})" for job in jobs]
        exports = monitor.execute("query-block-exports")
        users += [f"a {export['type']} export ({export['id']})" for export in exports]
    if not users:
        return PeerError(text)
    return BusyError(f"QEMU's disks are in use by {', '.join(users)}: {text}")


def _configure(monitor: Monitor) -> None:
    """Set capabilities and parameters for a plain stream without the shared blocks."""
    known = monitor.capabilities()
    states = {name: False for name in _SWITCHED_OFF if known.get(name)}
    monitor.set_capabilities(**states, **{CAPABILITY_IGNORE_SHARED: True, "return-path": True})
    # The limit is for networks; this stream goes to the next process. TLS would only garble it.
    monitor.set_parameters(**{"max-bandwidth": 0, "tls-creds": ""})
    if monitor.parameters().get("mode", "normal") != "normal":
        monitor.set_parameters(mode="normal")


def _take_back(monitor: Monitor, connection: socket.socket) -> str | None:
    """Make QEMU end its migration and take the guest back; say why it failed by itself, if so."""
    reason = None
    with signals.deferred():
        with contextlib.suppress(PeerError):
            reason = monitor.migration().error
        with contextlib.suppress(OSError):
            connection.sendall(_SHUT.pack(_MIG_RP_MSG_SHUT, 4, 1))
        connection.close()
        try:
            monitor.wait_for_migration(timeout_s=_ENDING_SECONDS)
        except PeerError:
            with contextlib.suppress(PeerError):
                monitor.execute("migrate_cancel")
    return reason


def _save(
    monitor: Monitor,
    connection: socket.socket,
    out: str | os.PathLike[str],
    memories: dict[str, MemorySource],
    options: WriteOptions,
    progress: ProgressCallback | None,
    notes: list[str],
) -> tuple[SaveResult, DeviceStream]:
    """Receive the device state, then write memory and all into one image; notes are added to."""
    started = time.monotonic()
    with ExitStack() as stack:
        writers: list[MappedRamWriter] = []

        def on_setup(stream: DeviceStream) -> None:
            # The guest still runs: what cannot be written at all shows before it is stopped.
            writers.append(
                stack.enter_context(
                    MappedRamWriter(
                        out,
                        _blocks(stream, memories),
                        options=options,
                        configuration=replace(
                            stream.configuration, capabilities=(CAPABILITY_MAPPED_RAM,)
                        ),
                        section_id=stream.section_id,
                        progress=progress,
                    )
                )
            )

        sizes = {idstr: memory.length_bytes for idstr, memory in memories.items()}
        stream = receive(connection, sizes, on_setup=on_setup)
        received = time.monotonic() - started
        writer = writers[0]
        writer.write_all()
        guest = None
        if options.manifest:
            guest, unknown = describe_guest(monitor)
            notes += unknown
        check_still_ours(monitor)
        image = writer.finish(stream.device_state(), guest=guest)
    return replace(image, time=replace(image.time, receive=received)), stream


def check_still_ours(monitor: Monitor) -> None:
    """Refuse memory that was read while the guest may have run: another client cancelled."""
    migration = monitor.migration()
    if migration.ended:
        raise PeerError(f"QEMU ended its migration ({migration.status}) before the memory was read")


def _blocks(stream: DeviceStream, memories: dict[str, MemorySource]) -> list[RamBlock]:
    """The image's blocks, in the order of the stream."""
    check_listed(stream, memories)
    return [
        RamBlock(idstr, memories.get(idstr) or stream.private[idstr].memory)
        for idstr, _ in stream.blocks
    ]


def check_listed(stream: DeviceStream, memories: dict[str, MemorySource]) -> None:
    """Refuse a stream that lacks a block which is mapped."""
    names = {idstr for idstr, _ in stream.blocks}
    for idstr in memories:
        if idstr not in names:
            raise PeerError(f"QEMU's stream does not list ramblock {idstr!r}")


def let_go(monitor: Monitor, connection: socket.socket, *, keep: bool) -> list[str]:
    """Tell QEMU how its migration ended, now that the image is durable.

    With ``keep`` QEMU is told that the other side does not take the guest: it puts the guest back
    into the very state it had, running or paused, and its migration counts as failed. Otherwise
    the migration completes and the guest stands still in state postmigrate.
    """
    try:
        connection.sendall(_SHUT.pack(_MIG_RP_MSG_SHUT, 4, int(keep)))
    except OSError as error:
        raise PeerError(f"QEMU closed its stream: {error.strerror}") from None
    ended = monitor.wait_for_migration(timeout_s=_ENDING_SECONDS)
    expected = "failed" if keep else "completed"
    if ended.status == expected:
        return []
    return [f"QEMU ended its migration as {ended.status!r}: {ended.error or 'no reason given'}"]


def _go_on(monitor: Monitor, then: Then | None, *, handed_over: bool) -> list[str]:
    """Do what was asked for, after the settings have been put back, even if that failed.

    A guest whose migration did not complete may run on, and have done more than the image knows:
    it is not quit.
    """
    try:
        # Until it has settled QEMU refuses: "Migration is not finalized yet".
        if then == "cont":
            _settled(monitor)
            monitor.execute("cont")
        elif then == "leave" and _settled(monitor) != "postmigrate":
            monitor.execute("stop")  # a guest that sleeps: it was taken back, and does nothing
        elif then == "quit" and handed_over:
            monitor.execute("quit")
        elif then == "quit":
            return ["QEMU was not quit: its guest may have gone on since the image was made"]
    except PeerError as error:
        return [f"{DONE_BUT} {error}"]
    return []


def _state_after(monitor: Monitor) -> str | None:
    """QEMU's run state, or None if there is no QEMU any more."""
    try:
        return _settled(monitor)
    except PeerError:
        return None


def _settled(monitor: Monitor) -> str:
    """The run state once QEMU has left finish-migrate, which it does after it says "ended"."""
    deadline = time.monotonic() + _ENDING_SECONDS
    pauses = growing_pauses()
    while (state := monitor.run_state()) == "finish-migrate" and time.monotonic() < deadline:
        time.sleep(next(pauses))
    return state
