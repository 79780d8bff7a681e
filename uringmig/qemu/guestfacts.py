"""What a running QEMU says of its machine, for the manifest: facts, and the map of its memory.

Nothing here changes anything, and nothing that is missing fails a save: a fact that this QEMU does
not tell stays out, and a map that is not understood stays out whole, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from uringmig.errors import FormatError
from uringmig.format.mtree import MappedRange, parse_mtree
from uringmig.image.guestfacts import GuestDisk, GuestFacts, MapRange, check_map
from uringmig.qemu.disknodes import writable_disks
from uringmig.qemu.monitor import HostBlock, Monitor
from uringmig.qemu.qmp import CommandError

#: QEMU: hmp_gpa2hva.
_HOST_ADDRESS: Final = re.compile(r"Host virtual address for 0x[0-9a-f]+ \(.*\) is 0x([0-9a-f]+)")
_TYPE_SUFFIX: Final = "-machine"
#: What QEMU answers where it was given none.
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"
_WORD_MAX: Final = 255


def describe_guest(monitor: Monitor) -> tuple[GuestFacts, tuple[str, ...]]:
    """Ask a QEMU for its machine's facts and where its memory lies.

    The guest itself moves its memory about (a BAR, the windows of the BIOS), so the map belongs to
    an image only if the guest stands still since before it was asked for.

    Args:
        monitor: of the VM.

    Returns:
        The facts, and what the operator should know, one line each.

    Raises:
        PeerError: QEMU went away.
    """
    cpu_type, cpu_count = processors_of(monitor)
    machine = _word(_ask(monitor, "qom-get", path="/machine", property="type"))
    kvm = _entry(_ask(monitor, "query-kvm"), "enabled")
    uuid = _word(_entry(_ask(monitor, "query-uuid"), "UUID"))
    memory_map, notes = _memory_map(monitor)
    disks, more = _disks(monitor)
    facts = GuestFacts(
        qemu_version=".".join(map(str, monitor.qemu_version)),
        qemu_package=_word(_entry(_ask(monitor, "query-version"), "package")),
        machine=None if machine is None else machine.removesuffix(_TYPE_SUFFIX),
        target=_word(_entry(_ask(monitor, "query-target"), "arch")),
        cpu_type=cpu_type,
        cpu_count=cpu_count or None,
        kvm=kvm if isinstance(kvm, bool) else None,
        name=_word(_entry(_ask(monitor, "query-name"), "name")),
        uuid=None if uuid == _NO_UUID else uuid,
        memory_map=memory_map,
        disks=disks or msgspec.UNSET,
    )
    return facts, (*notes, *more)


def processors_of(monitor: Monitor) -> tuple[str | None, int]:
    """The QOM type of a QEMU's first processor, and how many there are; None and 0: not told.

    Raises:
        PeerError: QEMU went away.
    """
    cpus = _ask(monitor, "query-cpus-fast")
    if not isinstance(cpus, list) or not cpus:
        return None, 0
    first = _word(_entry(cpus[0], "qom-path"))
    return first and _word(_ask(monitor, "qom-get", path=first, property="type")), len(cpus)


def _ask(monitor: Monitor, command: str, /, **arguments: Any) -> Any:
    """What QEMU answers, or None where it does not know."""
    try:
        return monitor.execute(command, **arguments)
    except CommandError:
        return None


def _entry(answer: Any, name: str) -> Any:
    """One member of an answer, or None."""
    return answer.get(name) if isinstance(answer, dict) else None


def _word(value: Any) -> str | None:
    """A text that a manifest can hold, or None."""
    if isinstance(value, str) and 0 < len(value) <= _WORD_MAX and value.isprintable():
        return value
    return None


def _disks(monitor: Monitor) -> tuple[list[GuestDisk], tuple[str, ...]]:
    """The disks that the guest may write to, or none and the reason."""
    try:
        return [one.facts for one in writable_disks(monitor)], ()
    except (CommandError, FormatError) as error:
        return [], (f"the manifest does not tell the guest's disks: {error}",)


def _memory_map(monitor: Monitor) -> tuple[list[MapRange] | None, tuple[str, ...]]:
    """Where the memory lies, or None and the reason."""
    try:
        blocks = monitor.ram_blocks()
        ranges = parse_mtree(monitor.human("info mtree -f"))
        found = place_ranges(ranges, blocks, _host_addresses(monitor, ranges, blocks))
    except CommandError as error:
        reason: Exception = error
    except (FormatError, msgspec.ValidationError) as error:
        reason = error
    else:
        return found, ()
    return None, (f"the manifest has no map of the guest's memory: {reason}",)


def place_ranges(
    ranges: Sequence[MappedRange],
    blocks: Sequence[HostBlock],
    host_addresses: Mapping[int, int],
) -> list[MapRange]:
    """Say in which ramblock each range lies.  Pure.

    A ramblock's idstr is the region's name, after the path of the device that brought it in. Where
    several end in the same name (two VGA adapters), it is the one that is mapped there.

    Args:
        ranges: of the guest's memory.
        blocks: all of QEMU's.
        host_addresses: by guest address, where in QEMU's process a range's first byte is; for the
            ranges whose names do not tell.

    Raises:
        FormatError: a range does not fit into its block, or it cannot be told which one is its.
    """
    placed = []
    for one in ranges:
        found = _candidates(one, blocks)
        if len(found) > 1:
            found = [b for b in found if _holds(b, host_addresses.get(one.start), one)]
            if len(found) != 1:
                raise FormatError(
                    f"memory map at guest address {one.start:#x}: blocks that it may be",
                    expected=1, found=len(found),
                )  # fmt: skip
        placed.append(
            MapRange(
                start=one.start,
                length=one.length,
                block=found[0].idstr if found else None,
                offset=one.offset,
                read_only=one.read_only,
                region=one.region[:_WORD_MAX],
            )
        )
    check_map(placed, {block.idstr: block.used_length for block in blocks})
    return placed


def _candidates(one: MappedRange, blocks: Sequence[HostBlock]) -> list[HostBlock]:
    """The blocks that a range may lie in, by their names."""
    ending = f"/{one.region}"
    return [b for b in blocks if b.idstr == one.region or b.idstr.endswith(ending)]


def _holds(block: HostBlock, host_address: int | None, one: MappedRange) -> bool:
    """Say whether a range that begins at an address of QEMU's is this block's."""
    if block.host_address is None or host_address is None:
        return False
    return block.host_address + one.offset == host_address


def _host_addresses(
    monitor: Monitor, ranges: Sequence[MappedRange], blocks: Sequence[HostBlock]
) -> dict[int, int]:
    """Ask where in QEMU's process the ranges are of which names do not tell the block."""
    addresses = {}
    for one in ranges:
        if len(_candidates(one, blocks)) > 1:
            match = _HOST_ADDRESS.fullmatch(monitor.human(f"gpa2hva {one.start:#x}").strip())
            if match is not None:
                addresses[one.start] = int(match[1], 16)
    return addresses
