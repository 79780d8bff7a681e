"""The harness on tiny guests: real QEMU, real fio, a real disk; and rivals that misbehave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from loopdisk import needs

from perf.observe import ProcessMemory, Watch
from perf.programme import Contest, TargetName, choose
from perf.results import Results, Sample, figures, load
from perf.rivals import ROOT, Group, Kind, Measured, Ours, Rival, Task
from perf.session import RivalFailed, Session
from perf.workloads import SHM, WORKLOADS
from uringmig.errors import StorageError
from uringmig.units import MiB

SMALL = 32 * MiB


def session(folder: Path, lines: list[str] | None = None) -> Session:
    said: list[str] = [] if lines is None else lines
    return Session(
        folder=folder / "disk", out=folder / "out", seed=5, say=said.append, settle_s=0.0
    )


def contest(
    *rivals: Rival, workload: str = "dense", rounds: int = 1, target: TargetName = "disk"
) -> Contest:
    return Contest(target, WORKLOADS[workload].resized(SMALL), "save", rivals, rounds)


def left_behind() -> list[Path]:
    return list(SHM.glob(f"uringmig-perf-{os.getpid()}-*"))


@dataclass(frozen=True)
class Broken:
    """A rival whose disk is full."""

    name: str = "broken"
    group: Group = "uringmig"
    kind: Kind = "save"

    @property
    def settings(self) -> dict[str, str | int]:
        return {}

    def run(self, task: Task) -> Measured:
        task.image.write_bytes(b"half")
        raise StorageError("write failed", errno=28, path=str(task.image))


@dataclass(frozen=True)
class Quick:
    """A rival that writes one byte, while others take ``steal_s`` from it."""

    name: str
    steal_s: float = 0.0
    group: Group = "uringmig"
    kind: Kind = "save"

    @property
    def settings(self) -> dict[str, str | int]:
        return {}

    def run(self, task: Task) -> Measured:
        assert not task.image.exists(), "every rival makes a fresh file"
        task.image.write_bytes(b"x")
        watch = Watch(None)
        watch.start(None)
        costs = replace(watch.stop(cpu=(0.1, 0.1)), steal_s=self.steal_s)
        memory = ProcessMemory(peak=1, anonymous=1)
        return Measured(completed_s=1.0, durable_s=1.0, costs=costs, memory=memory, moved_bytes=1)


def test_a_slower_rival_is_reported_slower_by_what_it_is(tmp_path: Path) -> None:
    # Held to a rate so low that the machine's own speed does not matter.
    fast = Ours(label="fast", rate=64 * MiB)
    slow = Ours(label="slow", rate=16 * MiB)
    results = session(tmp_path).run([contest(fast, slow, rounds=2)])
    rows = {row.rival: row for row in figures(results.samples)}
    ratio = rows[slow.name].durable_s / rows[fast.name].durable_s
    # The first burst is free of the limit, hence not exactly 4.
    assert 3.0 < ratio < 5.0
    assert [row.rival for row in figures(results.samples)] == [fast.name, slow.name]


def test_a_failing_rival_fails_the_run_with_its_cause(tmp_path: Path) -> None:
    lines: list[str] = []
    running = session(tmp_path, lines)
    first = contest(Ours())
    with pytest.raises(RivalFailed, match=r"disk/zero: broken failed: .*No space left"):
        running.run([first, contest(Broken(), workload="zero")])
    kept = load(tmp_path / "out").samples
    assert [sample.rival for sample in kept] == [Ours().name], "what was measured before is kept"
    assert list((tmp_path / "disk").iterdir()) == []
    assert left_behind() == []


def test_a_child_that_cannot_says_why(tmp_path: Path) -> None:
    impossible = Ours(channels=300)
    with pytest.raises(RivalFailed, match=r"300x8x1M failed: StateError: channels must be"):
        session(tmp_path).run([contest(impossible)])


def test_rounds_are_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    rivals = [Quick(f"rival {number}") for number in range(4)]
    orders = []
    for folder in ("a", "b"):
        results = session(tmp_path / folder).run([contest(*rivals, rounds=2)])
        orders.append([(sample.round, sample.rival) for sample in results.samples])
    assert orders[0] == orders[1]
    assert orders[0][:4] != orders[0][4:], "each round has an order of its own"


def test_disturbed_runs_are_repeated_and_kept(tmp_path: Path) -> None:
    running = replace(session(tmp_path), repeat_disturbed=2)
    results = running.run([contest(Quick("robbed", steal_s=9.0), Quick("calm"))])
    attempts = {
        name: [sample.attempt for sample in results.samples if sample.rival == name]
        for name in ("robbed", "calm")
    }
    assert attempts == {"robbed": [1, 2, 3], "calm": [1]}
    [row] = [row for row in figures(results.samples) if row.rival == "robbed"]
    assert (row.runs, row.disturbed) == (1, 3)


def test_holes_that_somebody_allocated_are_made_anew(qemu: str, tmp_path: Path) -> None:
    contests = choose(
        "quick", workloads=["idle"], rivals=["uringmig io_uring 2*", "qemu*"], memory_bytes=SMALL,
        rounds=2,
    )  # fmt: skip
    results = session(tmp_path).run(contests)
    grown = {sample.group: sample.ram_after - sample.ram_before for sample in results.samples}
    assert grown["uringmig"] == 0
    assert grown["qemu"] > SMALL // 2
    assert len({sample.ram_before for sample in results.samples}) == 1, "all had the same start"


#: One or two of every kind, in every contest.
EXAMPLES = (
    "uringmig io_uring 2x8x1M", "uringmig io_uring 1x16x1M*", "uringmig io_uring 1x[14]x*4M",
    "uringmig io_uring 1x[14]x256K", "uringmig memory*", "uringmig null 1x16*",
    "uringmig outside*", "qemu plain", "qemu mapped-ram multifd x2 direct",
    "fio io_uring 1x16x1M sized", "uringmig load*", "uringmig reader 2x8*",
)  # fmt: skip


def run_perf(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perf", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_quick_from_end_to_end(qemu: str, tmp_path: Path) -> None:
    needs("mkfs.xfs", "losetup")
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    out = tmp_path / "out"
    done = run_perf(
        *["run", "--quick", "--memory", "16M", "--rounds", "1", "--seed", "3", "--out", str(out)],
        *["--folder", str(tmp_path / "disk"), "--settle", "0", "--rivals", ",".join(EXAMPLES)],
    )
    assert done.returncode == 0, done.stderr
    results = load(out)
    assert {sample.target for sample in results.samples} == {"disk", "tmpfs", "xfs-loop"}
    planned = sum(len(one.rivals) for one in choose("quick", rivals=EXAMPLES))
    assert len(results.samples) == planned
    for sample in results.samples:
        check_sample(sample)
    assert list((tmp_path / "disk").iterdir()) == []
    assert not list(SHM.glob("perf-*")), "the loop device's file is gone"
    check_commands(out, results)


def check_sample(sample: Sample) -> None:
    where = f"{sample.benchmark}: {sample}"
    assert 0 < sample.completed_s <= sample.durable_s, where
    assert sample.memory_bytes == 16 * MiB, where
    if sample.workload in ("dense", "grid"):
        assert sample.moved_bytes >= 16 * MiB, where
        assert sample.cpu_s >= 0, where
    if sample.group in ("uringmig", "qemu") and sample.kind == "save":
        assert sample.cpu_s > 0, where
        assert sample.anonymous_bytes > MiB, where


def check_commands(out: Path, results: Results) -> None:
    assert run_perf("report", str(out)).returncode == 0
    assert (out / "report.html").stat().st_size > 100_000
    shown = run_perf("table", str(out)).stdout
    assert f"seed {results.seed}" in shown
    assert "| save: fragmented 16.0 MiB, disk |" in shown
    modelled = run_perf("model", str(out))
    assert modelled.returncode == 0, modelled.stderr
    assert "| fragmented: uringmig io_uring 2x8x1M | " in modelled.stdout
    suite = str(out / "pyperf.json")
    same = run_perf("compare", suite, suite)
    assert same.returncode == 0, same.stderr
    assert len(same.stdout.splitlines()) == len({s.benchmark for s in results.samples})


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "--quick", "--full"], 2, "exclude"),
        (["run", "--workloads", "busy"], 2, "no workload 'busy'"),
        (["run", "--memory", "lots"], 2, "not a size"),
        (["report", "/nonexistent"], 3, "no results of perf"),
        (["compare", "/nonexistent", "/nonexistent"], 3, "not a suite"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], code: int, words: str) -> None:
    done = run_perf(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_run_has_an_exit_code_and_a_cause(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = run_perf(
        *["run", "--memory", "16M", "--rounds", "1", "--out", str(tmp_path / "out")],
        *[
            "--folder",
            str(blocked),
            "--settle",
            "0",
            "--workloads",
            "zero",
            "--rivals",
            "uringmig*",
        ],
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(blocked) in done.stderr
