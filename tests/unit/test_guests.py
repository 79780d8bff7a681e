"""Synthetic guests: what they claim about their pages is true, and nobody can compress them."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from uringmig.testing.guests import PatternName, fill_guest, fill_pages, nonzero_bits

PAGE = 4096
PATTERNS: list[PatternName] = ["dense", "alternate", "mixed", "idle"]
#: Not a whole number of windows, so that the last one is short.
PAGE_COUNT = 2 * 1024 + 300


def new_memory(page_count: int = PAGE_COUNT) -> NDArray[np.uint8]:
    return np.zeros(page_count * PAGE, np.uint8)


def run_lengths(bits: NDArray[np.bool_]) -> list[int]:
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    return [len(run) for run in text.split("0") if run]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bits_say_which_pages_are_not_zero(pattern: PatternName) -> None:
    memory = new_memory()
    bits = fill_guest(memory, pattern, seed=1)
    assert len(bits) == PAGE_COUNT
    assert bits.tolist() == memory.reshape(-1, PAGE).any(axis=1).tolist()
    assert bits.tolist() == nonzero_bits(pattern, page_count=PAGE_COUNT, seed=1).tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_seed_same_bytes_other_seed_other_bytes(pattern: PatternName) -> None:
    one, same, other = new_memory(), new_memory(), new_memory()
    fill_guest(one, pattern, seed=7)
    fill_guest(same, pattern, seed=7)
    fill_guest(other, pattern, seed=8)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pages_differ(pattern: PatternName) -> None:
    memory = new_memory()
    bits = fill_guest(memory, pattern, seed=2)
    chosen = memory.reshape(-1, PAGE)[bits]
    assert len({page.tobytes() for page in chosen}) == len(chosen) > 0


def test_pages_do_not_compress() -> None:
    memory = new_memory()
    fill_guest(memory, "dense", seed=2)
    pages = memory.reshape(-1, PAGE)
    # Pages at the same place of two windows, which come of the same random block.
    sample = np.concatenate([pages[:64], pages[1024 : 1024 + 64]]).tobytes()
    assert len(zlib.compress(sample)) > 0.99 * len(sample)


def test_shares_and_run_lengths() -> None:
    page_count = 1 << 21
    assert nonzero_bits("dense", page_count=page_count).all()
    alternate = nonzero_bits("alternate", page_count=page_count)
    assert alternate[0::2].all()
    assert not alternate[1::2].any()
    mixed = nonzero_bits("mixed", page_count=page_count, seed=3)
    assert 0.45 < mixed.mean() < 0.55
    lengths = run_lengths(mixed)
    assert min(lengths) == 1
    assert 500 < max(lengths) < 1024
    assert 0.02 < nonzero_bits("idle", page_count=page_count, seed=3).mean() < 0.045


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("page_count", [0, 1, 2, 1024, 1025])
def test_any_size(pattern: PatternName, page_count: int) -> None:
    assert len(fill_guest(new_memory(page_count), pattern)) == page_count


def test_other_pages_are_left_alone_unless_asked_for() -> None:
    memory = new_memory()
    memory[:] = 0x55
    bits = nonzero_bits("alternate", page_count=PAGE_COUNT)
    fill_pages(memory, bits)
    pages = memory.reshape(-1, PAGE)
    assert (pages[~bits] == 0x55).all()
    fill_pages(memory, bits, write_zeros=True)
    assert not pages[~bits].any()
    assert pages[bits].any(axis=1).all()
