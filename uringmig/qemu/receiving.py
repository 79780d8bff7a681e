"""The migration stream of a QEMU with x-ignore-shared, received from its socket.

What it says is collected by `contents.devicestream`, as that of a stream in a file is.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Mapping
from typing import Final

from uringmig import signals
from uringmig.contents.devicestream import DeviceStream, StreamCollector
from uringmig.errors import PeerError
from uringmig.format.mainstream import MainStreamReader

#: Longest silence of QEMU in the middle of its stream; it sends device state within milliseconds,
#: but a busy host's block devices may take long to come to rest first.
SILENCE_SECONDS: Final = 60.0
_RECEIVE_BYTES: Final = 256 * 1024


def receive(
    connection: socket.socket,
    shared: Mapping[str, int | None],
    *,
    on_setup: Callable[[DeviceStream], None],
) -> DeviceStream:
    """Receive a whole stream; the source stays connected and waits for our SHUT.

    Args:
        connection: connected to the source.
        shared: idstr and size in bytes of the blocks that are not to come by the stream.
        on_setup: called when the list of blocks is known; the guest may still run then.

    Raises:
        PeerError: the source fell silent or went away, or sends what must not be sent.
        FormatError: the stream breaks a rule of the format.
    """
    collector = StreamCollector(shared, PeerError, on_setup)
    reader = MainStreamReader()
    while not reader.finished:
        if not signals.wait_until_ready(
            connection.fileno(), select.POLLIN, timeout_s=SILENCE_SECONDS
        ):
            raise PeerError(f"QEMU's stream fell silent for {SILENCE_SECONDS:.0f} s")
        try:
            data = connection.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise PeerError(f"QEMU's stream broke off: {error.strerror}") from None
        if not data:
            raise PeerError("QEMU closed its stream before the end")
        reader.feed(data)
        if reader.waiting_for_description:
            description = reader.find_description()
            if description is not None:
                reader.set_description(description)
        for event in reader.events():
            collector.take(event)
    return collector.whole()
