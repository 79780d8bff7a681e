"""Where a QMP monitor is: a path, or a socket as QEMU's own options write it.  Pure."""

from __future__ import annotations

import re
from typing import Final

from uringmig.errors import StateError

#: What may follow the path in QEMU's ``-qmp unix:PATH,server=on,wait=off``.
_OPTIONS: Final = re.compile(r"(,(server|wait|nowait|abstract|tight|reconnect)(=[^,]*)?)+$")


def socket_path(text: str) -> str:
    """The path of the unix socket that is meant.

    Raises:
        StateError: another kind of socket.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("unix", "tcp", "telnet", "fd", "vsock"):
        return text
    if kind != "unix":
        raise StateError(
            f"{text}: QMP over {kind} is not supported yet; give QEMU a unix socket "
            "(-qmp unix:PATH,server=on,wait=off)"
        )
    return _OPTIONS.sub("", rest)
