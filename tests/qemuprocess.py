"""A stock QEMU with a QMP socket, driven with the standard library alone; for interop tests.

The guest is started stopped and never runs: it has no code to run. Its memory is a file that the
test fills, so what is saved and what is loaded is known without the guest's help.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BINARY = shutil.which("qemu-system-x86_64")


class QemuProcess:
    """One QEMU; a context manager that quits it.

    Args:
        folder: where its QMP socket goes.
        ram: file that is the guest's memory (shared); its size is the guest's.
        arguments: further command line arguments.
    """

    def __init__(
        self, folder: Path, *, ram: Path, machine: str = "q35", arguments: Sequence[str] = ()
    ) -> None:
        assert BINARY is not None, "qemu-system-x86_64 is not installed"
        path = folder / f"qmp-{time.monotonic_ns()}"
        size = ram.stat().st_size
        memory = f"memory-backend-file,id=pc.ram,share=on,size={size},mem-path={ram}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(60)
        self.process = subprocess.Popen(
            [BINARY, "-accel", "tcg", "-machine", f"{machine},memory-backend=pc.ram",
             "-m", f"{size}B", "-object", memory, "-S", "-display", "none", "-nodefaults",
             "-qmp", f"unix:{path}", *arguments],
        )  # fmt: skip
        with listener:
            self.connection, _ = listener.accept()
        self.lines = self.connection.makefile("rw")
        self.lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> Any:
        """Run a QMP command and return its answer; events are passed over."""
        self.lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def _prepare(self, *, capabilities: Sequence[str], **parameters: object) -> None:
        states = [{"capability": name, "state": True} for name in capabilities]
        self.command("migrate-set-capabilities", capabilities=states)
        given = {name.replace("_", "-"): value for name, value in parameters.items()}
        if given:
            self.command("migrate-set-parameters", **given)

    def _finish(self) -> str:
        while True:
            answer = self.command("query-migrate")
            if answer.get("status") in ("completed", "failed"):
                return str(answer.get("error-desc", answer["status"]))
            time.sleep(0.02)

    def save(self, uri: str, *, capabilities: Sequence[str], **parameters: object) -> None:
        """Migrate to ``uri`` and insist on success."""
        self._prepare(capabilities=capabilities, **parameters)
        self.command("migrate", uri=uri)
        status = self._finish()
        assert status == "completed", status

    def load(self, uri: str, *, capabilities: Sequence[str], **parameters: object) -> str:
        """Migrate in from ``uri``; returns ``completed`` or QEMU's error."""
        self._prepare(capabilities=capabilities, **parameters)
        self.command("migrate-incoming", uri=uri)
        return self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Killed, not asked: nothing of it is needed, and it may be stuck in a failed load.
        self.lines.close()
        self.connection.close()
        self.process.kill()
        self.process.wait()
