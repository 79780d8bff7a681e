"""Whole runs of the real program: what is done, what is refused, and what a failure leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from batchjobs import (
    DEPTHS,
    check_archive,
    children,
    first_event,
    job,
    job_ends,
    make_image,
    memory_of,
    run_jobs,
    start_jobs,
    summary_of,
    write_jobs,
)
from commandline import finish, uringmig
from loopdisk import mounted
from smallguests import left_in

from uringmig import MappedRamWriter, RamBlock
from uringmig.archive.coldread import open_cold
from uringmig.contents.opening import open_contents
from uringmig.units import KiB, MiB


def test_both_tiers_are_whole_and_equal(tmp_path: Path) -> None:
    memory = make_image(tmp_path / "vm.mig").tobytes()
    path = write_jobs(
        tmp_path,
        job("hot", "image = 'vm.mig'", vm="vm"),
        job("cold", "image = 'vm.mig'", vm="vm", tier="cold", verify=True),
        defaults='entry = "{name}"',
    )
    report, metrics = tmp_path / "report", tmp_path / "metrics.prom"
    ended = run_jobs(path, "--report", report, "--metrics-file", metrics)
    assert ended.code == 0, ended.err
    ends = job_ends(ended)
    assert [one["stage"] for one in ends.values()] == ["done", "done"]
    entries = check_archive(tmp_path / "archive")
    assert entries["hot"].content_digest == entries["cold"].content_digest
    assert (entries["hot"].condition, entries["cold"].condition) == ("unchecked", "good")
    with open_contents(entries["hot"].image) as contents:
        assert memory_of(contents)["pc.ram"] == memory
    with open_cold(Path(entries["cold"].image)) as contents:
        assert memory_of(contents)["pc.ram"] == memory
    (text,) = report.glob("*.md")
    assert "2 done" in text.read_text()
    (data,) = report.glob("*.json")
    assert msgspec.json.decode(data.read_bytes())["done"] == 2
    page = metrics.read_text()
    assert 'uringmig_job_success{job="hot"} 1\n' in page
    assert "uringmig_run_ended 1\n" in page
    assert f'uringmig_job_memory_bytes{{job="cold"}} {16 * MiB}\n' in page


def test_json_lines_tell_every_stage(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    ended = run_jobs(write_jobs(tmp_path, job("a", "image = 'vm.mig'")))
    events = ended.events()
    stages = [one["stage"] for one in events if one["event"] == "job"]
    assert stages == ["running", "done"]
    assert events[-1]["event"] == "summary"
    progress = [one for one in events if one["event"] == "progress"]
    assert progress
    assert progress[-1]["share"] == 1.0


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), job("b", "image = 'none.mig'"))
    before = left_in(tmp_path)
    ended = run_jobs(path, "--dry-run")
    assert ended.code == 1
    assert left_in(tmp_path) == before
    first, second = ended.result()["plan"]["rows"]
    assert first["memory_bytes"] == 16 * MiB
    assert first["stored_bytes"] <= first["file_bytes"] <= 16 * MiB + 8 * MiB
    assert first["kind"] == "mapped-ram"
    assert "ENOENT" in second["problem"]
    people = uringmig("archive", "run", path, "--dry-run")
    assert "needed" in people.out
    assert "free" in people.out


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, size=32 * MiB) as disk:
        make_image(tmp_path / "vm.mig", size=24 * MiB, pattern="dense")
        path = write_jobs(
            tmp_path,
            *(job(name, "image = 'vm.mig'", archive=str(disk / "archive")) for name in "ab"),
        )
        for option in ("--dry-run", "--quiet"):
            ended = uringmig("archive", "run", path, option)
            assert ended.code == 5
            assert f"{disk}/archive: the plan needs" in ended.err
        assert not list((disk / "archive").glob("*.mig*"))


def test_a_disk_that_fills_half_way_harms_no_other(tmp_path: Path) -> None:
    """The plan fitted, then somebody else took the space: one clear line, nothing half-made."""
    make_image(tmp_path / "vm.mig", size=24 * MiB, pattern="dense")
    with mounted("ext4", tmp_path, size=64 * MiB) as disk:
        path = write_jobs(
            tmp_path,
            job("full", "image = 'vm.mig'", archive=str(disk / "archive"), rate="6M"),
            job("good", "image = 'vm.mig'"),
        )
        process = start_jobs(path)
        first_event(process, "progress", job="full")
        taken = disk / "taken"
        with taken.open("wb") as file:
            try:
                while file.write(bytes(MiB)):
                    file.flush()
            except OSError:
                pass
        ended = finish(process)
        ends = job_ends(ended)
        assert ended.code == 5
        assert (ends["full"]["stage"], ends["good"]["stage"]) == ("failed", "done")
        assert "ENOSPC" in ends["full"]["error"]
        assert [line for line in ended.err.splitlines() if "full" in line] == [
            f"uringmig: job full failed: {ends['full']['error']}"
        ]
        taken.unlink()
        assert not check_archive(disk / "archive")
    assert len(check_archive(tmp_path / "archive")) == 1


def test_hostile_sources_each_have_their_own_line(tmp_path: Path) -> None:
    make_image(tmp_path / "good.mig")
    whole = (tmp_path / "good.mig").read_bytes()
    (tmp_path / "cut.mig").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mig").write_bytes(bytes(range(256)) * 4096)
    bent = bytearray(whole)
    bent[whole.index(b"pc.ram") - 1] = 200
    (tmp_path / "bent.mig").write_bytes(bent)
    names = ("good", "cut", "noise", "bent")
    path = write_jobs(tmp_path, *(job(name, f"image = '{name}.mig'") for name in names))
    ended = run_jobs(path)
    ends = job_ends(ended)
    assert ended.code == 3
    assert ends["good"]["stage"] == "done"
    for name in names[1:]:
        assert ends[name]["stage"] == "failed"
        assert ends[name]["kind"] in ("FormatError", "MismatchError")
        assert ends[name]["exit_code"] == 3
        assert f"uringmig: job {name} failed: {ends[name]['error']}" in ended.err.splitlines()
    assert len(check_archive(tmp_path / "archive")) == 1


def test_a_qmp_peer_that_hangs_is_given_up(tmp_path: Path) -> None:
    """It takes the connection and never says a word: its job ends by its limit."""
    make_image(tmp_path / "vm.mig")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(8)
        path = write_jobs(
            tmp_path,
            job("hangs", "qmp = 'qmp'", timeout="1s", retries=3),
            job("good", "image = 'vm.mig'"),
        )
        ended = run_jobs(path)
    ends = job_ends(ended)
    assert ended.code == 4
    assert (ends["hangs"]["stage"], ends["good"]["stage"]) == ("failed", "done")
    assert (ends["hangs"]["kind"], ends["hangs"]["attempts"]) == ("Timeout", 1)
    assert "given up after 1.0 s" in ends["hangs"]["error"]


def test_what_may_pass_is_tried_again_and_what_cannot_is_not(tmp_path: Path) -> None:
    """Nobody listens on the socket, as when QEMU is restarted: tried again; no file there: not."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
    path = write_jobs(
        tmp_path,
        job("busy", "qmp = 'qmp'", retries=1),
        job("gone", "qmp = 'none'", retries=1),
    )
    ended = run_jobs(path)
    ends = job_ends(ended)
    assert ended.code == 4
    assert (ends["busy"]["attempts"], ends["gone"]["attempts"]) == (2, 0)
    assert ends["busy"]["kind"] == "BusyError"
    assert "attempt 1: " in ends["busy"]["notes"][0]
    assert "trying again" in ended.err


