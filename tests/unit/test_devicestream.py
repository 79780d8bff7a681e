"""`receive` fed QEMU's own recorded stream through a socket: whole, cut, and bent."""

from __future__ import annotations

import lzma
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from uringmig.contents import devicestream
from uringmig.contents.devicestream import DeviceStream
from uringmig.errors import FormatError, PeerError
from uringmig.qemu import receiving
from uringmig.qemu.receiving import receive

GOLDEN = Path(__file__).parents[1] / "interop" / "golden" / "q35-ignore-shared.stream.xz"
STREAM = lzma.decompress(GOLDEN.read_bytes())
#: virtio-mem's block in the recording is private, but of what is not plugged QEMU sends no page.
SHARED = {"pc.ram": 4 << 20, "0000:00:01.0/vm0": 8 << 20}
#: Where ram's START section ends, by its footer.
START_END = 367


def receive_bytes(data: bytes, shared: dict[str, int]) -> tuple[DeviceStream, list[int]]:
    """Receive ``data`` and then the end of the stream; also the blocks known at each set-up."""
    set_ups: list[int] = []
    ours, theirs = socket.socketpair()

    def send() -> None:
        # The receiver may refuse in the middle and close.
        with theirs, suppress(OSError):
            theirs.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with ours:
            stream = receive(
                ours, shared, on_setup=lambda stream: set_ups.append(len(stream.blocks))
            )
    finally:
        thread.join()
    return stream, set_ups


def test_the_whole_stream() -> None:
    stream, set_ups = receive_bytes(STREAM, SHARED)
    assert set_ups == [7]
    assert [idstr for idstr, _ in stream.blocks][:2] == ["0000:00:01.0/vm0", "pc.ram"]
    assert set(stream.private) == {idstr for idstr, _ in stream.blocks} - set(SHARED)
    assert stream.configuration.machine == "pc-q35-10.0"
    assert stream.section_id == 1
    # The firmware of the recording is 64 KiB of hlt.
    assert set(stream.private["pc.bios"].memory.tolist()) == {0xF4}
    tail = stream.device_state().tail
    assert all(section in STREAM and section in tail for section in stream.early + stream.full)
    assert len(stream.early) + len(stream.full) == 31
    assert tail.endswith(stream.vmdescription)
    assert stream.stopped_at is not None


@pytest.mark.parametrize("fiftieth", range(50))
def test_a_cut_stream_is_refused(fiftieth: int) -> None:
    with pytest.raises((PeerError, FormatError)):
        receive_bytes(STREAM[: len(STREAM) * fiftieth // 50], SHARED)


def test_the_last_byte_missing() -> None:
    with pytest.raises(PeerError, match="before the end"):
        receive_bytes(STREAM[:-1], SHARED)


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "SILENCE_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(STREAM[:1000])
        with pytest.raises(PeerError, match="fell silent"):
            receive(ours, SHARED, on_setup=lambda _: None)


def test_pages_of_a_shared_block() -> None:
    with pytest.raises(PeerError, match=r"sends pages of 'pc\.bios' though"):
        receive_bytes(STREAM, {**SHARED, "pc.bios": 0x10000})


def test_a_block_ignored_that_is_not_known_here() -> None:
    """QEMU took it for shared; without its pages the image would lose it."""
    with pytest.raises(PeerError, match=r"0 of 1024 pages of ramblock 'pc\.ram'"):
        receive_bytes(STREAM, {"0000:00:01.0/vm0": 8 << 20})
    with pytest.raises(PeerError, match=r"0 of 2048 pages of ramblock '0000:00:01\.0/vm0'"):
        receive_bytes(STREAM, {"pc.ram": 4 << 20})


def test_another_size() -> None:
    with pytest.raises(
        PeerError, match=r"'pc\.ram' has 4194304 bytes in the stream, but .* 8388608"
    ):
        receive_bytes(STREAM, {**SHARED, "pc.ram": 8 << 20})


def test_private_blocks_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blamed is the largest of them, not the one that was one too many: that is a ROM, mostly."""
    with pytest.raises(PeerError, match=r"'vga\.vram' \(255 MiB\).* no more than 256 MiB"):
        devicestream.check_sent({"rom": 2 << 20, "vga.vram": 255 << 20, "pc.rom": 1}, PeerError)
    devicestream.check_sent({"rom": 1 << 20, "vga.vram": 255 << 20}, PeerError)
    monkeypatch.setattr(devicestream, "PRIVATE_BYTES_MAX", 128 << 10)
    with pytest.raises(PeerError, match="is not shared memory"):
        receive_bytes(STREAM, SHARED)


def test_a_foreign_iterable_section() -> None:
    """As VFIO's: its state goes on beyond what can be copied."""
    name = b"0000:00:02.0/vfio"
    foreign = b"\x01" + (99).to_bytes(4, "big") + bytes([len(name)]) + name + bytes(4) + b"\0\0\0\1"
    with pytest.raises(
        FormatError, match=r"iterable section '0000:00:02\.0/vfio' cannot be copied"
    ):
        receive_bytes(STREAM[:START_END] + foreign + STREAM[START_END:], SHARED)
