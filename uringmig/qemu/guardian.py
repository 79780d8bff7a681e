"""Something that outlives us: whatever becomes of a save, its guest does not stay stopped.

A process of its own, started before the guest is stopped and gone soon after it runs again. When
we die in between, by SIGKILL too, it lets the guest go on (`guardprocess`). Should both be killed
at once, a note tells the next save: a descriptor that QEMU keeps for us, whose opaque text is the
note and whose file is locked for as long as one of us lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, Self

from uringmig import signals
from uringmig.errors import HostError, LimitError, PeerError, explained
from uringmig.qemu import guardprocess
from uringmig.qemu.monitor import Monitor

#: It loads a handful of modules; on a host that is this slow a guest had better not be stopped.
_START_SECONDS: Final = 30.0
#: Guardians that outlive the save, since QEMU refused what they are to do.
_LEFT: Final[list[subprocess.Popen[bytes]]] = []
#: Run states in which a guest does something, and which ``stop`` ends and ``cont`` brings back.
LIVE: Final = frozenset({"running", "suspended"})


class Guardian:
    """Sees to it that a guest which is stopped goes on; a context manager.

    Args:
        monitor: of the VM.

    Raises:
        HostError: this host cannot start a process.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._lock = os.memfd_create("uringmig-note")
        self._note: int | None = None
        self._ready = False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._process = self._start()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, OSError):
                raise explained(error) or HostError(
                    f"the guardian of the guest cannot be started: {error}"
                ) from None
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process; it says when it is ready."""
        if not sys.executable:
            raise HostError("there is no Python to start a guardian of the guest with")
        program = [sys.executable, "-I", "-S", guardprocess.__file__, self._monitor.path]
        return subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._lock],  # the lock is held as long as one of us lives
            start_new_session=True,  # what strikes our group or terminal does not strike it
            bufsize=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let it end; an armed one that was not told that all is well acts as soon as it can."""
        os.close(self._lock)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        if self._note is None:
            process.wait()
        else:
            _LEFT.append(process)  # it waits for QEMU, which waits for us to leave its socket

    def arm(self, word: bytes) -> None:
        """From now on this is done should we die: `guardprocess.GO_ON` or ``TIDY``.

        Raises:
            PeerError: QEMU does not keep our note.
            HostError: the process did not come up.
        """
        self._wait_until_ready()
        # Should we die before we know that QEMU has the note, it does not stay either.
        self._tell(word)
        with signals.deferred():
            # By another open of the file: a lock belongs to an open, and QEMU is to have none.
            fd = os.open(f"/proc/self/fd/{self._lock}", os.O_RDONLY | os.O_CLOEXEC)
            former = self._note
            try:
                self._note = self._monitor.add_descriptor(fd, guardprocess.NOTES[word])
            except BaseException:
                self._tell(guardprocess.DISARM if former is None else guardprocess.TIDY)
                raise
            finally:
                os.close(fd)
            if former is not None:
                self._monitor.remove_descriptors(former)

    def _wait_until_ready(self) -> None:
        """Wait until the process watches.

        Raises:
            HostError: it did not come up.
        """
        if self._ready:
            return
        output = self._process.stdout
        assert output is not None
        ready = signals.wait_until_ready(output.fileno(), select.POLLIN, timeout_s=_START_SECONDS)
        if not ready or output.read(1) != guardprocess.READY:
            raise LimitError("the guardian of the guest did not start")
        self._ready = True

    def disarm(self) -> None:
        """All is well: the guest is as it is to be."""
        if self._note is None:
            return
        # First of all the guest stays as it is, stopped perhaps; then the note goes.
        self._tell(guardprocess.TIDY)
        note, self._note = self._note, None
        with contextlib.suppress(PeerError):  # QEMU may be gone, as it was told to be
            self._monitor.remove_descriptors(note)
        self._tell(guardprocess.DISARM)

    def _tell(self, word: bytes) -> None:
        """Say a word; a guardian that was killed itself is not missed: we are still here."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(word)


class Standstill:
    """A guest that stands still while its memory is read; made by `standing_still`.

    Attributes:
        live: it ran, or slept, when it was stopped, and is to go on.
        found: QEMU's word for what it was: the state that a save is to tell.
        stopped_at: when it was told to stop, `time.monotonic`.
    """

    def __init__(self, monitor: Monitor, guardian: Guardian) -> None:
        self._monitor = monitor
        self._guardian = guardian
        self.live = False
        self.found = ""
        self.stopped_at = 0.0
        self._standing = ""
        self._events: int | None = None
        self._ended = False

    def announce(self) -> None:
        """Have QEMU tell other saves of this one, whose guest runs on for now.

        Raises:
            PeerError: QEMU does not keep our note.
            HostError: the guardian did not come up.
        """
        self._guardian.arm(guardprocess.TIDY)

    def stop(self) -> None:
        """Stop a guest that runs, once the guardian watches."""
        self._have_it_watched()
        if self.found not in LIVE:
            self._standing = self.found
        else:
            self.live = True
            self.stopped_at = time.monotonic()
            self._monitor.execute("stop")
            self._standing = self._monitor.run_state()
            if self._standing != "paused":  # it had stopped by itself: panicked, or was shut down
                self.live = False
                self.found = self._standing
        self._events = len(self._monitor.run_events())

    def _have_it_watched(self) -> None:
        """Have the guardian do what the guest is found to need."""
        while True:
            self.found = self._monitor.run_state()
            live = self.found in LIVE
            self._guardian.arm(guardprocess.GO_ON if live else guardprocess.TIDY)
            if (self._monitor.run_state() in LIVE) == live:
                return
            # Meanwhile somebody else stopped it, and so it stays; or let it go on.

    @property
    def disturbance(self) -> str | None:
        """What somebody else did with the guest since it was stopped; None: it stands still.

        Raises:
            PeerError: QEMU went away.
        """
        state = self._monitor.run_state()
        events = self._new_events()
        if "RESET" in events:
            return "reset the guest"
        if events:
            return "let the guest go on"
        return None if state == self._standing else f"brought the guest into state {state!r}"

    def _new_events(self) -> tuple[str, ...]:
        """What came since the guest was stopped."""
        return () if self._events is None else self._monitor.run_events()[self._events :]

    def go_on(self) -> None:
        """Let the guest go on if it ran; whatever somebody else did with it meanwhile stays.

        Raises:
            PeerError: QEMU refuses, or is gone.
        """
        if self._ended:
            return
        self._ended = True
        with signals.deferred():
            # Not if it lives elsewhere since, migrated away: then it is in another state.
            halted = self.live and self._monitor.run_state() in guardprocess.HALTED
            if halted and not {"STOP", "RESUME"} & set(self._new_events()):
                self._monitor.execute("cont")
            self._guardian.disarm()

    def go_on_after(self, error: BaseException) -> None:
        """As `go_on`; should it fail, ``error`` tells that, too."""
        try:
            self.go_on()
        except PeerError as second:
            error.add_note(f"the guest was not let go on: {second}")

    def keep(self) -> None:
        """Leave the guest stopped: that is what was asked for."""
        self._ended = True
        self._guardian.disarm()


@contextmanager
def standing_still(monitor: Monitor) -> Iterator[Standstill]:
    """Have a guest stand still within the block, and go on afterwards whatever happens.

    Yields:
        The guest, not stopped yet: call its `Standstill.stop`.
    """
    with ExitStack() as stack:
        still = Standstill(monitor, stack.enter_context(Guardian(monitor)))
        try:
            yield still
        except BaseException as error:
            still.go_on_after(error)
            raise
        still.go_on()