def test_pages_of_the_previous_image_are_shared(tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path, size=256 * MiB) as disk:
        for number in range(2):
            memory = make_image(tmp_path / "vm.mig", pattern="dense", seed=0)
            if number:
                memory[:MiB] ^= 1
                with MappedRamWriter(tmp_path / "vm.mig", [RamBlock("pc.ram", memory)]) as writer:
                    writer.write_all()
                    writer.finish()
            path = write_jobs(
                tmp_path, job("vm", "image = 'vm.mig'", dedup=True, archive=str(disk / "archive")),
                defaults=f'entry = "vm-{number}"',
            )  # fmt: skip
            ended = run_jobs(path)
            assert ended.code == 0, ended.err
        archived = job_ends(ended)["vm"]["archived"]
        assert 14 * MiB <= archived["shared_bytes"] <= 15 * MiB + 128 * KiB
        assert len(check_archive(disk / "archive")) == 2


def test_without_reflink_every_night_has_its_image_and_the_reason_is_told(tmp_path: Path) -> None:
    """Dedup is an optimisation: the plan says beforehand that it is not to be had, no job fails."""
    make_image(tmp_path / "vm.mig")
    with mounted("ext4", tmp_path, size=128 * MiB) as disk:
        for number in range(3):
            path = write_jobs(
                tmp_path, job("vm", "image = 'vm.mig'", dedup=True, archive=str(disk / "archive")),
                defaults=f'entry = "vm-{number}"',
            )  # fmt: skip
            planned = uringmig("archive", "run", "--dry-run", path)
            assert planned.code == 1, planned.err
            assert "nothing will be shared" in planned.err
            assert "has no reflink" in planned.err
            ended = run_jobs(path)
            assert ended.code == 1, ended.err
            [warning] = job_ends(ended)["vm"]["warnings"]
            assert "has no reflink" in warning
        assert len(check_archive(disk / "archive")) == 3


