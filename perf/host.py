"""What a result depends on besides the code: it must be equal before two results are compared."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from uringmig.errors import MismatchError
from uringmig.storage.directfile import probe_alignment
from uringmig.storage.enginechoice import describe_liburing
from uringmig.testing.machine import find_qemu

#: Metadata of this name must agree; pyperf keeps them beside its own.
PREFIX: Final = "host_"


def describe_host(folder: Path) -> dict[str, str]:
    """Describe the machine, and the disk and file system that ``folder`` is on."""
    kind, options = _mount(folder)
    return {
        "host_device": describe_device(device_of(folder)),
        "host_file_system": kind,
        "host_mount_options": options,
        "host_alignment": _alignment(folder),
        "host_kernel": platform.release(),
        "host_cpu": _cpu(),
        "host_cpus": str(os.cpu_count()),
        "host_memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 30} GiB",
        "host_liburing": describe_liburing().partition(" ")[0],
        "host_qemu": _version([find_qemu() or "qemu-system-x86_64", "--version"]),
        "host_fio": _version(["fio", "--version"]),
        "host_python": platform.python_version(),
    }


def check_same_host(first: Mapping[str, object], second: Mapping[str, object]) -> None:
    """Refuse results that were not measured under the same conditions.

    Raises:
        MismatchError: names the first condition that differs, and both values.
    """
    for key in sorted(set(first) | set(second)):
        if key.startswith(PREFIX) and first.get(key) != second.get(key):
            raise MismatchError(
                f"the results cannot be compared: {key.removeprefix(PREFIX)} differs",
                expected=first.get(key),
                found=second.get(key),
            )


def device_of(folder: Path) -> str | None:
    """``major:minor`` of the disk a folder is on, or None if it is on none (tmpfs)."""
    number = folder.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    return name if Path(f"/sys/dev/block/{name}").exists() else None


def describe_device(device: str | None) -> str:
    """Name, size and model of a disk."""
    if device is None:
        return "memory"
    place = Path(f"/sys/dev/block/{device}")
    words = [place.resolve().name]
    words.append(f"{int((place / 'size').read_text()) * 512 >> 30} GiB")
    for attribute in ("device/model", "device/serial"):
        path = place / attribute
        if path.exists():
            words.append(path.read_text().strip())
    return " ".join(words)


def _mount(folder: Path) -> tuple[str, str]:
    """File system and options of the mount that a folder is in.  proc(5): mountinfo."""
    best: tuple[int, str, str] = (-1, "unknown", "")
    where = str(folder.resolve())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _source, super_options) = left.split(), right.split(" ", 2)
        point = fields[4].encode().decode("unicode_escape")
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point the later hides the earlier.
        if inside and len(point) >= best[0]:
            best = (len(point), kind, ",".join([fields[5], super_options]))
    return best[1], best[2]


def _alignment(folder: Path) -> str:
    """What O_DIRECT asks for here: memory and offset, in bytes."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        except OSError:
            return "no O_DIRECT"
        try:
            alignment = probe_alignment(fd)
        finally:
            os.close(fd)
    return f"memory {alignment.memory}, offset {alignment.offset}"


def _cpu() -> str:
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def _version(command: list[str]) -> str:
    """First line a program says of itself, or that it is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "not installed"
    return done.stdout.partition("\n")[0].strip()
