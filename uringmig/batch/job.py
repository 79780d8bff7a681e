"""A job file: what is to be archived, from where, and how.  Pure: text in, `JobFile` out.

TOML with a table ``[defaults]``, tables ``[devices."PATH"]`` and an array of tables ``[[jobs]]``.
Every refusal is one line with the file, the field's place and what was expected there. Relative
paths are relative to the job file, so that it means the same from a terminal and from a timer.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any, Final, Literal, get_args

import msgspec

from uringmig.errors import StateError
from uringmig.options import COLD_LEVEL, COLD_LEVEL_MAX, DirectMode, EngineName, WriteOptions
from uringmig.qemu.address import socket_path
from uringmig.units import MiB, parse_duration, parse_size

Tier = Literal["hot", "cold"]

#: A job file is written by people; far more than any fleet has, and parsed in well under a second.
BYTES_MAX: Final = 16 * MiB
JOBS_MAX: Final = 10_000
RETRIES_MAX: Final = 100
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+:-]{0,127}")
#: What makes an entry's name another one in every run.
TIME_FIELD: Final = "{time}"
_FIELD: Final = re.compile(r"\{([^{}]*)\}|[{}]")
#: A path, but not one that only a shell would understand (~, $HOME), nor with a NUL, which ends it.
_PATH: Final = re.compile(r"(?!~|\$[A-Za-z_{(])[^\0]+")
_PLACE: Final = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*?)(?: in `[^`]*`)?`)?")
_DEFAULT_OPTIONS: Final = WriteOptions()
NO_DISKS: Final = "none"
#: Settings that a profile may replace where a job file does not give them.
_TUNABLE: Final = ("channels", "depth", "block_size", "engine", "direct")


class MemoryFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ramblock's shared memory file; bytes. ``length`` None is the rest of the file."""

    path: str
    offset: int = 0
    length: int | None = None


class QmpSource(msgspec.Struct, frozen=True, tag="qmp"):
    """A running QEMU whose RAM is shared files, by its QMP socket."""

    qmp: str


class ImageSource(msgspec.Struct, frozen=True, tag="image"):
    """An image file (mapped-ram, plain stream, libvirt) that begins at ``offset``."""

    image: str
    offset: int = 0


class MemoryFilesSource(msgspec.Struct, frozen=True, tag="memory"):
    """Memory files by idstr, and the device state saved without them."""

    memory: dict[str, MemoryFile]
    device_state: str


Source = QmpSource | ImageSource | MemoryFilesSource


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job, complete: every default applied, every path absolute.

    Attributes:
        name: tells the job from the others of its file.
        vm: the VM's name in the archive.
        host: where it must run, with a scheduler; None: anywhere.
        archive: the archive's directory.
        entry: template of the entry's name: ``{name}``, ``{host}``, ``{time}``.
        level: of zstd, for tier ``cold``.
        dedup: share pages with the VM's previous image, for tier ``hot``.
        retries: how often what can pass is tried again.
        timeout_s: a try that takes longer is given up; 0 is no limit.
        rate: bytes per second; 0 is no limit.
        verify: read the new entry back from the disk and compare.
        disks: how those of a running VM are kept, as `save` is told it.
        given: which of the settings from ``channels`` on the job file gives; the others are
            defaults, which a profile of the archive's place may replace.
    """

    name: str
    vm: str
    host: str | None
    source: Source
    archive: str
    entry: str
    tier: Tier
    level: int
    dedup: bool
    retries: int
    timeout_s: float
    rate: int
    verify: bool
    disks: str = NO_DISKS
    channels: int
    depth: int
    block_size: int
    engine: EngineName
    direct: DirectMode
    bridge: int = _DEFAULT_OPTIONS.bridge
    given: tuple[str, ...] = ()

    def options(self, *, rate: int) -> WriteOptions:
        """How its image is written, at a rate the device allows (0 is no limit)."""
        return WriteOptions(
            channels=self.channels,
            depth=self.depth,
            block_size=self.block_size,
            engine=self.engine,
            direct=self.direct,
            bridge=self.bridge,
            rate=min(filter(None, (self.rate, rate)), default=0),
        )


class DeviceLimit(msgspec.Struct, frozen=True, kw_only=True):
    """What jobs may ask of one disk, named by its node or by a path on it.

    Attributes:
        depth: requests in flight, over all jobs; None: as measured.
        rate: bytes per second over all jobs; 0 is no limit.
    """

    path: str
    depth: int | None
    rate: int


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """A checked job file."""

    path: str
    jobs: tuple[Job, ...]
    devices: tuple[DeviceLimit, ...]


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``[defaults]`` and a job share; None is "not given"."""

    archive: str | None = None
    host: str | None = None
    entry: str | None = None
    tier: str | None = None
    level: int | None = None
    dedup: bool | None = None
    retries: int | None = None
    timeout: str | None = None
    rate: str | int | None = None
    verify: bool | None = None
    disks: str | dict[str, str] | None = None
    channels: int | None = None
    depth: int | None = None
    block_size: str | int | None = None
    engine: str | None = None
    direct: str | None = None