def test_an_unchanged_source_is_not_copied_again(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), defaults='entry = "{name}"')
    assert run_jobs(path).code == 0
    again = run_jobs(path)
    assert again.code == 0
    assert job_ends(again)["a"]["stage"] == "skipped"
    make_image(tmp_path / "vm.mig", seed=1)
    changed = run_jobs(path)
    assert changed.code == 2
    assert "there already is something of this name" in job_ends(changed)["a"]["error"]
    assert len(check_archive(tmp_path / "archive")) == 1


def test_bad_job_files(tmp_path: Path) -> None:
    twice = write_jobs(
        tmp_path, job("a", "image = 'x'", entry="e"), job("b", "image = 'x'", entry="e")
    )
    assert "have the same entry 'e'" in uringmig("archive", "run", twice).err
    path = tmp_path / "bad.toml"
    for data, what in (
        (b"\xff", "not UTF-8 at byte 0"),
        (b"jobs = 3", "jobs: expected `array`, got `int`"),
    ):
        path.write_bytes(data)
        ended = uringmig("archive", "run", path)
        assert ended.code == 2
        assert f"{path}: {what}" in ended.err
    ended = uringmig("archive", "run", tmp_path / "none.toml")
    assert ended.code == 2
    assert "cannot read the job file" in ended.err


