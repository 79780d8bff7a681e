"""Job files: what is read, which defaults apply, and the one line that refuses a bad one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.batch.job import (
    ImageSource,
    JobFile,
    MemoryFile,
    MemoryFilesSource,
    QmpSource,
    entry_name,
    parse_jobs,
)
from uringmig.errors import StateError
from uringmig.options import WriteOptions
from uringmig.units import MiB

PATH = "/etc/uringmig/jobs.toml"
ONE = '[defaults]\narchive = "/a"\n[[jobs]]\nname = "web1"\n'
WHOLE = """
[defaults]
archive = "archive"
timeout = "1h30m"
rate = "100M"
tier = "cold"

[devices."/dev/vda"]
depth = 16
rate = "500M"

[[jobs]]
name = "web1"
source = { qmp = "/run/web1.sock" }

[[jobs]]
name = "old"
vm = "web1"
source = { image = "old.mig", offset = "1M" }
tier = "hot"
dedup = true
archive = "/other"
channels = 1
depth = 4
timeout = "0"

[[jobs]]
name = "sim"
source = { memory = { "pc.ram" = "/dev/shm/sim", "x" = { path = "x", offset = 4096 } },
           device_state = "sim.state" }
level = 9
host = "node1"
verify = true
entry = "{host}/{name}"
""".replace("},\n           device", "}, device")


def parse(text: str) -> JobFile:
    return parse_jobs(text, path=PATH)


def test_every_kind_of_source_with_defaults_applied() -> None:
    file = parse(WHOLE)
    live, image, memory = file.jobs
    assert live.source == QmpSource("/run/web1.sock")
    assert (live.vm, live.archive, live.tier, live.timeout_s) == (
        "web1", "/etc/uringmig/archive", "cold", 5400.0,
    )  # fmt: skip
    assert live.entry == "{name}-{time}"
    assert image.source == ImageSource("/etc/uringmig/old.mig", MiB)
    assert (image.vm, image.archive, image.tier, image.dedup) == ("web1", "/other", "hot", True)
    assert image.timeout_s == 0
    assert memory.source == MemoryFilesSource(
        {"pc.ram": MemoryFile("/dev/shm/sim"), "x": MemoryFile("/etc/uringmig/x", 4096)},
        "/etc/uringmig/sim.state",
    )
    assert (memory.level, memory.host, memory.verify) == (9, "node1", True)
    (device,) = file.devices
    assert (device.path, device.depth, device.rate) == ("/dev/vda", 16, 500 * MiB)


def test_options_are_the_program_s_unless_given() -> None:
    live, image, _ = parse(WHOLE).jobs
    assert live.options(rate=0) == WriteOptions(rate=100 * MiB)
    assert image.options(rate=0) == WriteOptions(channels=1, depth=4, rate=100 * MiB)


@pytest.mark.parametrize(
    ("own", "devices", "together"), [(0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (9, 7, 7)]
)
def test_the_lower_rate_counts_and_zero_is_none(own: int, devices: int, together: int) -> None:
    (job,) = parse(f"{ONE}source = {{ qmp = 'x' }}\nrate = {own}").jobs
    assert job.options(rate=devices).rate == together


def test_disks_are_for_running_vms() -> None:
    """What the defaults say of them leaves the jobs of images alone; folders are as other paths."""
    text = ONE.replace("[[jobs]]", "disks = { external = 'over' }\n[[jobs]]")
    text += "source = { qmp = 'x' }\n[[jobs]]\nname = 'b'\nsource = { image = 'x' }\n"
    text += "[[jobs]]\nname = 'c'\nsource = { qmp = 'x' }\ndisks = 'internal'"
    found = [one.disks for one in parse(text).jobs]
    assert found == ["external=/etc/uringmig/over", "none", "internal"]


def test_names_of_entries() -> None:
    live, _, memory = parse(WHOLE).jobs
    assert entry_name(live, host="here", time="T") == "web1-T"
    assert entry_name(memory, host="here", time="T") == "node1/sim"


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "", "missing required field `jobs`"),
        ("x =", "", "invalid value"),
        ("jobs = 3", "jobs", "expected `array`, got `int`"),
        ("jobs = []", "jobs", "expected 1 to 10000 of them, found 0"),
        (ONE, "jobs[0]", "missing required field `source`"),
        (ONE + "source = { qmp = 3 }", "jobs[0].source.qmp", "expected `str`, got `int`"),
        (ONE + "source = {}", "jobs[0].source", "expected keys qmp, or image"),
        (ONE + "source = { image = 'x', qmp = 'y' }", "jobs[0].source", "found 'qmp, image'"),
        (ONE + "source = { memory = { a = 'x' } }", "jobs[0].source", "found 'memory'"),
        (ONE + "source = { image = 'x', offset = -1 }", "jobs[0].source.offset", "not a size"),
        (
            ONE + "source = { memory = { a = { path = 'x', length = -1 } }, device_state = 'y' }",
            "jobs[0].source.memory.'a'.length", "expected a number from 0",
        ),
        (ONE + "source = { qmp = 'x' }\nspeed = 3", "jobs[0]", "unknown field `speed`"),
        (
            ONE + "source = { qmp = 'x' }\ntier = 'warm'",
            "jobs[0].tier", "expected one of 'hot', 'cold', found 'warm'",
        ),
        (ONE + "source = { qmp = 'x' }\nentry = '{nam}'", "jobs[0].entry", "only {name}, {host}"),
        (ONE + "source = { qmp = 'x' }\nentry = 'a}'", "jobs[0].entry", "only {name}, {host}"),
        (ONE + "source = { qmp = 'x' }\ntimeout = '3'", "jobs[0].timeout", "not a duration: '3'"),
        (ONE + "source = { qmp = 'x' }\nrate = 'fast'", "jobs[0].rate", "not a size: 'fast'"),
        (ONE + "source = { qmp = 'x' }\ndepth = 0", "jobs[0]", "depth must be from 1 to"),
        (ONE + "source = { qmp = 'x' }\nretries = -1", "jobs[0].retries", "a number from 0 to 100"),
        (ONE + "source = { qmp = 'x' }\nlevel = 23", "jobs[0].level", "a number from 1 to 22"),
        (
            ONE + "source = { qmp = 'x' }\ntier = 'cold'\ndedup = true",
            "jobs[0].dedup", 'only tier "hot" shares pages',
        ),
        (
            ONE + "source = { qmp = 'x' }\ndisks = 'external'",
            "jobs[0].disks", "expected 'none', 'internal' or { external = 'DIR' }",
        ),
        (ONE + "source = { qmp = 'x' }\ndisks = { internal = 'x' }", "jobs[0].disks", "expected"),
        (ONE + "source = { qmp = 'x' }\ndisks = {}", "jobs[0].disks", "expected"),
        (
            ONE + "source = { qmp = 'x' }\ndisks = { external = '~/x' }",
            "jobs[0].disks.external", "expected a path",
        ),
        (
            ONE + "source = { image = 'x' }\ndisks = 'internal'",
            "jobs[0].disks", "only a running VM",
        ),
        (ONE + "source = { qmp = 'x' }\nengine = 'aio'", "jobs[0].engine", "expected one of"),
        (
            ONE + "source = { qmp = 'x' }\n[[jobs]]\nname = 'web1'\nsource = { qmp = 'y' }",
            "jobs[1].name", "also of jobs[0], found 'web1'",
        ),
        (
            ONE + "source = { qmp = 'x' }\n[devices.'/d']\ndepth = 0",
            "devices.'/etc/uringmig/d'", "",
        ),
        (
            '[[jobs]]\nname = "a"\nsource = { qmp = "x" }',
            "jobs[0].archive", "expected a directory here or in defaults, found None",
        ),
        (ONE.replace("web1", "a/b") + "source = { qmp = 'x' }", "jobs[0].name", "found 'a/b'"),
        (ONE.replace("web1", "") + "source = { qmp = 'x' }", "jobs[0].name", "found ''"),
        (ONE + "source = { qmp = 'x' }\nhost = ''", "jobs[0].host", "found ''"),
    ],
)  # fmt: skip
def test_refused_with_file_place_and_what_is_expected(text: str, place: str, what: str) -> None:
    with pytest.raises(StateError) as caught:
        parse(text)
    line = str(caught.value)
    assert "\n" not in line
    if place == "devices.'/etc/uringmig/d'":
        place, what = "devices.'/d'.depth", "expected a number from 1 to"
    assert line.startswith(f"{PATH}: {place}" if place else f"{PATH}: ")
    assert what in line


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(StateError, match=r"jobs\.toml"):
        parse(text)


@given(st.binary(max_size=300).map(lambda data: data.decode("latin-1")), st.integers(0, 700))
def test_a_damaged_file_is_read_or_refused(noise: str, at: int) -> None:
    text = WHOLE[:at] + noise + WHOLE[at:]
    with contextlib.suppress(StateError):
        assert parse(text).jobs


PATHS = {
    "jobs[0].archive": 'archive = "{}"\n[[jobs]]\nname = "a"\nsource = {{ qmp = "x" }}',
    "jobs[0].source.image": 'archive = "a"\n[[jobs]]\nname = "a"\nsource = {{ image = "{}" }}',
    "jobs[0].source.qmp": 'archive = "a"\n[[jobs]]\nname = "a"\nsource = {{ qmp = "{}" }}',
    "jobs[0].source.memory.'r'": (
        'archive = "a"\n[[jobs]]\nname = "a"\n'
        'source = {{ memory = {{ r = "{}" }}, device_state = "d" }}'
    ),
    "jobs[0].source.device_state": (
        'archive = "a"\n[[jobs]]\nname = "a"\n'
        'source = {{ memory = {{ r = "r" }}, device_state = "{}" }}'
    ),
    "devices.'{}'": (
        'archive = "a"\n[[jobs]]\nname = "a"\nsource = {{ qmp = "x" }}\n[devices."{}"]\ndepth = 1'
    ),
}


@pytest.mark.parametrize("place", PATHS)
@pytest.mark.parametrize("path", ["~/a", "~", "~root/a", "$HOME/a", "${{HOME}}/a", "", "a\\u0000b"])
def test_a_path_that_only_a_shell_understands_is_refused(place: str, path: str) -> None:
    """Taken literally it would be a folder of that name, found when it is full."""
    path = path.replace("{{", "{").replace("}}", "}")
    with pytest.raises(StateError) as caught:
        parse("[defaults]\n" + PATHS[place].format(path))
    line = str(caught.value)
    assert line.startswith(f"{PATH}: {place.format(path) if '{' not in path else ''}"[:30])
    assert "expected a path" in line
    assert "\n" not in line


@pytest.mark.parametrize("place", PATHS)
@pytest.mark.parametrize("path", ["./~", "a~", "/x/~y", "5$", "$", "a b", "..", "-x"])
def test_other_paths_are_taken_as_they_are(place: str, path: str) -> None:
    assert parse("[defaults]\n" + PATHS[place].format(path)).jobs
