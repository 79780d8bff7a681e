"""Options: the defaults of the contract, and every value out of range refused by its name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from uringmig.errors import StateError
from uringmig.options import WINDOW_BYTES, ReadOptions, TransferOptions, WriteOptions

KIND = pytest.mark.parametrize("kind", [WriteOptions, ReadOptions])


@KIND
def test_defaults_are_those_of_the_contract(kind: type[TransferOptions]) -> None:
    options = kind()
    assert (options.block_size, options.depth) == (1 << 20, 8)
    assert options.bridge == 16 << 10
    assert (options.engine, options.direct) == ("auto", "preferred")
    assert options.rate == 0


def test_manifest_is_on_by_default() -> None:
    assert WriteOptions().manifest


@KIND
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("channels", 1, 255),
        ("depth", 1, 4096),
        ("block_size", 4096, 4 << 20),
        ("bridge", 0, 4 << 20),
        ("rate", 0, 1 << 62),
    ],
)
def test_range_includes_its_ends_and_nothing_beyond(
    kind: type[TransferOptions], name: str, least: int, most: int
) -> None:
    # A bridge is no longer than a block, so the longest goes with the largest.
    others: dict[str, Any] = {"block_size": 4 << 20} if name == "bridge" else {}
    for value in (least, most):
        assert getattr(kind(**others | {name: value}), name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(StateError, match=f"^{name} ") as caught:
            kind(**others | {name: value})
        assert str(value) in str(caught.value)


@KIND
def test_block_size_is_whole_pages(kind: type[TransferOptions]) -> None:
    with pytest.raises(StateError, match=r"block_size 6144 .* 4096"):
        kind(block_size=6144)


@KIND
@pytest.mark.parametrize("block_size", [4096, 8192, 16384, 1 << 20])
def test_any_block_size_goes_with_any_bridge(kind: type[TransferOptions], block_size: int) -> None:
    """Whoever gives one of the two, also by `replace`, need not know of the other."""
    assert kind(block_size=block_size).bridge == min(16 << 10, block_size)
    assert kind(block_size=block_size, bridge=4 << 20).bridge == block_size
    assert dataclasses.replace(kind(), block_size=block_size).bridge == min(16 << 10, block_size)


@pytest.mark.parametrize(
    ("one", "other"), [(ReadOptions, WriteOptions), (WriteOptions, ReadOptions)]
)
def test_the_other_direction_drops_no_setting(
    one: type[TransferOptions], other: type[TransferOptions]
) -> None:
    """Every field that both directions have, present and future: none at its default here."""
    given = {"channels": 3, "depth": 5, "block_size": 8192, "engine": "pwrite", "direct": "off"}
    options = one(**given, bridge=4096, rate=7)  # type: ignore[arg-type]
    taken_over = options.like(other)
    assert type(taken_over) is other
    for field in dataclasses.fields(TransferOptions):
        value = getattr(options, field.name)
        assert value != field.default, field.name
        assert getattr(taken_over, field.name) == value


@KIND
@pytest.mark.parametrize(("name", "value"), [("engine", "aio"), ("engine", ""), ("direct", "on")])
def test_unknown_word_is_refused_with_those_allowed(
    kind: type[TransferOptions], name: str, value: str
) -> None:
    with pytest.raises(StateError, match=f"{name} .* is none of ") as caught:
        kind(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_dense_up_to_is_not_negative() -> None:
    with pytest.raises(StateError, match="dense_up_to"):
        WriteOptions(dense_up_to=-1)


@KIND
def test_options_do_not_change(kind: type[TransferOptions]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().depth = 1  # type: ignore[misc]


def test_options_print_every_value() -> None:
    for field in dataclasses.fields(WriteOptions):
        assert f"{field.name}=" in repr(WriteOptions())


@KIND
def test_no_settings_ask_for_more_memory_than_a_host_has(kind: type[TransferOptions]) -> None:
    """Channels, depth and block size are each in range, so all of them together are to run."""
    most = kind(channels=255, depth=4096, block_size=4 << 20)
    assert most.channels * most.windows_held * WINDOW_BYTES <= 2 << 30
    assert kind(channels=4, depth=4096).windows_held * 4 * WINDOW_BYTES == 1 << 30
    assert kind().windows_held == 3
    assert kind(depth=64).windows_held == 17