def test_another_host_s_job_needs_a_scheduler(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(
        tmp_path,
        job("there", "image = 'vm.mig'", host="far-away"),
        job("here", "image = 'vm.mig'"),
    )
    ends = job_ends(run_jobs(path))
    assert (ends["there"]["stage"], ends["here"]["stage"]) == ("failed", "done")
    assert "only --scheduler reaches" in ends["there"]["error"]


def test_a_second_run_is_locked_out(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'", rate="512K"))
    process = start_jobs(path)
    first_event(process, "job", stage="running")
    ended = uringmig("archive", "run", path)
    assert ended.code == 5
    assert "being written by another process" in ended.err
    assert uringmig("archive", "list", tmp_path / "archive").code == 0
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_cleanly_and_the_next_run_goes_on(
    tmp_path: Path, number: int, to_all: bool
) -> None:
    """A terminal signals the runner alone, a service manager every process."""
    make_image(tmp_path / "vm.mig")
    path = write_jobs(
        tmp_path,
        job("quick", "image = 'vm.mig'"),
        job("slow", "image = 'vm.mig'", rate="1M"),
    )
    process = start_jobs(path)
    first_event(process, "job", job="quick", stage="done")
    first_event(process, "progress", job="slow")
    for worker in children(process.pid) if to_all else []:
        os.kill(worker, number)
    process.send_signal(number)
    ended = finish(process)
    assert ended.code == 128 + number
    ends = job_ends(ended)
    assert (ends["quick"]["stage"], ends["slow"]["stage"]) == ("done", "stopped")
    assert len(check_archive(tmp_path / "archive")) == 1
    again = run_jobs(path)
    assert again.code == 0
    assert summary_of(again)["resumed"]
    assert {name: one["stage"] for name, one in job_ends(again).items()} == {
        "quick": "skipped",
        "slow": "done",
    }
    assert len(check_archive(tmp_path / "archive")) == 2


def test_a_second_signal_ends_at_once_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("slow", "image = 'vm.mig'", rate="2M"))
    process = start_jobs(path)
    first_event(process, "progress", job="slow")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    again = run_jobs(path)
    assert again.code == 0
    assert summary_of(again)["resumed"]
    assert len(check_archive(tmp_path / "archive")) == 1


def test_a_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.settimeout(60)
        heard: list[str] = []

        def listen() -> None:
            while "STOPPING=1" not in heard:
                heard.append(server.recv(4 * KiB).decode())

        thread = threading.Thread(target=listen)
        thread.start()
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")
        assert run_jobs(path).code == 0
        thread.join()
    assert heard.index("READY=1") < heard.index("STOPPING=1")
    assert "WATCHDOG=1" in heard
    assert any(line.startswith("STATUS=0 of 1 jobs through") for line in heard)


def test_a_table_on_a_terminal(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(
        tmp_path, job("a", "image = 'vm.mig'", rate="16M"), job("bad", "image = 'none'")
    )
    command = f"stty cols 120 rows 40; {sys.executable} -m uringmig archive run {path}"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, text=True, check=False
    )
    assert "disk " in done.stdout
    assert "MB/s" in done.stdout
    assert "1 running" in done.stdout
    assert "job bad failed: " in done.stdout
    assert "2 jobs: 1 done, 1 failed" in done.stdout


def test_measured_where_the_job_file_says_nothing(tmp_path: Path) -> None:
    make_image(tmp_path / "vm.mig")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), head="")
    assert DEPTHS not in path.read_text()
    ended = run_jobs(path)
    assert ended.code == 0
    depths = summary_of(ended)["disk_depths"]
    assert depths
    assert all(4 <= depth <= 64 for depth in depths.values())


def test_a_disk_that_cannot_be_measured_is_said_once(tmp_path: Path) -> None:
    """By whoever reads lines, JSON or the report: how much is asked of it was not found out."""
    make_image(tmp_path / "vm.mig", size=MiB)
    with mounted("ext4", tmp_path, size=16 * MiB) as disk:

        def jobs(names: str) -> Path:
            # Other names for the second run: within one second its entries would be there already.
            said = [job(name, "image = 'vm.mig'", archive=str(disk / "a")) for name in names]
            return write_jobs(tmp_path, *said, head="")

        ended = run_jobs(jobs("ab"), "--report", tmp_path)
        people = uringmig("archive", "run", jobs("cd"))
    assert (ended.code, people.code) == (0, 0)
    [note] = [one for one in summary_of(ended)["notes"] if "could not be measured" in one]
    assert "ENOSPC" in note
    assert "32 requests" in note
    assert people.err.count("could not be measured") == 1
    assert (next(tmp_path.glob("*.md"))).read_text().count("could not be measured") == 1


def test_a_stated_depth_holds_for_a_job_whose_source_nobody_could_look_at(tmp_path: Path) -> None:
    """A guest that is taken when the plan is made may be there when its job begins."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))  # and nobody listens: that may pass
        path = write_jobs(tmp_path, job("vm", "qmp = 'qmp'"), head='[devices."."]\ndepth = 3\n')
        ended = run_jobs(path)
    assert job_ends(ended)["vm"]["attempts"] >= 1
    assert list(summary_of(ended)["disk_depths"].values()) == [3]
