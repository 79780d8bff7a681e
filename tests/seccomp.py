"""A program as in a container that refuses io_uring: ``python seccomp.py ERRNO PROGRAM ...``.

A real seccomp filter, as a container's profile is one: io_uring_setup(2) fails with that errno in
the program and all its children, and nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_SECCOMP_RET_ALLOW = 0x7FFF0000
_SECCOMP_RET_ERRNO = 0x00050000
#: The same number on every architecture: system calls since 5.1 are numbered alike.
_NR_IO_URING_SETUP = 425
_BPF_LD_W_ABS, _BPF_JEQ_K, _BPF_RET_K = 0x20, 0x15, 0x06


class _SockFprog(ctypes.Structure):
    """``struct sock_fprog`` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_io_uring(number: int) -> None:
    """Have io_uring_setup(2) fail with errno ``number`` in this process, for good."""
    code = [
        (_BPF_LD_W_ABS, 0, 0, 0),  # seccomp_data.nr
        (_BPF_JEQ_K, 0, 1, _NR_IO_URING_SETUP),
        (_BPF_RET_K, 0, 0, _SECCOMP_RET_ERRNO | number),
        (_BPF_RET_K, 0, 0, _SECCOMP_RET_ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    fprog = _SockFprog(len(code), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0),
    ):
        if libc.prctl(arguments[0], *map(ctypes.c_void_p, arguments[1:])) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    refuse_io_uring(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
