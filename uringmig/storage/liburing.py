"""C liburing through its exported FFI symbols: find it, check it, declare it.

The functions of the PyPI package ``liburing`` hold the GIL while they wait and take only bytes;
but its extension file exports C liburing's own functions, the inline ones too. Loaded with ctypes
they release the GIL and take plain addresses. A distribution's ``liburing-ffi.so.2`` exports the
same names, so it serves where the wheel does not exist.

Every function used has argtypes and a restype: a pointer passed as a default int is cut to 32 bits.
``struct io_uring`` is public ABI, but a layout other than ours would crash, so `load` compares what
the library's own accessors say with what we read, once per process, before anything relies on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from uringmig.errors import HostError

#: io_uring_setup(2): set up the ring for one submitting task, and run completion work only when
#: that task asks (Linux 6.0, 6.1); cooperative task work (5.19).
IORING_SETUP_COOP_TASKRUN: Final = 1 << 8
IORING_SETUP_SINGLE_ISSUER: Final = 1 << 12
IORING_SETUP_DEFER_TASKRUN: Final = 1 << 13

IORING_OP_NOP: Final = 0
IORING_OP_READ: Final = 22
IORING_OP_WRITE: Final = 23

#: liburing 2.4 is the first with an FFI library (liburing-ffi).
VERSION_LEAST: Final = (2, 4)
#: The layout below is the public ABI of all 2.x; a new major version has to be looked at first.
VERSION_MAJOR: Final = 2


class SubmissionEntry(ctypes.Structure):
    """``struct io_uring_sqe`` of linux/io_uring.h, as reads and writes use it."""

    _fields_ = [
        ("opcode", ctypes.c_uint8), ("flags", ctypes.c_uint8), ("ioprio", ctypes.c_uint16),
        ("fd", ctypes.c_int32), ("off", ctypes.c_uint64), ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32), ("rw_flags", ctypes.c_uint32), ("user_data", ctypes.c_uint64),
        ("buf_index", ctypes.c_uint16), ("personality", ctypes.c_uint16),
        ("file_index", ctypes.c_int32), ("addr3", ctypes.c_uint64), ("pad", ctypes.c_uint64),
    ]  # fmt: skip


class CompletionEntry(ctypes.Structure):
    """``struct io_uring_cqe`` of linux/io_uring.h."""

    _fields_ = [
        ("user_data", ctypes.c_uint64), ("res", ctypes.c_int32), ("flags", ctypes.c_uint32),
    ]  # fmt: skip


class SubmissionQueue(ctypes.Structure):
    """``struct io_uring_sq`` of liburing.h."""

    _fields_ = [
        ("khead", ctypes.c_void_p), ("ktail", ctypes.c_void_p),
        ("kring_mask", ctypes.c_void_p), ("kring_entries", ctypes.c_void_p),
        ("kflags", ctypes.c_void_p), ("kdropped", ctypes.c_void_p),
        ("array", ctypes.c_void_p), ("sqes", ctypes.c_void_p),
        ("sqe_head", ctypes.c_uint), ("sqe_tail", ctypes.c_uint),
        ("ring_sz", ctypes.c_size_t), ("ring_ptr", ctypes.c_void_p),
        ("ring_mask", ctypes.c_uint), ("ring_entries", ctypes.c_uint),
        ("pad", ctypes.c_uint * 2),
    ]  # fmt: skip


class CompletionQueue(ctypes.Structure):
    """``struct io_uring_cq`` of liburing.h."""

    _fields_ = [
        ("khead", ctypes.c_void_p), ("ktail", ctypes.c_void_p),
        ("kring_mask", ctypes.c_void_p), ("kring_entries", ctypes.c_void_p),
        ("kflags", ctypes.c_void_p), ("koverflow", ctypes.c_void_p),
        ("cqes", ctypes.c_void_p),
        ("ring_sz", ctypes.c_size_t), ("ring_ptr", ctypes.c_void_p),
        ("ring_mask", ctypes.c_uint), ("ring_entries", ctypes.c_uint),
        ("pad", ctypes.c_uint * 2),
    ]  # fmt: skip


class IoUring(ctypes.Structure):
    """``struct io_uring`` of liburing.h: 216 bytes on every 64-bit machine."""

    _fields_ = [
        ("sq", SubmissionQueue), ("cq", CompletionQueue),
        ("flags", ctypes.c_uint), ("ring_fd", ctypes.c_int),
        ("features", ctypes.c_uint), ("enter_ring_fd", ctypes.c_int),
        ("int_flags", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("pad2", ctypes.c_uint),
    ]  # fmt: skip


class Timespec(ctypes.Structure):
    """``struct __kernel_timespec``."""

    _fields_ = [("tv_sec", ctypes.c_longlong), ("tv_nsec", ctypes.c_longlong)]


_RING: Final = ctypes.POINTER(IoUring)
_PROTOTYPES: Final = {
    "io_uring_queue_init": (ctypes.c_int, [ctypes.c_uint, _RING, ctypes.c_uint]),
    "io_uring_queue_exit": (None, [_RING]),
    "io_uring_submit": (ctypes.c_int, [_RING]),
    "io_uring_submit_and_wait_timeout": (
        ctypes.c_int,
        [
            _RING,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_uint,
            ctypes.POINTER(Timespec),
            ctypes.c_void_p,
        ],
    ),
    "io_uring_get_events": (ctypes.c_int, [_RING]),
    "io_uring_cq_ready": (ctypes.c_uint, [_RING]),
    "io_uring_cq_advance": (None, [_RING, ctypes.c_uint]),
    "io_uring_sq_space_left": (ctypes.c_uint, [_RING]),
    "io_uring_get_sqe": (ctypes.c_void_p, [_RING]),
    "io_uring_prep_write": (
        None,
        [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64],
    ),
    "io_uring_prep_nop": (None, [ctypes.c_void_p]),
    "io_uring_sqe_set_data64": (None, [ctypes.c_void_p, ctypes.c_uint64]),
}


@dataclass(frozen=True, slots=True)
class Library:
    """A checked liburing: ``handle`` has the declared functions as attributes."""

    handle: ctypes.CDLL
    version: tuple[int, int]
    path: str


@functools.cache
def load() -> Library:
    """Find liburing, check its version and its structures against ours.

    Raises:
        HostError: there is none, it is unfit, or this kernel or container refuses io_uring.
    """
    library = find()
    check_abi(library)
    return library


def find() -> Library:
    """Load and declare liburing without making a ring: PyPI's own file, else the distribution's.

    Raises:
        HostError: neither is there, or the version is one we do not know.
    """
    reasons = []
    for locate in (_wheel_path, _distribution_path):
        try:
            path = locate()
            handle = ctypes.CDLL(path)
            for name, (restype, argtypes) in _PROTOTYPES.items():
                function = getattr(handle, name)
                function.restype, function.argtypes = restype, argtypes
            version = (handle.io_uring_major_version(), handle.io_uring_minor_version())
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(str(error))
            continue
        if version < VERSION_LEAST or version[0] != VERSION_MAJOR:
            raise HostError(
                f"liburing {version[0]}.{version[1]} at {path} is not usable: "
                f"{VERSION_LEAST[0]}.{VERSION_LEAST[1]} or a newer {VERSION_MAJOR}.x is needed"
            )
        return Library(handle, version, path)
    raise HostError(
        f"no liburing ({'; '.join(reasons)}); "
        "pip install liburing, or install the package of liburing-ffi.so.2"
    )


def queue_init(library: Library, entries: int, ring: IoUring, flags: int) -> None:
    """Call ``io_uring_queue_init``.

    Raises:
        OSError: the flags are unknown here (EINVAL) or a passing shortage.
        HostError: io_uring cannot be had at all; the message has the cause and the cure.
    """
    result = library.handle.io_uring_queue_init(entries, ctypes.byref(ring), flags)
    if result >= 0:
        return
    number = -result
    if number in (errno.ENOSYS, errno.EPERM, errno.EACCES):
        raise HostError(refusal(number))
    raise OSError(number, os.strerror(number))


def refusal(number: int) -> str:
    """Say why io_uring_setup(2) failed with this errno on this machine, and what would help."""
    if number == errno.ENOSYS:
        return "io_uring: this kernel has none (ENOSYS); Linux 5.15 or newer is needed"
    setting = ""
    with contextlib.suppress(OSError):
        setting = Path("/proc/sys/kernel/io_uring_disabled").read_text().strip()
    if setting in ("1", "2"):
        return (
            f"io_uring: switched off here (kernel.io_uring_disabled = {setting}); "
            "sysctl kernel.io_uring_disabled=0 allows it"
        )
    return (
        f"io_uring: refused ({errno.errorcode.get(number, number)}), most likely by a container's "
        "seccomp profile or a security module; allow io_uring_setup, io_uring_enter and "
        "io_uring_register there"
    )


def check_abi(library: Library) -> None:
    """Compare our view of the structures with the library's own accessors, on a small ring.

    Raises:
        HostError: they differ, so using this liburing would crash or corrupt; or io_uring is
            refused here.
    """
    guard = 0xA5
    area = (ctypes.c_uint8 * (ctypes.sizeof(IoUring) + 256))()
    ctypes.memset(area, guard, ctypes.sizeof(area))
    ring = IoUring.from_buffer(area)
    entries = 4
    try:
        queue_init(library, entries, ring, 0)
    except OSError as error:
        raise HostError(f"io_uring: a ring of {entries} entries failed: {error.strerror}") from None
    handle, reference = library.handle, ctypes.byref(ring)
    complaint = _compare(handle, ring, entries)
    if complaint is None and any(byte != guard for byte in area[ctypes.sizeof(IoUring) :]):
        complaint = f"struct io_uring is larger than {ctypes.sizeof(IoUring)} bytes"
    if complaint is not None:
        # The ring is left alone: giving a misread structure back to the library could crash.
        raise HostError(
            f"liburing {library.version[0]}.{library.version[1]} at {library.path} "
            f"has another layout: {complaint}"
        )
    handle.io_uring_queue_exit(reference)


def _compare(handle: ctypes.CDLL, ring: IoUring, entries: int) -> str | None:
    """Return the first difference found, cheapest and safest checks first."""
    try:
        link = str(Path(f"/proc/self/fd/{ring.ring_fd}").readlink())
    except OSError:
        link = "nothing"
    if "io_uring" not in link:
        return f"ring_fd {ring.ring_fd} is {link}"
    counts = (ring.sq.ring_entries, ring.sq.ring_mask, ring.cq.ring_entries, ring.cq.ring_mask)
    if counts != (entries, entries - 1, 2 * entries, 2 * entries - 1):
        return f"ring entries and masks read as {counts}"
    reference = ctypes.byref(ring)
    if handle.io_uring_sq_space_left(reference) != entries:
        return "io_uring_sq_space_left differs"
    first, second = (handle.io_uring_get_sqe(reference) for _ in range(2))
    if first != ring.sq.sqes or second - first != ctypes.sizeof(SubmissionEntry):
        return "the submission entries are not where expected"
    if ring.sq.sqe_tail != 2:
        return f"sqe_tail reads as {ring.sq.sqe_tail} after two entries"
    handle.io_uring_prep_write(first, 7, 0x1122334455, 4096, 0x66778899AA)
    sqe = SubmissionEntry.from_address(first)
    fields = (sqe.opcode, sqe.fd, sqe.addr, sqe.len, sqe.off)
    if fields != (IORING_OP_WRITE, 7, 0x1122334455, 4096, 0x66778899AA):
        return f"a prepared write reads as {fields}"
    for pointer, data in ((first, 41), (second, 42)):
        handle.io_uring_prep_nop(pointer)
        handle.io_uring_sqe_set_data64(pointer, data)
    waited = handle.io_uring_submit_and_wait_timeout(
        reference, ctypes.byref(ctypes.c_void_p()), 2, ctypes.byref(Timespec(5, 0)), None
    )
    if waited < 0 or handle.io_uring_cq_ready(reference) != 2:
        return f"two no-ops did not complete ({waited})"
    done = [(one.user_data, one.res) for one in (CompletionEntry * 2).from_address(ring.cq.cqes)]
    if sorted(done) != [(41, 0), (42, 0)]:
        return f"the completions read as {done}"
    handle.io_uring_cq_advance(reference, 2)
    return None


def _wheel_path() -> str:
    """Path of the extension file inside the PyPI package, which is not imported: it takes long.

    Raises:
        ImportError: there is no such package, or no such file in it.
    """
    package = find_spec("liburing")
    folders = [] if package is None else package.submodule_search_locations or []
    found = PathFinder.find_spec("liburing.liburing", list(folders))
    if found is None or found.origin is None:
        raise ImportError("no module liburing.liburing")
    return found.origin


def _distribution_path() -> str:
    """Name under which the dynamic loader knows the distribution's library."""
    return "liburing-ffi.so.2"
