"""What a dry run says, a run does: the same refusals, and nothing refused that would be done."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from batchjobs import job, job_ends, make_image, run_jobs, write_jobs
from commandline import PROGRAM, uringmig
from loopdisk import mounted, needs, run
from smallguests import left_in

from uringmig.units import MiB

#: Who may read everything, this program too, and write nothing that is not his.
AS_READER = (
    "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
    "--securebits", "+no_setuid_fixup",
    "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
)  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_image(tmp_path / "vm.mig")
    return tmp_path / "vm.mig"


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("../{name}", "it has a / or begins with . or -"),
        ("{name}/x", "it has a / or begins with . or -"),
        (".{name}", "it has a / or begins with . or -"),
        ("{name}" + "x" * 210, "it is longer than"),
        ("\u00e9" * 110 + "{name}", "it is longer than"),
        ("{name},offset=1", "QEMU cannot load a file with"),
        ("{name}\\n", "characters that cannot be shown"),
        ("", "it is empty"),
    ],
)
@pytest.mark.usefixtures("image")
def test_an_entry_that_no_archive_takes_is_refused_by_both(
    tmp_path: Path, entry: str, why: str
) -> None:
    """With exit code 2 and the same line; the other job of the file is done all the same."""
    own = {"entry": entry} if "\\" not in entry else {}
    text = job("bad", "image = 'vm.mig'", **own)
    if not own:
        text += f'entry = "{entry}"\n'
    path = write_jobs(tmp_path, text, job("good", "image = 'vm.mig'"))
    planned = run_jobs(path, "--dry-run")
    bad, good = planned.result()["plan"]["rows"]
    assert (planned.code, planned.result()["exit_code"]) == (2, 2)
    assert why in bad["problem"]
    assert (bad["exit_code"], good["exit_code"], good["problem"]) == (2, 0, "")
    assert not (tmp_path / "archive").exists()
    ended = run_jobs(path)
    assert ended.code == 2
    ends = job_ends(ended)
    assert (ends["bad"]["error"], ends["bad"]["stage"]) == (bad["problem"], "failed")
    assert ends["good"]["stage"] == "done"


def test_an_entry_that_is_there_is_refused_by_both(tmp_path: Path, image: Path) -> None:
    """Unless its source is what it was: that is no error, and nothing to do."""
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"), defaults='entry = "{name}"')
    assert uringmig("archive", "run", path, "--dry-run").code == 0
    assert run_jobs(path).code == 0
    unchanged = run_jobs(path, "--dry-run")
    assert unchanged.code == 0
    [row] = unchanged.result()["plan"]["rows"]
    assert row["done"]
    make_image(image, seed=1)
    planned = run_jobs(path, "--dry-run")
    ended = run_jobs(path)
    assert (planned.code, ended.code) == (2, 2)
    [row] = planned.result()["plan"]["rows"]
    assert "there already is something of this name" in row["problem"]
    assert job_ends(ended)["a"]["error"] == row["problem"]


@pytest.mark.parametrize(
    ("archive", "code"), [("no/archive", 5), ("vm.mig/archive", 5), ("vm.mig", 2), ("full", 2)]
)
@pytest.mark.usefixtures("image")
def test_an_archive_that_cannot_be_made_is_refused_by_both(
    tmp_path: Path, archive: str, code: int
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'", archive=archive))
    before = left_in(tmp_path)
    planned = uringmig("archive", "run", path, "--dry-run")
    ended = uringmig("archive", "run", path)
    assert (planned.code, ended.code) == (code, code)
    assert planned.err == ended.err
    assert planned.err.count("\n") == 1
    assert left_in(tmp_path) == before


@pytest.mark.usefixtures("image")
def test_an_empty_folder_is_as_good_as_none_to_both(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"))
    assert uringmig("archive", "run", path, "--dry-run").code == 0
    assert left_in(tmp_path / "archive") == []
    assert uringmig("archive", "run", path).code == 0


@pytest.mark.parametrize("there", ["an archive", "an empty folder", "nothing"])
@pytest.mark.usefixtures("image")
def test_a_read_only_disk_is_refused_by_both(tmp_path: Path, there: str) -> None:
    with mounted("ext4", tmp_path, size=64 * MiB) as disk:
        path = write_jobs(tmp_path, job("a", "image = 'vm.mig'", archive=str(disk / "archive")))
        if there == "an archive":
            assert uringmig("archive", "run", path).code == 0
        elif there == "an empty folder":
            (disk / "archive").mkdir()
        run("mount", "-o", "remount,ro", str(disk))
        refused_alike(path, "EROFS")


@pytest.mark.parametrize("there", ["an archive", "an empty folder", "nothing"])
@pytest.mark.usefixtures("image")
def test_a_folder_of_somebody_else_is_refused_by_both(tmp_path: Path, there: str) -> None:
    """Who makes the run may read it, and not write."""
    needs("setpriv")
    path = write_jobs(tmp_path, job("a", "image = 'vm.mig'"))
    if there == "an archive":
        assert uringmig("archive", "run", path).code == 0
    elif there == "an empty folder":
        (tmp_path / "archive").mkdir()
    refused_alike(path, "EACCES", *AS_READER)


def refused_alike(path: Path, why: str, *prefix: str) -> None:
    """Dry run and run end with the same line and code, and change nothing."""
    before = left_in(path.parent)
    ends = [
        subprocess.run(
            [*prefix, *PROGRAM, "archive", "run", str(path), *options],
            capture_output=True,
            text=True,
            check=False,
        )
        for options in (["--dry-run"], [])
    ]
    planned, ended = ends
    assert (planned.returncode, ended.returncode) == (5, 5)
    assert planned.stderr == ended.stderr
    assert why in planned.stderr
    assert planned.stderr.count("\n") == 1
    assert left_in(path.parent) == before
