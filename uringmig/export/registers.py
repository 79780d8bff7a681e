"""The processors' registers out of the device state, and the notes of a core file.  Pure.

A ``cpu`` section (QEMU: target/i386/machine.c, vmstate_x86_cpu) is read by the names that the
vmdescription gives its fields. A device state saved from outside has no names; there the layout of
version 12 is taken, whose beginning is the same in every QEMU, since each loads what older ones
saved. It holds for the 64-bit target alone, so that must be known then.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Final

import msgspec

from uringmig.export.elfcore import note
from uringmig.format.constants import TAIL_BYTES_MAX
from uringmig.format.events import FullSection

_NT_PRSTATUS: Final = 1
_NT_QEMU: Final = 0
_VERSION: Final = 12
#: Name: where it is in the body, and what. A segment: selector, base, limit, flags.
_WORD: Final = ">Q"
_SEGMENT: Final = ">IQII"
_SEGMENT_BYTES: Final = struct.calcsize(_SEGMENT)
_LAYOUT: Final[dict[str, int]] = {
    "env.regs": 0,
    "env.eip": 128,
    "env.eflags": 136,
    "env.segs": 236,
    "env.ldt": 356,
    "env.tr": 376,
    "env.gdt": 396,
    "env.idt": 416,
    "env.cr[0]": 456,
    "env.cr[2]": 464,
    "env.cr[3]": 472,
    "env.cr[4]": 480,
    "env.kernelgsbase": 856,
}
#: Bytes of each; of a list of fields that says otherwise the registers are not read.
_SIZES: Final = {
    name: {"env.regs": 128, "env.segs": 6 * _SEGMENT_BYTES}.get(
        name, _SEGMENT_BYTES if name in ("env.ldt", "env.tr", "env.gdt", "env.idt") else 8
    )
    for name in _LAYOUT
}
#: QEMU's order of ``env.regs`` and ``env.segs``.
_REGS: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    *(f"r{number}" for number in range(8, 16)),
)  # fmt: skip
_SEGS: Final = ("es", "cs", "ss", "ds", "fs", "gs")
#: struct elf_prstatus of x86-64: pid at 32, 27 words of registers at 112.
_PRSTATUS: Final = struct.Struct("<32xI76x27Q8x")
_PRSTATUS_WORDS: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8",
    "rax", "rcx", "rdx", "rsi", "rdi",
)  # fmt: skip
#: QEMUCPUState: version, size, 18 words, 10 segments, 6 words.
_STATE_WORDS: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    *(f"r{number}" for number in range(8, 16)),
    "rip", "rflags",
)  # fmt: skip
_STATE_SEGS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
_STATE_BYTES: Final = 440


class _Field(msgspec.Struct, gc=False):
    name: str = ""
    size: Annotated[int, msgspec.Meta(ge=0, le=TAIL_BYTES_MAX)] = 0
    array_len: Annotated[int, msgspec.Meta(ge=0, le=TAIL_BYTES_MAX)] = 1


class _Device(msgspec.Struct):
    name: str
    instance_id: int
    fields: list[_Field] = []


class _Description(msgspec.Struct):
    devices: list[_Device]


class Registers(msgspec.Struct, frozen=True):
    """One processor's registers.

    Attributes:
        number: of the processor, from 0.
        words: by name; ``cr0`` to ``cr4`` and ``kernel_gs_base`` too.
        segments: by name: selector, base, limit, flags.
    """

    number: int
    words: Mapping[str, int]
    segments: Mapping[str, tuple[int, int, int, int]]


def read_registers(
    sections: Sequence[FullSection], description: bytes, *, target: str | None
) -> tuple[list[Registers], str | None]:
    """Read the registers of every processor.

    Args:
        sections: of device state.
        description: the vmdescription's text.
        target: architecture of the guest, as QEMU called it; None if it is not known.

    Returns:
        The registers, none or those of all; and why there are none, or how they were found if the
        image does not say.
    """
    named = _described(description)
    found: list[Registers] = []
    guessed = False
    for section in sections:
        header = section.header
        if header.idstr != "cpu":
            continue
        offsets = named.get(header.instance_id)
        if offsets is None:
            guessed = True
            if target != "x86_64" or header.version_id != _VERSION:
                return [], (
                    "no registers: the image does not name the fields of its processors, and "
                    f"version {header.version_id} of target {target or 'unknown'} is not known here"
                )
            offsets = _LAYOUT
        body = section.raw[len(header.pack()) :]
        if max(at + _SIZES[name] for name, at in offsets.items()) > len(body):
            return [], "no registers: the state of a processor is too short"
        found.append(_registers(header.instance_id, body, offsets))
    if not found:
        return [], "no registers: the image has no state of a processor"
    found.sort(key=lambda one: one.number)
    note_ = "registers are read by the layout of QEMU's x86-64: the image does not name its fields"
    return found, note_ if guessed else None


def processor_notes(registers: Sequence[Registers]) -> bytes:
    """NT_PRSTATUS of every processor, then QEMU's own note of every processor."""
    return b"".join(
        (
            *(note(b"CORE", _NT_PRSTATUS, _prstatus(one)) for one in registers),
            *(note(b"QEMU", _NT_QEMU, _qemu_state(one)) for one in registers),
        )
    )


