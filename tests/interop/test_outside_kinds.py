"""Kinds of memory that a QEMU may have, each saved from outside and compared with QEMU's own save.

The memory is filled from outside, so what is there is known; the machines run nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hostmemory import fill
from machinestates import assert_qemu_loads, assert_saved_as_by_qemu
from realguest import StartMachine, shared_path

from uringmig.units import MiB

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_THP_DISABLE = 41


@dataclass(frozen=True)
class Kind:
    """A kind of memory.

    Attributes:
        backend: of the RAM; `Machine`.
        arguments: QEMU's; ``{file}`` is a file of 32 MiB with some content.
        mapped: the ends of the idstrs that are to be mapped; all others are to be copied.
        read_only: the ends of those that nobody may write to.
        loads: whether QEMU can load an image of it, its own included.
    """

    backend: str = ""
    arguments: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()
    loads: bool = True


def nvdimm(options: str, device: str = "", **more: object) -> Kind:
    backend = f"memory-backend-file,id=nv,mem-path={{file}},size=32M,{options}"
    arguments = (
        *("-machine", "nvdimm=on", "-m", "64M,slots=4,maxmem=1G"),
        *("-object", backend, "-device", f"nvdimm,memdev=nv{device}"),
    )
    mapped = ("nv",) if "share=on" in options else ()
    return Kind(arguments=arguments, mapped=mapped, **more)  # type: ignore[arg-type]


KINDS = {
    "nvdimm shared": nvdimm("share=on"),
    "nvdimm private": nvdimm("share=off"),
    "nvdimm shared, labels": nvdimm("share=on", ",label-size=128K"),
    "nvdimm private, labels": nvdimm("share=off", ",label-size=128K"),
    # QEMU dies of loading into memory that it has mapped for reading only.
    "nvdimm shared, read only": nvdimm(
        "share=on,readonly=on", ",unarmed=on", read_only=("nv",), loads=False
    ),
    "nvdimm private, read only": nvdimm("share=off,readonly=on,rom=off", ",unarmed=on"),
    "nvdimm private, ROM": nvdimm(
        "share=off,readonly=on", ",unarmed=on", read_only=("nv",), loads=False
    ),
    "nvdimm without a file": Kind(
        arguments=(
            *("-machine", "nvdimm=on", "-m", "64M,slots=4,maxmem=1G"),
            *("-object", "memory-backend-ram,id=nv,size=32M", "-device", "nvdimm,memdev=nv"),
        )
    ),
    "virtio-pmem": Kind(
        arguments=(
            *("-m", "64M,slots=4,maxmem=1G", "-object", "memory-backend-ram,id=p,size=32M"),
            *("-device", "virtio-pmem-pci,memdev=p"),
        )
    ),
    "ivshmem, master": Kind(
        arguments=(
            *("-object", "memory-backend-ram,id=iv,size=16M,share=on"),
            *("-device", "ivshmem-plain,memdev=iv,master=on"),
        ),
        mapped=("iv",),
    ),
    "mem-lock": Kind(arguments=("-overcommit", "mem-lock=on")),
    "mem-lock on fault": Kind(arguments=("-overcommit", "mem-lock=on-fault")),
    "prealloc": Kind("memory-backend-ram,prealloc=on,prealloc-threads=2"),
    "prealloc memfd": Kind("memory-backend-memfd,prealloc=on,share=on", mapped=("pc.ram",)),
    "mem-merge on": Kind("memory-backend-ram,merge=on", ("-machine", "mem-merge=on")),
    "mem-merge off": Kind("memory-backend-ram,merge=off,dump=off"),
    "not reserved": Kind("memory-backend-ram,reserve=off"),
    "aux-ram-share": Kind(
        arguments=("-machine", "aux-ram-share=on"),
        mapped=("pc.bios", "pc.rom", "/rom@etc/acpi/tables", "/rom@etc/table-loader",
                "/rom@etc/acpi/rsdp"),
    ),
    "video memory": Kind(
        arguments=("-device", "VGA,vgamem_mb=64", "-device", "bochs-display,vgamem=32M")
    ),
    "one thread of TCG": Kind(arguments=("-accel", "tcg,thread=single")),
    "sandbox": Kind(
        arguments=(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        )
    ),
}  # fmt: skip


@contextmanager
def content() -> Iterator[Path]:
    """A file of 32 MiB, a hole but for some of it."""
    path = shared_path()
    with path.open("xb") as file:
        file.truncate(32 * MiB)
        file.seek(5 * MiB)
        file.write(np.random.default_rng(2).integers(0, 256, MiB, np.uint8).tobytes())
    try:
        yield path
    finally:
        path.unlink()


@pytest.mark.parametrize("name", KINDS)
def test_as_qemu_saves_it(name: str, start_machine: StartMachine, tmp_path: Path) -> None:
    """QEMU's bytes, nothing of the host's taken by looking, and QEMU loads the image."""
    kind = KINDS[name]
    with content() as file, content() as fresh:
        machine, waiting = (
            start_machine(
                memory_bytes=64 * MiB,
                backend=kind.backend,
                arguments=[one.format(file=path) for one in kind.arguments],
                **{state: True},
            )
            for path, state in ((file, "paused"), (fresh, "incoming"))
        )
        fill(machine, leave_out=kind.read_only)
        image = assert_saved_as_by_qemu(machine, tmp_path, mapped=kind.mapped)
        if kind.loads:
            assert_qemu_loads(waiting, image)


@pytest.mark.parametrize("backend", ["", "memory-backend-memfd,share=off"])
def test_without_huge_pages(backend: str, start_machine: StartMachine, tmp_path: Path) -> None:
    """Where transparent huge pages are off, for this QEMU as for all where sysfs says never."""
    assert _LIBC.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    try:  # what this process has is its children's, too
        machine = start_machine(memory_bytes=64 * MiB, backend=backend, paused=True)
    finally:
        _LIBC.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
    status = Path(f"/proc/{machine.process.pid}/status").read_text()
    assert "THP_enabled:\t0" in status
    fill(machine)
    assert_saved_as_by_qemu(machine, tmp_path)
