"""What the harness runs at each scale, and how it is cut down."""

from __future__ import annotations

from collections import Counter

import pytest

from perf.programme import TARGETS, choose
from perf.workloads import WORKLOADS
from uringmig.errors import StateError
from uringmig.units import MiB


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_every_workload_and_target_is_in_each_scale(scale: str) -> None:
    contests = choose("full" if scale == "full" else "quick")
    assert {contest.workload.name for contest in contests} == set(WORKLOADS)
    assert {contest.target for contest in contests} == set(TARGETS)
    for contest in contests:
        names = Counter(rival.name for rival in contest.rivals)
        assert set(names.values()) == {1}, f"two rivals of one name: {names.most_common(1)}"
        assert {rival.kind for rival in contest.rivals} == {contest.kind}
        assert any(rival.group == "uringmig" for rival in contest.rivals)
        if contest.workload.name != "grid":
            assert any(rival.group == "qemu" for rival in contest.rivals)


def test_full_has_every_rival_that_is_asked_for() -> None:
    [dense] = choose("full", targets=["disk"], workloads=["dense"], rivals=["*"])[:1]
    names = [rival.name for rival in dense.rivals]
    for channels in (1, 2, 4, 8):
        assert f"qemu mapped-ram multifd x{channels} direct" in names
    for preparation in ("sized", "extended", "fallocated"):
        assert f"fio io_uring 1x16x1M {preparation}" in names
    assert {"uringmig null 2x8x1M", "uringmig memory 2x8x1M", "qemu plain"} <= set(names)
    assert {"uringmig pwrite 2x1x512K", "uringmig pwrite 1x1x1M buffered"} <= set(names)
    assert {"uringmig io_uring 2x8x1M", "uringmig io_uring 2x8x1M +manifest"} <= set(names)


def test_a_choice_cuts_down() -> None:
    [contest] = choose(
        "quick", targets=["disk"], workloads=["mixed"], rivals=["qemu*", "*1x16*"], rounds=4,
        memory_bytes=3 * MiB + 1,
    )  # fmt: skip
    assert contest.rounds == 4
    assert contest.workload.memory_bytes == 3 * MiB + 4096
    assert [rival.name for rival in contest.rivals] == [
        "uringmig io_uring 1x16x1M",
        "qemu mapped-ram multifd x2 direct",
    ]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"targets": ["tape"]}, "no target 'tape'; there are disk, tmpfs, xfs-loop"),
        ({"workloads": ["busy"]}, "no workload 'busy'"),
        ({"rivals": ["nobody"]}, "nothing to run"),
    ],
)
def test_a_choice_of_nothing_is_refused(choice: dict[str, list[str]], message: str) -> None:
    with pytest.raises(StateError, match=message):
        choose("quick", **choice)  # type: ignore[arg-type]