class _SourceTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``source`` as it is written: the keys say which kind it is."""

    qmp: str | None = None
    image: str | None = None
    offset: str | int | None = None
    memory: dict[str, str | MemoryFile] | None = None
    device_state: str | None = None


class _JobTable(_Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[jobs]]`` as it is written."""

    name: str
    vm: str | None = None
    source: _SourceTable


class _DeviceTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[devices."PATH"]`` as it is written."""

    depth: int | None = None
    rate: str | int | None = None


class _FileTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file as it is written."""

    jobs: list[_JobTable]
    defaults: _Settings = _Settings()
    devices: dict[str, _DeviceTable] = {}


def parse_jobs(text: str, *, path: str) -> JobFile:
    """Read and check a job file.

    Args:
        text: its content.
        path: its absolute path, for messages and as the base of relative paths.

    Raises:
        StateError: file, place of the field, what is expected and what is there.
    """
    if len(text) > BYTES_MAX:
        raise StateError(f"{path}: more than {BYTES_MAX} characters, which no job file has")
    try:
        table = msgspec.toml.decode(text, type=_FileTable)
    except (msgspec.DecodeError, RecursionError) as error:
        raise StateError(_place_first(path, str(error))) from None
    parser = _Parser(path, table.defaults)
    if not 1 <= len(table.jobs) <= JOBS_MAX:
        raise parser.refusal("jobs", f"expected 1 to {JOBS_MAX} of them", len(table.jobs))
    jobs = tuple(parser.job(job, f"jobs[{index}]") for index, job in enumerate(table.jobs))
    seen: dict[str, int] = {}
    for index, job in enumerate(jobs):
        if job.name in seen:
            raise parser.refusal(f"jobs[{index}].name", f"also of jobs[{seen[job.name]}]", job.name)
        seen[job.name] = index
    devices = tuple(parser.device(name, device) for name, device in table.devices.items())
    return JobFile(path=path, jobs=jobs, devices=devices)


def entry_name(job: Job, *, host: str, time: str) -> str:
    """Fill in the template of a job's entry.

    Args:
        job: whose entry.
        host: name of this host, for a job that names none.
        time: when the run began, as text.
    """
    values = {"name": job.name, "host": job.host or host, "time": time}
    return _FIELD.sub(lambda match: values[match[1]], job.entry)


