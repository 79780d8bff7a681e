"""The commands on an archive, as an operator meets them: what they say, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from archiveentries import add_entry, put_damage
from commandline import uringmig
from smallguests import left_in

from uringmig.archive.damagenotes import Damage
from uringmig.archive.directory import Archive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed archive: three entries of one machine, one of another."""
    with Archive.open(tmp_path / "a", write=True) as archive:
        for number in (1, 2, 3):
            add_entry(archive, f"web1-{number}", created=f"2026-01-0{number}T03:00:00+00:00")
        add_entry(archive, "db1", vm="db1", created="2026-01-02T04:00:00+00:00")
    return tmp_path / "a"


def test_list_is_a_table_and_json(folder: Path) -> None:
    done = uringmig("archive", "list", folder)
    assert done.code == 0
    title, *rows, last = done.out.splitlines()
    assert title.split() == ["NAME", "VM", "TIER", "CREATED", "MEMORY", "FILE", "STATE"]
    assert [row.split()[0] for row in rows] == ["web1-1", "web1-2", "db1", "web1-3"]
    assert last.startswith("4 entries")
    [result] = uringmig("archive", "list", folder, "--vm", "db1", "--json").events()
    assert (result["command"], result["exit_code"]) == ("archive list", 0)
    [entry] = result["entries"]
    assert (entry["name"], entry["tier"], entry["image"]) == ("db1", "hot", f"{folder}/db1.mig")
    assert uringmig("archive", "list", folder, "--names", "--vm", "db1").out == "db1\n"


def test_empty_and_missing_archives(tmp_path: Path) -> None:
    Archive.open(tmp_path / "a", write=True).close()
    assert uringmig("archive", "list", tmp_path / "a").out == f"{tmp_path}/a: no entries\n"
    missing = uringmig("archive", "list", tmp_path / "b")
    assert (missing.code, missing.out) == (2, "")
    assert missing.err == f"uringmig: {tmp_path}/b: no archive: there is no such folder\n"


def test_show_tells_where_an_entry_is_damaged(folder: Path) -> None:
    with Archive.open(folder, write=True) as archive:
        at = "2026-02-01T00:00:00+00:00"
        put_damage(archive, "db1", Damage(1, "ramblock 'pc.ram': chunk 1 differs", at))
    done = uringmig("archive", "show", folder, "db1")
    assert done.code == 0
    assert "source    mapped-ram /var/web1.mig" in done.out
    assert "state     damaged" in done.out
    assert done.out.endswith("damaged: ramblock 'pc.ram': chunk 1 differs\n")
    [result] = uringmig("archive", "show", folder, "db1", "--json").events()
    assert result["damage"] == [
        {"chunk": 1, "text": "ramblock 'pc.ram': chunk 1 differs", "found_at": at}
    ]
    assert result["entry"]["damaged_chunks"] == 1
    nobody = uringmig("archive", "show", folder, "nobody")
    assert (nobody.code, nobody.err.count("\n")) == (2, 1)


def test_prune_is_dry_unless_asked(folder: Path) -> None:
    before = left_in(folder)
    dry = uringmig("archive", "prune", folder, "--keep-last", 1)
    assert dry.code == 0
    decided = [line.split("  ")[:2] for line in dry.out.splitlines()[:-1]]
    assert [[word.strip() for word in words if word] for words in decided] == [
        ["to remove", "web1-1"], ["to remove", "web1-2"], ["keep"], ["keep"]
    ]  # fmt: skip
    assert "nothing was removed, --delete does it" in dry.out
    assert left_in(folder) == before
    done = uringmig("archive", "prune", folder, "--keep-last", 1, "--delete", "--json")
    assert done.code == 0
    assert done.result()["removed"] is True
    assert {one["entry"]["name"] for one in done.result()["decisions"] if not one["reasons"]} == {
        "web1-1", "web1-2"
    }  # fmt: skip
    assert uringmig("archive", "list", folder, "--names").out == "db1\nweb1-3\n"
    assert not list(folder.glob("web1-1*"))


@pytest.mark.parametrize(
    "options", [[], ["--keep-last", 0], ["--keep-last", -1], ["--keep-daily", "x"]]
)
def test_prune_without_a_rule_is_refused(folder: Path, options: list[object]) -> None:
    before = left_in(folder)
    done = uringmig("archive", "prune", folder, "--delete", *options)
    assert done.code == 2
    assert [name for name in left_in(folder) if name != ".lock"] == [
        n for n in before if n != ".lock"
    ]


def test_second_writer_is_refused_in_one_line(folder: Path) -> None:
    with Archive.open(folder, write=True):
        done = uringmig("archive", "prune", folder, "--keep-last", 1, "--delete")
        assert done.code == 5
        assert "is being written by another process" in done.err
        assert uringmig("archive", "list", folder).code == 0
        assert uringmig("archive", "prune", folder, "--keep-last", 1).code == 0, "dry: a reader"


