"""Files and folders of another user: one line that says which and why, and 5; never a traceback.

Whether something is there cannot even be asked in a folder that may not be searched.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from batchjobs import job, make_image, run_jobs, write_jobs
from otheruser import NOBODY, as_nobody, shared_folder

from uringmig.units import MiB


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """Root's folders and files, and ``open``, which is the other user's."""
    with shared_folder() as folder:
        fill(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "closed/qmp"))
            server.listen()
            (folder / "closed").chmod(0o700)
            yield folder


def fill(folder: Path) -> None:
    """Make what is looked at here."""
    closed = folder / "closed"
    closed.mkdir()
    make_image(closed / "vm.mig", size=MiB)
    assert run_jobs(write_jobs(closed, job("a", "image = 'vm.mig'", entry="a"))).code == 0
    (closed / "profile.json").write_text("{}")
    open_ = folder / "open"
    open_.mkdir()
    os.chown(open_, NOBODY, NOBODY)
    shutil.copy(closed / "vm.mig", open_ / "secret.mig")
    (open_ / "secret.mig").chmod(0o600)
    defaults = f"archive = '{closed}/archive'"
    jobs = f"[defaults]\n{defaults}\n" + job("b", f"image = '{open_}/secret.mig'")
    (open_ / "theirs.toml").write_text(jobs)
    (open_ / "theirs.toml").chmod(0o600)
    (open_ / "jobs.toml").write_text(jobs)
    (open_ / "here.toml").write_text(jobs.replace(str(closed), str(open_)))
    # Those may be seen, by names; in the second, nothing more.
    for name, mode in (("seen", 0o755), ("listed", 0o744)):
        shutil.copytree(closed / "archive", folder / name)
        (folder / name).chmod(mode)


@pytest.mark.parametrize(
    ("code", "command"),
    [
        (5, "inspect closed/vm.mig"),
        (5, "inspect open/secret.mig"),
        (5, "inspect open/none"),
        (5, "inspect open"),
        (5, "verify closed/vm.mig"),
        (5, "verify open/secret.mig"),
        (5, "verify open/none"),
        (5, "verify open"),
        (4, "load open/secret.mig --qmp closed/qmp"),
        (4, "save open/out --qmp closed/qmp"),
        (5, "save open/out --qmp closed/qmp --profile-file closed/profile.json"),
        (5, "save open/out --qmp closed/qmp --profile-file LONG"),
        (5, "bench open --out closed/profile.json"),
        (5, "bench closed --out open/profile.json"),
        (2, "archive run closed/jobs.toml"),
        (2, "archive run open/theirs.toml"),
        (2, "archive run open"),
        (5, "archive run open/jobs.toml"),
        (5, "archive run open/jobs.toml --dry-run"),
        (5, "archive run open/here.toml"),
        (1, "archive run open/here.toml --dry-run"),
        (2, "archive list open/theirs.toml"),
        (5, "archive list open/jobs.toml"),
        (5, "archive list LONG"),
        (5, "archive list closed/none/archive"),
        (2, "archive restore seen a open/out"),
        (5, "archive reindex seen"),
        (5, "archive prune seen --keep-last 1 --delete"),
        (5, "archive reindex listed"),
        *(
            (5, f"archive {what} closed/archive{options}")
            for what, options in (
                ("list", ""), ("show", " a"), ("verify", ""), ("prune", " --keep-last 1"),
                ("prune", " --keep-last 1 --delete"), ("restore", " a open/out"), ("reindex", ""),
            )
        ),
    ],
)  # fmt: skip
def test_what_may_not_be_looked_at_is_one_line(room: Path, code: int, command: str) -> None:
    roots = ("open", "closed", "seen", "listed")
    words = [
        str(room / word) if word.split("/")[0] in roots else word
        for word in command.replace("LONG", "/" + "x" * 300).split()
    ]
    done = as_nobody(room, *words)
    assert done.code == code, done.err
    lines = done.err.splitlines()
    assert len(lines) == (code != 0), lines
    assert all(line.startswith("uringmig: ") for line in lines)


@pytest.mark.parametrize("what", ["list", "show", "verify", "prune", "restore"])
@pytest.mark.parametrize("where", ["seen", "listed"])
def test_an_archive_of_another_user(room: Path, what: str, where: str) -> None:
    """Its manifests may not be read: each is told, whatever is asked for."""
    options: dict[str, list[object]] = {
        "show": ["a"], "prune": ["--keep-last", 1], "restore": ["a", room / "open/out"],
    }  # fmt: skip
    done = as_nobody(room, "archive", what, room / where, *options.get(what, []))
    assert done.code == (2 if what in ("show", "restore") else 1), done.err
    assert f"{room / where}/a." in done.err
    assert "cannot " in done.err


def test_a_run_goes_on_without_files_beside_it(room: Path) -> None:
    """Metrics, report and profile are courtesies, also where nobody may look for them."""
    closed, open_ = room / "closed", room / "open"
    image = open_ / "own.mig"
    make_image(image, size=MiB)
    for own in open_.glob("own.mig*"):
        os.chown(own, NOBODY, NOBODY)
    path = write_jobs(open_, job("own", f"image = '{image}'"))
    done = as_nobody(
        room, "archive", "run", path, "--metrics-file", closed / "m.prom",
        "--report", closed / "report", "--profile-file", closed / "profile.json",
    )  # fmt: skip
    assert done.code == 1, done.err
    assert all(line.startswith("uringmig: warning: ") for line in done.err.splitlines())
    assert str(closed / "profile.json") in done.err
    assert str(closed / "m.prom") in done.err
    assert str(closed / "report") in done.err
