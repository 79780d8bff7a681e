"""The pool of worker processes at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from uringmig.batch import pool
from uringmig.batch.job import parse_jobs
from uringmig.batch.messages import Examine, Outcome

#: Answers one order, and then does not notice that its socket has closed.
STUCK = """
import json, socket, sys, time
connection = socket.socket(fileno=int(sys.argv[1]))
order = json.loads(connection.recv(1 << 16))
answer = {"type": "outcome", "key": order["key"], "ending": "stopped"}
connection.sendall(json.dumps(answer).encode() + b"\\n")
time.sleep(1000)
"""


def test_idle_workers_that_do_not_leave_share_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many: their time is counted from the closing, and not from the last one's end."""
    limit = 0.5
    monkeypatch.setattr(pool, "_ENDING_SECONDS", limit)
    waits: list[float] = []
    wait = subprocess.Popen.wait

    def noted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        waits.append(timeout or 0.0)
        return wait(process, timeout)

    job = parse_jobs(
        f'[[jobs]]\nname = "a"\narchive = "/a"\nsource = {{ image = "{tmp_path}/vm.mig" }}\n',
        path="/j.toml",
    ).jobs[0]
    workers = pool.LocalPool(4, command=(sys.executable, "-c", STUCK))
    for number in range(4):
        workers.submit(Examine(key=str(number), job=job), host=None)
    heard: set[str] = set()
    while len(heard) < 4:
        heard |= {one.key for one in workers.poll(1.0) if isinstance(one, Outcome)}
    processes = [worker.process for worker in workers._workers]
    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    workers.close()
    assert limit / 2 < sum(waits) <= limit
    assert {process.returncode for process in processes} == {-9}