class _Parser:
    """Applies defaults and checks, and knows the place of what it looks at."""

    def __init__(self, path: str, defaults: _Settings) -> None:
        self._path = path
        self._defaults = defaults

    def refusal(self, place: str, what: str, found: object) -> StateError:
        """What is wrong, and where."""
        return StateError(f"{self._path}: {place}: {what}, found {found!r}")

    def job(self, table: _JobTable, place: str) -> Job:
        """Complete one job."""
        tier: Tier = self._one_of(self._given(table, "tier", "hot"), f"{place}.tier", Tier)
        level = self._given(table, "level", COLD_LEVEL)
        dedup = self._given(table, "dedup", False)
        if dedup and tier == "cold":
            raise self.refusal(
                f"{place}.dedup", 'only tier "hot" shares pages; expected false', True
            )
        archive = self._given(table, "archive", None)
        if archive is None:
            raise self.refusal(f"{place}.archive", "expected a directory here or in defaults", None)
        host = self._given(table, "host", None)
        job = Job(
            name=self._name(table.name, f"{place}.name"),
            vm=self._name(table.vm or table.name, f"{place}.vm"),
            host=None if host is None else self._name(host, f"{place}.host"),
            source=self._source(table.source, f"{place}.source"),
            archive=self._path_of(archive, f"{place}.archive"),
            entry=self._template(self._given(table, "entry", "{name}-{time}"), f"{place}.entry"),
            tier=tier,
            level=self._number(level, f"{place}.level", 1, COLD_LEVEL_MAX),
            dedup=dedup,
            retries=self._number(
                self._given(table, "retries", 2), f"{place}.retries", 0, RETRIES_MAX
            ),
            timeout_s=self._duration(self._given(table, "timeout", "0"), f"{place}.timeout"),
            rate=self._size(self._given(table, "rate", 0), f"{place}.rate"),
            verify=self._given(table, "verify", False),
            disks=self._disks(table, f"{place}.disks"),
            channels=self._given(table, "channels", _DEFAULT_OPTIONS.channels),
            depth=self._given(table, "depth", _DEFAULT_OPTIONS.depth),
            block_size=self._size(
                self._given(table, "block_size", _DEFAULT_OPTIONS.block_size),
                f"{place}.block_size",
            ),
            engine=self._one_of(
                self._given(table, "engine", _DEFAULT_OPTIONS.engine), f"{place}.engine", EngineName
            ),
            direct=self._one_of(
                self._given(table, "direct", _DEFAULT_OPTIONS.direct), f"{place}.direct", DirectMode
            ),
            given=tuple(name for name in _TUNABLE if self._given(table, name, None) is not None),
        )
        try:
            job.options(rate=0)
        except StateError as error:
            raise StateError(f"{self._path}: {place}: {error}") from None
        return job

    def device(self, name: str, table: _DeviceTable) -> DeviceLimit:
        """Complete the limits of one disk."""
        place = f"devices.{name!r}"
        if table.depth is not None:
            self._number(table.depth, f"{place}.depth", 1, 1 << 16)
        rate = self._size(0 if table.rate is None else table.rate, f"{place}.rate")
        return DeviceLimit(path=self._path_of(name, place), depth=table.depth, rate=rate)

    def _given(self, table: _JobTable, field: str, otherwise: Any) -> Any:
        """A setting of the job, else of the defaults, else of the program."""
        for settings in (table, self._defaults):
            value = getattr(settings, field)
            if value is not None:
                return value
        return otherwise

    def _disks(self, table: _JobTable, place: str) -> str:
        """How disks are kept; what the defaults say of them is for running VMs alone."""
        if table.source.qmp is None:
            if table.disks is not None:
                raise self.refusal(place, "only a running VM (qmp) has disks", table.disks)
            return NO_DISKS
        match self._given(table, "disks", NO_DISKS):
            case "none" | "internal" as word:
                return str(word)
            case {"external": str() as folder, **others} if not others:
                return f"external={self._path_of(folder, f'{place}.external')}"
            case found:
                what = "expected 'none', 'internal' or { external = 'DIR' }"
                raise self.refusal(place, what, found)

    def _source(self, table: _SourceTable, place: str) -> Source:
        """Tell the kind by its keys, and refuse keys of another kind."""
        given = [name for name in table.__struct_fields__ if getattr(table, name) is not None]
        match given:
            case ["qmp"]:
                try:
                    path = socket_path(table.qmp or "")
                except StateError as error:
                    raise StateError(f"{self._path}: {place}.qmp: {error}") from None
                return QmpSource(self._path_of(path, f"{place}.qmp"))
            case ["image"] | ["image", "offset"]:
                offset = self._size(table.offset or 0, f"{place}.offset")
                return ImageSource(self._path_of(table.image, f"{place}.image"), offset)
            case ["memory", "device_state"]:
                memory = {
                    idstr: self._memory_file(file, f"{place}.memory.{idstr!r}")
                    for idstr, file in (table.memory or {}).items()
                }
                state = self._path_of(table.device_state, f"{place}.device_state")
                return MemoryFilesSource(memory, state)
            case _:
                raise self.refusal(
                    place,
                    "expected keys qmp, or image (and offset), or memory and device_state",
                    ", ".join(given) or "none",
                )

    def _memory_file(self, file: str | MemoryFile, place: str) -> MemoryFile:
        """A path, or a table with offset and length."""
        if isinstance(file, str):
            file = MemoryFile(file)
        for name, value in (("offset", file.offset), ("length", file.length or 0)):
            self._number(value, f"{place}.{name}", 0, 1 << 62)
        return msgspec.structs.replace(file, path=self._path_of(file.path, place))

    def _path_of(self, path: str | None, place: str) -> str:
        """A path as seen from the job file's folder; what only a shell would expand is refused."""
        if not path or not _PATH.fullmatch(path):
            raise self.refusal(place, "expected a path; no shell expands ~ or $HOME here", path)
        return posixpath.normpath(posixpath.join(posixpath.dirname(self._path), path))

    def _name(self, name: str, place: str) -> str:
        """Names become part of file names, of metrics and of dask's resources."""
        if _NAME.fullmatch(name) is None:
            raise self.refusal(place, f"expected a name that matches {_NAME.pattern}", name)
        return name

    def _template(self, text: str, place: str) -> str:
        """Refuse braces that are none of ours; what the name may be is the archive's business."""
        for match in _FIELD.finditer(text):
            if match[1] not in ("name", "host", "time"):
                raise self.refusal(place, "expected only {name}, {host} and {time} in braces", text)
        return text

    def _one_of(self, value: str, place: str, choice: Any) -> Any:
        """Refuse a word that is none of a Literal's; msgspec would not say which these are."""
        words = get_args(choice)
        if value not in words:
            raise self.refusal(place, f"expected one of {', '.join(map(repr, words))}", value)
        return value

    def _number(self, value: int, place: str, least: int, most: int) -> int:
        """Refuse a number out of range."""
        if not least <= value <= most:
            raise self.refusal(place, f"expected a number from {least} to {most}", value)
        return value

    def _size(self, value: str | int, place: str) -> int:
        """A size in bytes, as a number or as text."""
        try:
            return self._number(parse_size(str(value)), place, 0, 1 << 62)
        except StateError as error:
            raise StateError(f"{self._path}: {place}: {error}") from None

    def _duration(self, text: str, place: str) -> float:
        """Seconds."""
        try:
            return parse_duration(text)
        except StateError as error:
            raise StateError(f"{self._path}: {place}: {error}") from None


def _place_first(path: str, message: str) -> str:
    """The message of msgspec with the field's place in front, where it names one."""
    match = _PLACE.fullmatch(message)
    assert match is not None
    place = f" {match[2]}:" if match[2] else ""
    what = match[1].replace(" | null`", "`")
    return f"{path}:{place} {what[:1].lower()}{what[1:]}"
