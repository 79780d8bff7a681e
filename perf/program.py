"""The command line as a rival: `uringmig save` as a whole process, from its start to its exit."""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from perf.observe import ProcessMemory, Watch
from perf.rivals import ROOT, Group, Kind, Measured, Task, machine_of
from uringmig.errors import PeerError
from uringmig.options import WriteOptions

_DEFAULTS: Final = WriteOptions()
#: The console script of the interpreter that measures.
PROGRAM: Final = Path(sys.executable).with_name("uringmig")


def compile_package() -> None:
    """Do what pip does for a package that is installed, and a checkout may lack.

    Where Python may not write what it has compiled, or a module was edited since, each start would
    compile it anew, and that would be measured.
    """
    compileall.compile_dir(ROOT / "uringmig", quiet=1)


@dataclass(frozen=True, slots=True)
class Program:
    """What somebody waits for who types the command; every option is the default."""

    name: str = "uringmig save, the process"
    group: Group = "uringmig"
    kind: Kind = "save"

    @property
    def settings(self) -> dict[str, str | int]:
        """The defaults; its route tells it from a writer whose clock begins when it is ready."""
        return {
            "channels": _DEFAULTS.channels,
            "depth": _DEFAULTS.depth,
            "block_size": _DEFAULTS.block_size,
            "engine": "io_uring",
            "direct": _DEFAULTS.direct,
            "manifest": int(_DEFAULTS.manifest),
            "route": "program",
            "rate": _DEFAULTS.rate,
            "bridge": _DEFAULTS.bridge,
        }

    def run(self, task: Task) -> Measured:
        """Save a stopped machine once."""
        options = [] if task.direct else ["--direct", "off"]
        with machine_of(task) as machine:
            command = [
                str(PROGRAM),
                "save",
                "--json",
                *options,
                "--qmp",
                str(machine.qmp_path),
                str(task.image),
            ]
            watch = Watch(task.device)
            watch.start(None)
            used = os.times()
            began = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.monotonic() - began
            now = os.times()
        if done.returncode:
            raise PeerError(f"uringmig save ended with {done.returncode}: {done.stderr.strip()}")
        spent = now.children_user - used.children_user, now.children_system - used.children_system
        return Measured(
            completed_s=seconds,
            durable_s=seconds,
            costs=watch.stop(cpu=spent),
            memory=ProcessMemory(peak=0, anonymous=0),
            moved_bytes=json.loads(done.stdout.splitlines()[-1])["image"]["written_bytes"],
        )