def _described(text: bytes) -> dict[int, Mapping[str, int]]:
    """By processor where its registers are, of those whose fields have all the names."""
    try:
        description = msgspec.json.decode(text, type=_Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    found: dict[int, Mapping[str, int]] = {}
    for device in description.devices:
        if device.name != "cpu":
            continue
        offsets, at = {}, 0
        for field in device.fields:
            length = field.size * field.array_len
            if _SIZES.get(field.name) == length:
                offsets[field.name] = at
            at += length
        if len(offsets) == len(_LAYOUT):
            found[device.instance_id] = offsets
    return found


def _registers(number: int, body: bytes, offsets: Mapping[str, int]) -> Registers:
    """One processor's, out of the body of its section."""

    def word(name: str) -> int:
        return int(struct.unpack_from(_WORD, body, offsets[name])[0])

    def segment(name: str, index: int = 0) -> tuple[int, int, int, int]:
        at = offsets[name] + index * _SEGMENT_BYTES
        selector, base, limit, flags = struct.unpack_from(_SEGMENT, body, at)
        return selector, base, limit, flags

    words = dict(zip(_REGS, struct.unpack_from(">16Q", body, offsets["env.regs"]), strict=True))
    words |= {"rip": word("env.eip"), "rflags": word("env.eflags"), "cr1": 0}
    words |= {f"cr{index}": word(f"env.cr[{index}]") for index in (0, 2, 3, 4)}
    words["kernel_gs_base"] = word("env.kernelgsbase")
    segments = {name: segment("env.segs", index) for index, name in enumerate(_SEGS)}
    segments |= {name: segment(f"env.{name}") for name in ("ldt", "tr", "gdt", "idt")}
    return Registers(number, words, segments)


def _prstatus(one: Registers) -> bytes:
    """What gdb reads: pid is the processor's number, from 1."""
    selector = {name: segment[0] for name, segment in one.segments.items()}
    base = {name: segment[1] for name, segment in one.segments.items()}
    return _PRSTATUS.pack(
        one.number + 1,
        *(one.words[name] for name in _PRSTATUS_WORDS),
        0,  # orig_rax
        one.words["rip"], selector["cs"], one.words["rflags"], one.words["rsp"], selector["ss"],
        base["fs"], base["gs"], selector["ds"], selector["es"], selector["fs"], selector["gs"],
    )  # fmt: skip


def _qemu_state(one: Registers) -> bytes:
    """QEMU: target/i386/arch_dump.c, QEMUCPUState."""
    segments = [
        struct.pack("<IIIIQ", selector, limit, flags, 0, base)
        for selector, base, limit, flags in (one.segments[name] for name in _STATE_SEGS)
    ]
    words = [one.words[name] for name in _STATE_WORDS]
    last = [one.words[f"cr{index}"] for index in range(5)] + [one.words["kernel_gs_base"]]
    state = b"".join(
        (
            struct.pack("<II", 1, _STATE_BYTES),
            struct.pack(f"<{len(words)}Q", *words),
            *segments,
            struct.pack("<6Q", *last),
        )
    )
    assert len(state) == _STATE_BYTES, len(state)
    return state
