"""A live save of memory that changes at any moment until it stands still: the image is of then."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagereader import read_image
from restlessmemory import PAGE, Change, Restless, restless

from uringmig import MappedRamWriter, RamBlock, WriteOptions, verify
from uringmig.errors import StateError
from uringmig.transfer.channel import Pacer
from uringmig.units import MiB

#: A window of 4 MiB and a part of one.
PAGES = 1024 + 40
#: Pages that change are few, so that pieces and windows are met again and again; two windows.
BUSY = [0, 1, 15, 16, 17, 63, 64, 700, 1023, 1024, 1025, 1040, PAGES - 1]

changes = st.lists(
    st.tuples(st.sampled_from(BUSY), st.sampled_from([None, 0, 1, 2, 3])), max_size=4
)
#: What changes during one pass.
walks = st.lists(changes, max_size=12)
KINDS = ["shared", "private", "huge", "over file"]
kinds = st.sampled_from(KINDS)


def save(
    held: Restless,
    out: Path,
    between: list[Change],
    *,
    dense: bool,
    manifest: bool,
    more: Sequence[list[list[Change]]] = (),
) -> tuple[bytes, bytes]:
    """Save in two passes, or ``more`` while it changes.

    Returns:
        The memory as it stood still, and as the image has it.
    """
    options = WriteOptions(channels=1, depth=1, block_size=256 * 1024, manifest=manifest)
    with MappedRamWriter(
        out,
        [RamBlock("pc.ram", held.memory, dense=dense)],
        options=options,
        engine=held.engine(),
        live=True,
    ) as writer:
        writer.write_all()
        for steps in more:
            held.steps = steps
            writer.write_changed(moving=True)
        held.steps.clear()
        for change in between:
            held.change(*change)
        writer.write_changed()
        expected = held.now()
        writer.finish()
    return expected, read_image(out).contents["pc.ram"]


@settings(deadline=None)
@given(kinds, changes, walks, st.lists(walks, max_size=2), changes, st.booleans(), st.booleans())
def test_the_image_is_of_the_moment_when_memory_stood_still(
    kind: str,
    before: list[Change],
    steps: list[list[Change]],
    more: list[list[list[Change]]],
    between: list[Change],
    dense: bool,
    manifest: bool,
) -> None:
    """Whatever becomes of any page, at any look and around any write: zeros, a hole, and back."""
    with tempfile.TemporaryDirectory() as folder, restless(kind, PAGES) as held:
        for change in before:
            held.change(*change)
        held.steps = steps
        out = Path(folder) / "vm"
        expected, found = save(held, out, between, dense=dense, manifest=manifest, more=more)
        assert found == expected
        if manifest:
            assert verify(out).mismatches == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [None, 0, 2])
def test_there_and_back_again(kind: str, content: int | None, tmp_path: Path) -> None:
    """A page that was another thing only while the device read it: digest and bytes are one."""
    with restless(kind, PAGES) as held:
        for page in range(PAGES):
            held.change(page, 1)
        held.around = (5, content), (5, 1)
        expected, found = save(held, tmp_path / "vm", [], dense=False, manifest=True)
        assert expected == b"\1" * PAGE * PAGES
        assert found == expected
        assert verify(tmp_path / "vm").mismatches == ()


@pytest.mark.parametrize("kind", ["shared", "private"])
def test_only_what_changed_is_written_again(kind: str, tmp_path: Path) -> None:
    """A piece of 64 KiB for each page that changed, nothing for one that was zero all the time."""
    with restless(kind, PAGES) as held:
        for page in range(0, PAGES, 2):
            held.change(page, 1)
        with MappedRamWriter(
            tmp_path / "vm", [RamBlock("pc.ram", held.memory)], live=True,
            options=WriteOptions(bridge=0, dense_up_to=0),
        ) as writer:  # fmt: skip
            writer.write_all()
            for page in (4, 6):
                held.change(page, 2)  # two pages of one piece, of which every other is a hole
            held.change(640, None)
            writer.write_changed()
            result = writer.finish()
        assert result.written_bytes == (PAGES // 2 + 8 + 7) * PAGE
        assert result.pages_set == PAGES // 2 - 1
        assert result.zero_bytes == (PAGES // 2 + 1) * PAGE


def test_what_was_given_back_meanwhile_is_not_taken_again(tmp_path: Path) -> None:
    """Memory that has become a hole since the first pass is not allocated by the second look."""
    with restless("shared", PAGES) as held:
        for page in range(PAGES):
            held.change(page, 1)
        pages = [*range(200, 800), *range(1024, PAGES)]  # a part of a window, and a whole one
        given_back: list[Change] = [(page, None) for page in pages]
        expected, found = save(held, tmp_path / "vm", given_back, dense=False, manifest=True)
        assert found == expected
        assert held.host_bytes() == (PAGES - len(pages)) * PAGE


def test_no_rate_holds_up_the_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while the guest runs is paced; what it waits for is not."""
    asked: list[int] = []

    def delay(pacer: Pacer, count_bytes: int) -> float:
        asked.append(pacer._rate)
        return 0.0

    monkeypatch.setattr(Pacer, "delay", delay)
    memory = np.ones(MiB, np.uint8)
    with MappedRamWriter(
        tmp_path / "vm", [RamBlock("pc.ram", memory)], options=WriteOptions(rate=5 * MiB), live=True
    ) as writer:
        writer.write_all()
        assert set(asked) == {5 * MiB}
        asked.clear()
        memory[:] = 2
        writer.write_changed(moving=True)
        assert set(asked) == {5 * MiB}
        asked.clear()
        memory[:] = 3
        writer.write_changed()
        assert set(asked) == {0}


def test_order_of_the_passes(tmp_path: Path) -> None:
    """Nothing gets a name that has not been looked at again; pages are not chosen by the caller."""
    memory = np.ones(MiB, np.uint8)
    with MappedRamWriter(tmp_path / "vm", [RamBlock("pc.ram", memory)], live=True) as writer:
        with pytest.raises(StateError, match="after write_all"):
            writer.write_changed()
        writer.write_all()
        with pytest.raises(StateError, match="finds what changed"):
            writer.write_pages("pc.ram", np.array([0]))
        with pytest.raises(StateError, match="before write_changed"):
            writer.finish()
        memory[5000] = 7
        writer.write_changed()
        memory[0] = 9
        writer.write_pages("pc.ram", np.array([0]))
        writer.finish()
    assert read_image(tmp_path / "vm").contents["pc.ram"] == memory.tobytes()
    with MappedRamWriter(tmp_path / "still", [RamBlock("pc.ram", memory)]) as writer:
        writer.write_all()
        with pytest.raises(StateError, match="live"):
            writer.write_changed()
