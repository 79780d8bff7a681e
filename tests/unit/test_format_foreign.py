"""What a file is that is no migration stream: the commonest mistakes are named."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pytest
import zstandard
from commandline import uringmig

from uringmig.errors import FormatError
from uringmig.format.foreign import kind_of
from uringmig.format.mainstream import MainStreamReader

FILES = [
    (b"LibvirtQemudSave\x02\0\0\0", "libvirt save image"),
    (b"LibvirtQemudPart\x02\0\0\0", "never completed"),
    (gzip.compress(b"x" * 100), "gzip"),
    (bz2.compress(b"x" * 100), "bzip2"),
    (lzma.compress(b"x" * 100), "xz"),
    (zstandard.compress(b"x" * 100), "zstd"),
    (Path(sys.executable).read_bytes()[:64], "ELF"),
    (b"KDUMP   \0\0\0\6", "kdump"),
    (b"makedumpfile\0\0\0\0", "flattened kdump"),
    (b"EMiL\1\0\0\0", "LiME"),
    (b"QFI\xfb\0\0\0\3", "qcow2"),
    (b"uringmig cold\0\0\0", "cold image"),
    (b"uringmig partial" + bytes(16), "interrupted"),
    (bytes(4096), "--offset"),
    (b'{\n "format": "uringmig-manifest"', "manifest"),
]


@pytest.mark.parametrize(("head", "kind"), FILES, ids=[kind for _, kind in FILES])
def test_kind_is_named(tmp_path: Path, head: bytes, kind: str) -> None:
    """By `inspect`, `verify` and the library, in one line and with exit code 3."""
    (tmp_path / "file").write_bytes(head.ljust(4096, b"\0"))
    for command in ("inspect", "verify"):
        done = uringmig(command, tmp_path / "file")
        assert (done.code, done.err.count("\n")) == (3, 1)
        assert "not a migration stream but " in done.err
        assert kind in done.err


def test_nothing_is_made_up() -> None:
    assert kind_of(b"what is this?") is None
    assert kind_of(b"") is None
    with pytest.raises(FormatError, match=r"not a migration stream at offset 0x0 \(expected QEVM"):
        MainStreamReader().feed(b"what is this?")
