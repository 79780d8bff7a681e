"""Options of a transfer, wherever they are given: the same ones, each with any other, none lost."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import pytest
from archiveentries import add_cold_entry, add_entry
from batchjobs import job, job_ends, make_image, run_jobs, write_jobs
from commandline import uringmig
from plainstreams import random_stream

from uringmig.archive.directory import Archive
from uringmig.batch.job import parse_jobs
from uringmig.cli import app
from uringmig.options import ReadOptions, TransferOptions, WriteOptions

#: All of `TransferOptions` but the bridge, which only a profile gives.
NAMES = {field.name for field in dataclasses.fields(TransferOptions)} - {"bridge"}
#: Commands that move no pages themselves, and what of a transfer they have all the same.
PARTS = {"load": {"channels", "direct"}, "bench": {"engine", "direct"}}
TRANSFERS = {"save", "verify", "convert", "diff", "archive verify", "archive restore"}
BLOCK_SIZES = ["4K", "8K", "12K", "4M"]


def commands(group: click.Command, before: str = "") -> dict[str, click.Command]:
    """Every command of the program by its whole name."""
    if not isinstance(group, click.Group):
        return {before.strip(): group}
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found |= commands(command, f"{before}{name} ")
    return found


def test_every_command_that_moves_pages_has_every_option_of_a_transfer() -> None:
    """With the defaults of `uringmig.options`; a new command or option is found by this."""
    with_options = set()
    for name, command in commands(app).items():
        defaults = {one.name: one.default for one in command.params if one.name in NAMES}
        if not defaults:
            continue
        if name in PARTS:
            assert defaults.keys() == PARTS[name]
            continue
        with_options.add(name)
        kind = WriteOptions if name == "save" else ReadOptions
        assert defaults == {one: getattr(kind(), one) for one in NAMES}
    assert with_options == TRANSFERS


def test_the_usage_line_brackets_what_may_be_left_out_and_nothing_else() -> None:
    """Of every command: whoever gives all that is not in brackets is not refused for usage."""
    for name, command in commands(app).items():
        context = click.Context(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        needed = {param.name for param in command.params if param.required}
        for param in command.params:
            metavar = param.make_metavar(context)
            if isinstance(param, click.Argument):
                assert (metavar.startswith("[")) == (param.name not in needed), (name, metavar)
                assert metavar in usage.split(), (name, metavar)
            else:
                assert (f"{param.opts[0]} {metavar}" in usage) == (param.name in needed), name
        given = re.sub(r"\[[^]]*\](\.\.\.)?", "", usage).split()
        parsed = command.make_context(name, given, resilient_parsing=False)
        assert parsed.params.keys() >= needed, name


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    with Archive.open(folder / "a", write=True) as archive:
        add_entry(archive, "hot")
        add_cold_entry(archive, "cold")
    return folder / "a"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_command_takes_every_block_size(
    archive: Path, tmp_path: Path, block_size: str
) -> None:
    """Also those below the default bridge, for which there is no option (`save` needs a VM)."""
    for arguments in (
        ["verify", archive / "hot.mig"],
        ["convert", f"{archive}#cold", tmp_path / "converted.mig"],
        ["diff", archive / "hot.mig", f"{archive}#cold"],
        ["archive", "verify", archive],
        ["archive", "restore", archive, "hot", tmp_path / "hot"],
        ["archive", "restore", archive, "cold", tmp_path / "cold"],
        ["archive", "restore", archive, "hot", tmp_path / "plain", "--as", "plain"],
    ):
        done = uringmig(*arguments, "--block-size", block_size)
        assert (done.code, done.err) == (0, ""), arguments


@pytest.mark.parametrize("command", sorted(TRANSFERS))
@pytest.mark.parametrize("block_size", ["0", "2K", "5000", "8M"])
def test_a_block_size_that_is_none_is_told_as_asked(command: str, block_size: str) -> None:
    """Exit code 2, one line that names what was given; with ``--json`` an event."""
    places = {"save": ["--qmp", "q", "x"], "verify": ["x"], "archive verify": ["x"]}
    places |= {"convert": ["x", "y"], "diff": ["x", "y"]}
    arguments = [*command.split(), *places.get(command, ["x", "y", "z"])]
    plain = uringmig(*arguments, "--block-size", block_size)
    assert (plain.code, plain.out, plain.err.count("\n")) == (2, "", 1)
    assert "block_size" in plain.err
    asked = uringmig(*arguments, "--block-size", block_size, "--json")
    assert asked.result()["exit_code"] == 2


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_kind_of_job_takes_every_block_size(tmp_path: Path, block_size: str) -> None:
    """Reading the source, writing either tier, and reading the entry back."""
    make_image(tmp_path / "a.mig", size=8 << 20)
    (tmp_path / "plain").write_bytes(random_stream(1)[0])
    jobs = [
        job(f"{tier}-{source}", f'image = "{source}"', tier=tier)
        for tier in ("hot", "cold")
        for source in ("a.mig", "plain")
    ]
    path = write_jobs(tmp_path, *jobs, defaults=f'block_size = "{block_size}"\nverify = true\n')
    done = run_jobs(path)
    assert done.code == 0, done.err
    assert all(end["stage"] == "done" for end in job_ends(done).values())


def test_the_largest_of_all_settings_together_is_no_trouble(tmp_path: Path) -> None:
    """What is in range each by itself is taken, in either tier and by the commands, and runs."""
    make_image(tmp_path / "a.mig", size=24 << 20, pattern="dense")
    jobs = [job(tier, 'image = "a.mig"', tier=tier) for tier in ("hot", "cold")]
    settings = 'channels = 255\ndepth = 4096\nblock_size = "4M"\nverify = true\n'
    done = run_jobs(write_jobs(tmp_path, *jobs, defaults=settings))
    assert done.code == 0, done.err
    options = ["--channels", 255, "--depth", 4096, "--block-size", "4M"]
    assert uringmig("verify", tmp_path / "a.mig", *options).code == 0
    assert uringmig("archive", "verify", tmp_path / "archive", *options).code == 0


def test_a_job_s_two_directions_have_the_same_settings() -> None:
    """Source and read-back are read as the job says: engine, O_DIRECT and rate included."""
    settings = {"channels": 3, "depth": 5, "block_size": 8192, "rate": 7000}
    words = {"engine": "pwrite", "direct": "off"}
    text = "".join(f"{name} = {value}\n" for name, value in settings.items())
    text += "".join(f'{name} = "{value}"\n' for name, value in words.items())
    [one] = parse_jobs(
        f"[defaults]\narchive = '/a'\n{text}" + job("web1", 'qmp = "q"'), path="/jobs.toml"
    ).jobs
    for options in (one.options(rate=0), one.options(rate=0).like(ReadOptions)):
        found = {name: getattr(options, name) for name in NAMES}
        assert found == settings | words
