"""The program as a user who may do nothing that is not everybody's, wherever it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from commandline import Ended

import uringmig

#: uid and gid that no file of a test belongs to unless it is given to them.
NOBODY = 65534
#: The program's folders may lie where only root looks: in this run they are mounted elsewhere too.
_SCRIPT = """
room=$1 name=$2
mount --bind "$3" "$room/python" || exit 99
mount --bind "$4" "$room/program" || exit 99
mount --bind "$5" "$room/libraries" || exit 99
export PYTHONHOME="$room/python" LD_LIBRARY_PATH="$room/python/lib"
export PYTHONPATH="$room/program:$room/libraries" HOME="$room/home" PYTHONDONTWRITEBYTECODE=1
shift 5
cd /
exec setpriv --reuid 65534 --regid 65534 --clear-groups $CAPABILITIES -- \\
    "$room/python/bin/$name" -m uringmig "$@"
"""


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that everybody may search; another run of pytest closes those of pytest again."""
    if os.geteuid() != 0:
        pytest.skip("another user can only be had by root")
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def let_everybody_search(folder: Path) -> None:
    """Open a folder of pytest's, which is its owner's only, and those above it."""
    for one in (folder, *folder.parents):
        if one.stat().st_uid == os.geteuid() and one.stat().st_mode & 0o005 != 0o005:
            one.chmod(0o755)


def as_nobody(folder: Path, *arguments: object, capabilities: Sequence[str] = ()) -> Ended:
    """Run the program to its end.

    Args:
        folder: a `shared_folder`.
        arguments: of the program.
        capabilities: that it has nevertheless, for example ``sys_ptrace``.
    """
    room = folder / "as-nobody"
    for name in ("python", "program", "libraries", "home"):
        (room / name).mkdir(parents=True, exist_ok=True)
    program = Path(uringmig.__file__).parents[1]
    libraries = Path(np.__file__).parents[1]
    name = Path(sys.executable).resolve().name
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _SCRIPT, "sh",
         room, name, sys.base_prefix, program, libraries, *map(str, arguments)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "CAPABILITIES": _options_of(capabilities)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def _options_of(capabilities: Sequence[str]) -> str:
    """Of setpriv(1)."""
    names = ",".join(f"+{name}" for name in capabilities)
    return f"--inh-caps {names} --ambient-caps {names}" if names else ""
