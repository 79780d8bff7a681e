"""A running QEMU seen through its QMP socket: run state, migration, settings.

Synchronous, one thread at a time. Every failure of the peer is a `PeerError` of one line. What was
changed through `saved_settings` is put back.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from uringmig import signals
from uringmig.errors import PeerError
from uringmig.qemu.address import socket_path
from uringmig.qemu.guardprocess import OURS
from uringmig.qemu.qmp import CommandError, QmpConnection

#: A QEMU greets at once; one that does not within this time is stopped or talks to another client.
GREETING_TIMEOUT_S: Final = 10.0
#: QMP commands used here answer at once unless QEMU's main loop is blocked, as by a slow disk.
COMMAND_TIMEOUT_S: Final = 60.0
#: Between two looks at a migration, in seconds: what QEMU does at once is seen at once; later they
#: are long beside a QMP round trip, and still short beside what goes on for so long.
_PAUSE_FIRST_S: Final = 0.0005
_PAUSE_MOST_S: Final = 0.02

#: Begins the note that QEMU keeps while settings are changed: capabilities and parameters, as JSON.
SETTINGS_NOTE: Final = f"{OURS} migration settings before: "
#: QEMU: MigrationStatus (qapi/migration.json), those that do not change any more.
MIGRATION_ENDED: Final = frozenset({"completed", "failed", "cancelled", "none"})

#: A line of ``info ramblock``: name, page size, offset, used, total, and since 8.0 the address.
_RAMBLOCK_LINE: Final = re.compile(
    r"\s*(?P<idstr>\S.*?)\s+\d+ .?i?B\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)"
    r"\s+0x(?P<total>[0-9a-f]+)(?:\s+0x(?P<address>[0-9a-f]+))?.*"
)


@dataclass(frozen=True, slots=True)
class Migration:
    """What query-migrate says.  QEMU: MigrationInfo.

    Attributes:
        status: QEMU's word: ``none``, ``setup``, ``active``, ``completed``, ``failed``, ...
        error: QEMU's description of a failure, or None.
        info: the whole answer.
    """

    status: str
    error: str | None
    info: Mapping[str, Any]

    @property
    def ended(self) -> bool:
        """Nothing is under way (any more)."""
        return self.status in MIGRATION_ENDED


@dataclass(frozen=True, slots=True)
class HostBlock:
    """One ramblock as QEMU lists it.  QEMU: ram_block_format, HMP ``info ramblock``.

    Attributes:
        idstr: its name in the stream.
        used_length: bytes in use, what a stream calls the length.
        max_length: bytes reserved; more than ``used_length`` for resizable blocks only.
        host_address: where it is mapped in QEMU's process, or None (QEMU before 8.0).
    """

    idstr: str
    used_length: int
    max_length: int
    host_address: int | None


@dataclass(frozen=True, slots=True)
class RamBackend:
    """One memory backend object.  QEMU: Memdev, HostMemoryBackend.

    Attributes:
        id: its object id.
        kind: QOM type: ``memory-backend-file``, ``memory-backend-memfd``, ``memory-backend-ram``.
        size: bytes.
        share: mapped shared.
        path: ``mem-path`` as QEMU was told it; None unless backed by a named file.
        offset: where it begins in that file, in bytes.
        idstr: the ramblock it is, or None while no device uses it.
    """

    id: str
    kind: str
    size: int
    share: bool
    path: str | None
    offset: int
    idstr: str | None


class Monitor:
    """A connection to one QEMU's QMP socket; a context manager that closes it.

    Args:
        path: the QMP unix socket, or QEMU's ``unix:PATH``.
        greeting_timeout_s: how long to wait for the greeting, in seconds.
        command_timeout_s: how long to wait for the answer to one command, in seconds.

    Attributes:
        path: the socket's path.
        peer_pid: process id of QEMU, from the kernel; 0 if it is in a process id namespace that is
            not visible here.
        qemu_version: (major, minor, micro), from the greeting.

    Raises:
        StateError: a socket of a kind that is not supported.
        PeerError: no socket, nobody listens, not QMP, or no greeting in time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        greeting_timeout_s: float = GREETING_TIMEOUT_S,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        self.path = socket_path(os.fspath(path))
        self._command_timeout_s = command_timeout_s
        self._connection = QmpConnection(self.path, timeout_s=greeting_timeout_s)
        self.peer_pid = self._connection.peer_pid
        self.qemu_version = self._version()

    def _version(self) -> tuple[int, int, int]:
        """The version the greeting named."""
        try:
            number: Any = self._connection.greeting["QMP"]["version"]["qemu"]
            return int(number["major"]), int(number["minor"]), int(number["micro"])
        except (KeyError, TypeError, ValueError):
            self.close()
            raise PeerError(f"{self.path}: the QMP greeting names no QEMU version") from None

    def close(self) -> None:
        """Close the connection; does nothing the second time."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Run one QMP command and return what it returns.

        Args:
            command: its QMP name.
            arguments: by their QMP names; ``**{"direct-io": True}`` for those with a hyphen.

        Raises:
            CommandError: QEMU refused.
            PeerError: QEMU did not answer in time, or closed the connection.
        """
        return self._connection.execute(command, arguments, timeout_s=self._command_timeout_s)

    def human(self, command_line: str) -> str:
        """Run one line of the human monitor and return its output."""
        return str(self.execute("human-monitor-command", **{"command-line": command_line}))

    def pass_descriptor(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of ``fd``, to be used as ``fd:NAME``.

        Raises:
            PeerError: QEMU did not take it.
        """
        self._connection.send_descriptor(fd)
        self.execute("getfd", fdname=name)

    def add_descriptor(self, fd: int, opaque: str, *, fdset: int | None = None) -> int:
        """Give QEMU a duplicate of ``fd``, to be opened as ``/dev/fdset/N``; QEMU keeps ``opaque``.

        Args:
            fd: stays the caller's.
            opaque: any text.
            fdset: N of a set that it is to be in, too; None makes a new one. Of a set QEMU takes
                the descriptor whose access mode and O_DIRECT are those that it wants.

        Returns:
            N; the descriptor stays until `remove_descriptors`, also when we are gone.

        Raises:
            PeerError: QEMU did not take it.
        """
        self._connection.send_descriptor(fd)
        where = {} if fdset is None else {"fdset-id": fdset}
        return int(self.execute("add-fd", opaque=opaque, **where)["fdset-id"])

    def descriptors(self) -> list[tuple[int, str, int]]:
        """The sets of descriptors that QEMU was given: N, opaque, and its number in QEMU's process.

        Of a set of several descriptors only the first is told.
        """
        return [
            (int(entry["fdset-id"]), str(entry["fds"][0].get("opaque", "")), entry["fds"][0]["fd"])
            for entry in self.execute("query-fdsets")
            if entry["fds"]
        ]

    def remove_descriptors(self, fdset: int) -> None:
        """Have QEMU close what `add_descriptor` gave it."""
        self.execute("remove-fd", **{"fdset-id": fdset})

    def run_events(self) -> tuple[str, ...]:
        """``STOP``, ``RESUME`` and ``RESET`` as they came so far, whoever made the guest do so."""
        return tuple(self._connection.run_events)

    def machine_type(self) -> str:
        """The machine type as images have it, for example ``pc-q35-10.0``."""
        kind = str(self.execute("qom-get", path="/machine", property="type"))
        return kind.removesuffix("-machine")

    def vcpu_threads(self) -> tuple[int, ...]:
        """The threads of the guest's processors, by their numbers in QEMU's own namespace."""
        return tuple(int(entry["thread-id"]) for entry in self.execute("query-cpus-fast"))

    def run_state(self) -> str:
        """QEMU's word for the guest's state: ``running``, ``paused``, ``inmigrate``, ..."""
        return str(self.execute("query-status")["status"])

    def ram_blocks(self) -> tuple[HostBlock, ...]:
        """Every ramblock of this QEMU, in its own order (by descending ``max_length``).

        Raises:
            PeerError: the answer is not the table that QEMU prints.
        """
        blocks = []
        for line in self.human("info ramblock").splitlines():
            match = _RAMBLOCK_LINE.fullmatch(line)
            if match is None:
                continue
            used, most, address = match["used"], match["total"], match["address"]
            host_address = None if address is None else int(address, 16)
            blocks.append(HostBlock(match["idstr"], int(used, 16), int(most, 16), host_address))
        if not blocks:
            raise PeerError("QEMU lists no RAM blocks (info ramblock)")
        return tuple(blocks)

    def ram_backends(self) -> tuple[RamBackend, ...]:
        """Every memory backend object of this QEMU."""
        idstrs = [block.idstr for block in self.ram_blocks()]
        named = [entry for entry in self.execute("query-memdev") if "id" in entry]
        return tuple(self._ram_backend(entry, idstrs) for entry in named)

    def _ram_backend(self, entry: Mapping[str, Any], idstrs: list[str]) -> RamBackend:
        """One entry of query-memdev and what its object says of its file."""
        id_ = str(entry["id"])
        kind = str(self._property(id_, "type"))
        file_backed = kind == "memory-backend-file"
        # x-use-canonical-path-for-ramblock-id gives the path; a device that brings the memory
        # in (virtio-mem, pc-dimm on a bus) puts its own path before the id.
        candidates = [idstr for idstr in idstrs if idstr in (id_, f"/objects/{id_}")] or [
            idstr for idstr in idstrs if idstr.endswith(f"/{id_}")
        ]
        return RamBackend(
            id=id_,
            kind=kind,
            size=int(entry["size"]),
            # Before 6.1 query-memdev did not say whether a backend is shared.
            share=bool(entry["share"] if "share" in entry else self._property(id_, "share")),
            path=str(self._property(id_, "mem-path")) if file_backed else None,
            offset=int(self._property(id_, "offset", missing=0)) if file_backed else 0,
            idstr=candidates[0] if len(candidates) == 1 else None,
        )

    def _property(self, id_: str, name: str, *, missing: Any = None) -> Any:
        """A property of an object, or ``missing`` where this QEMU has no such property."""
        try:
            return self.execute("qom-get", path=f"/objects/{id_}", property=name)
        except CommandError:
            if missing is None:
                raise
            return missing

    def set_capabilities(self, **states: bool) -> None:
        """Switch migration capabilities, all in one command."""
        wanted = [{"capability": name, "state": state} for name, state in states.items()]
        self.execute("migrate-set-capabilities", capabilities=wanted)

    def set_parameters(self, **values: Any) -> None:
        """Set migration parameters, all in one command."""
        self.execute("migrate-set-parameters", **values)

    def capabilities(self) -> dict[str, bool]:
        """The migration capabilities this QEMU knows, and whether each is on."""
        answer = self.execute("query-migrate-capabilities")
        return {str(entry["capability"]): bool(entry["state"]) for entry in answer}

    def parameters(self) -> dict[str, Any]:
        """The migration parameters this QEMU knows, and their values."""
        return dict(self.execute("query-migrate-parameters"))

    @contextmanager
    def saved_settings(self) -> Iterator[None]:
        """Put migration capabilities and parameters back on leaving, however the block ends.

        Only what differs is set. If the block failed and putting back fails too, the block's
        error is raised, with a note.

        Raises:
            PeerError: QEMU refused to take a setting back.
        """
        capabilities, parameters = self.capabilities(), self.parameters()
        note = self._note_settings(capabilities, parameters)
        try:
            yield
        except BaseException as error:
            try:
                self._put_back(capabilities, parameters)
                self._forget(note)
            except PeerError as second:
                error.add_note(f"migration settings were not put back: {second}")
            raise
        self._put_back(capabilities, parameters)
        self._forget(note)

    def put_back_noted(self, note: str) -> bool:
        """Set migration capabilities and parameters as a note of `saved_settings` says.

        Returns:
            Whether any of them was another.

        Raises:
            PeerError: QEMU refused.
        """
        try:
            noted = json.loads(note.removeprefix(SETTINGS_NOTE))
            capabilities, parameters = dict(noted["capabilities"]), dict(noted["parameters"])
        except (ValueError, TypeError, KeyError):
            return False  # another version's
        before = self.capabilities(), self.parameters()
        self._put_back(capabilities, parameters)
        return before != (self.capabilities(), self.parameters())

    def _note_settings(self, capabilities: dict[str, bool], parameters: dict[str, Any]) -> int:
        """Have QEMU keep the present settings, should we be killed before they are put back."""
        noted = {"capabilities": capabilities, "parameters": parameters}
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with signals.deferred():
                return self.add_descriptor(fd, SETTINGS_NOTE + json.dumps(noted))
        finally:
            os.close(fd)

    def _forget(self, note: int) -> None:
        """Take the note back; another save may have done so, once no migration was under way."""
        with signals.deferred(), suppress(CommandError):
            self.remove_descriptors(note)

    def _put_back(self, capabilities: dict[str, bool], parameters: dict[str, Any]) -> None:
        """Set what differs from what was saved; all of it, though a signal asks to stop."""
        with signals.deferred():
            now = self.capabilities()
            changed = {name: on for name, on in capabilities.items() if now.get(name) != on}
            # Parameters first: some are refused unless the capability they belong to is on.
            values = self.parameters()
            differing = {
                name: value for name, value in parameters.items() if values.get(name) != value
            }
            if differing:
                self.set_parameters(**differing)
            if changed:
                self.set_capabilities(**changed)

    def migration(self) -> Migration:
        """How the present or last migration, of either direction, stands."""
        return self._migration(timeout_s=self._command_timeout_s)

    def _migration(self, *, timeout_s: float) -> Migration:
        info = self._connection.execute("query-migrate", {}, timeout_s=timeout_s)
        error = info.get("error-desc")
        return Migration(
            status=str(info.get("status", "none")),
            error=None if error is None else str(error),
            info=info,
        )

    def wait_for_migration(self, *, timeout_s: float) -> Migration:
        """Wait until nothing is under way and return the outcome, which may be a failure.

        QEMU's main loop does not answer while it loads RAM from a file, so one answer may take
        as long as the load; ``timeout_s`` bounds the whole wait.

        Raises:
            PeerError: QEMU went away, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        pauses = growing_pauses()
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise PeerError(f"the migration did not end within {timeout_s:g} s")
            migration = self._migration(timeout_s=left_s)
            if migration.ended:
                return migration
            time.sleep(next(pauses))


def growing_pauses() -> Iterator[float]:
    """How long to sleep between looks at something that ends soon; seconds, without end."""
    pause = _PAUSE_FIRST_S
    while True:
        yield pause
        pause = min(2 * pause, _PAUSE_MOST_S)
