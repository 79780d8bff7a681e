"""Plain streams of a random guest whose pages come more than once, for tests of their readers."""

from __future__ import annotations

import numpy as np
from imagewriter import PAGE, Device
from mainstreams import (
    EOS,
    PlainBlock,
    page_record,
    plain_start,
    plain_tail,
    ram_section,
    word,
    zero_record,
)

from uringmig.options import WINDOW_BYTES

BLOCKS = [
    PlainBlock(idstr="pc.ram", used_length=3 * WINDOW_BYTES + 5 * PAGE),
    PlainBlock(idstr="vga", used_length=PAGE * 7),
]
DEVICES = [Device(body=b"\x06\x00\x00\x00\x02{}"), Device(idstr="cpu", section_id=4)]
EARLY = [Device(idstr="early", section_id=7)]


def random_stream(seed: int, *, rounds: int = 3) -> tuple[bytes, dict[str, bytes]]:
    """A stream in which pages come in rounds, changed, cleared and again, and what it means."""
    source = np.random.default_rng(seed)
    memory = {block.idstr: bytearray(block.used_length) for block in BLOCKS}
    sections = []
    last = None
    for number in range(rounds):
        body = b""
        for block in BLOCKS:
            count = block.used_length // PAGE
            pages = np.arange(count)
            if number:
                pages = source.permutation(count)[: count // (3 * number)]
            for page in pages.tolist():
                name = None if last == block.idstr else block.idstr
                last = block.idstr
                at = slice(page * PAGE, (page + 1) * PAGE)
                if source.random() < 0.4:
                    body += zero_record(page * PAGE, name)
                    memory[block.idstr][at] = bytes(PAGE)
                else:
                    data = source.bytes(PAGE)
                    body += page_record(page * PAGE, data, name)
                    memory[block.idstr][at] = data
        sections.append(ram_section(2 if number < rounds - 1 else 3, body + word(EOS)))
    tail = plain_tail(early=EARLY, devices=DEVICES, ram=b"".join(sections))
    return plain_start(BLOCKS) + tail, {name: bytes(data) for name, data in memory.items()}