def test_damaged_catalogue_stops_nobody_and_is_told(folder: Path) -> None:
    """It is only an index: readers do without it, a writer makes a new one, in one line each."""
    (folder / "catalogue.sqlite").write_bytes(b"rot" * 10_000)
    for command, code in (
        (["list"], 0), (["show", "db1"], 0), (["prune", "--keep-last", 1], 0), (["verify"], 1),
        (["restore", "db1", folder.parent / "out.mig"], 0),
    ):  # fmt: skip
        name, *rest = command
        done = uringmig("archive", name, folder, *rest)
        assert done.code == code
        for line in done.err.splitlines():
            assert "uringmig archive reindex`" in line
        assert done.err
    done = uringmig("archive", "prune", folder, "--keep-last", 9, "--delete")
    assert done.code == 1
    assert "uringmig archive reindex`" in done.err
    assert done.err.count("\n") == 1
    (folder / "catalogue.sqlite").write_bytes(b"rot" * 10_000)
    done = uringmig("archive", "reindex", folder)
    assert (done.code, done.err) == (0, "")
    assert "4 entries in the catalogue, 0 problems" in done.out
    assert uringmig("archive", "list", folder, "--names").out == "web1-1\nweb1-2\ndb1\nweb1-3\n"


def test_what_is_no_entry_is_a_warning_of_reindex(folder: Path) -> None:
    (folder / "db1.mig").rename(folder / "db2.mig")
    (folder / "web1-1.mig.manifest.json").write_text("{}")
    (folder / "catalogue.sqlite").unlink()
    done = uringmig("archive", "reindex", folder, "--json")
    assert done.code == 1
    assert done.result()["warnings"] == [
        f"{folder}/db2.mig: an image without a manifest",
        f"{folder}/web1-1.mig.manifest.json: no manifest of an archive's entry: Object missing "
        "required field `created`",
        "db1: its image is missing",
    ]
    assert done.result()["entries"] == 3


def test_verify_says_where_rot_is(folder: Path) -> None:
    done = uringmig("archive", "verify", folder)
    assert done.code == 0
    assert "none of 4 entries damaged" in done.out
    with (folder / "db1.mig").open("r+b") as file:
        file.seek((1 << 20) + 100)  # in the first page of the first block, whatever it holds
        file.write(b"rot")
    with Archive.open(folder, write=False) as archive:
        entry = archive.find("db1")
    bad = uringmig("archive", "verify", folder, "-v")
    good = uringmig("archive", "verify", folder, "web1-1", "web1-2", "--json")
    assert (good.code, good.result()["damaged"]) == (0, 0)
    assert bad.code == 3, bad.out
    assert "db1: damaged in 1 places, 3 of 3 chunks" in bad.out
    place = "db1: ramblock 'pc.ram': contents differ in chunk 0 (guest bytes from 0x0) at offset "
    assert f"{place}0x100000" in bad.out
    assert "1 of 4 entries damaged" in bad.out
    shown = uringmig("archive", "list", folder)
    assert [line.split()[-1] for line in shown.out.splitlines()[1:-1]] == [
        "good", "good", "damaged", "good"
    ]  # fmt: skip
    assert entry.condition == "good"
    # Pruning keeps what is good of a machine, and says of the other that it is all there is.
    dry = uringmig("archive", "prune", folder, "--vm", "db1", "--keep-last", 1)
    assert "keep  db1" in dry.out


@pytest.mark.parametrize(
    "options",
    [["--share", "x"], ["--share", "0%"], ["--share", "200%"], ["--time", "soon"], ["--time", 0],
     ["nobody"]],
)  # fmt: skip
def test_verify_refuses_what_makes_no_sense(folder: Path, options: list[object]) -> None:
    done = uringmig("archive", "verify", folder, *options)
    assert done.code == 2
    assert done.out == ""


def test_verify_by_share_and_time_goes_on(folder: Path) -> None:
    done = uringmig("archive", "verify", folder, "db1", "--share", "40%", "--json")
    assert done.code == 0
    [entry] = done.result()["entries"]
    assert (entry["checked_chunks"], entry["pass_ended"]) == (2, False)
    again = uringmig("archive", "verify", folder, "db1", "--time", "10m", "--json")
    [entry] = again.result()["entries"]
    assert (entry["checked_chunks"], entry["pass_ended"]) == (1, True)


def test_job_file_stands_for_the_archive_it_fills(folder: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.toml"
    job = '[[jobs]]\nname = "{}"\nsource = {{ qmp = "/run/x" }}\n'
    jobs.write_text(f'[defaults]\narchive = "{folder}"\n' + job.format("web1") + job.format("db1"))
    assert uringmig("archive", "list", jobs, "--names", "--vm", "db1").out == "db1\n"
    jobs.write_text(jobs.read_text() + 'archive = "/elsewhere"\n')
    several = uringmig("archive", "list", jobs)
    assert several.code == 2
    assert f"fills several archives, name one: /elsewhere, {folder}" in several.err
    jobs.write_bytes(b"\xff")
    wrong = uringmig("archive", "verify", jobs)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
